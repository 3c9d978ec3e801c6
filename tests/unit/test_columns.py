"""Columns of other names are read as our fields; what does not fit is refused by both names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrm.data.preference import parse_row
from rayrm.data.sources import plan_sources, read_work
from rayrm.data_settings import SourceConfig
from rayrm.errors import ConfigError, RowError

NAMES = {"prompt": "question", "chosen": "good", "rejected": "bad"}


def contents(source: Any, columns: Any = None) -> list[Any]:
    plan = plan_sources(source, max_rows=None, name="train", columns=columns)
    return [row.content for work in plan.work for row in read_work(work)]


def test_columns_are_read_as_our_fields_and_others_are_kept() -> None:
    rows = [{"question": "a", "good": "b", "bad": "c", "margin": 1.0, "id": 7}]
    [row] = contents(rows, NAMES)
    assert row == {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0, "id": 7}
    assert parse_row(row).completions == ("b", "c")


def test_sides_can_be_swapped() -> None:
    rows = [{"chosen": "a", "rejected": "b"}]
    assert contents(rows, {"chosen": "rejected", "rejected": "chosen"}) == [{"chosen": "b", "rejected": "a"}]


def test_a_source_has_columns_of_its_own_beside_those_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "a", "good": "b", "bad": "c"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "a", "best": "b", "bad": "c"}\n')
    source = [
        str(tmp_path / "a.jsonl"),
        SourceConfig(path=str(tmp_path / "b.jsonl"), columns={"chosen": "best"}),
    ]
    plan = plan_sources(source, max_rows=None, name="train", columns=NAMES)
    assert [dict(group.columns)["chosen"] for group in plan.groups] == ["good", "best"]
    assert contents(source, NAMES) == [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2


def test_a_field_that_is_none_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"`columns\.chosenn` \('good'\).*Did you mean `chosen`\?"):
        contents([{"a": 1}], {"chosenn": "good"})
    with pytest.raises(ConfigError, match=r"`columns\.chosen` \(3\)"):
        contents([{"a": 1}], {"chosen": 3})


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        ({"question": "a", "bad": "c"}, "missing-chosen", "`good`.*is missing .*'bad', 'question'"),
        ({"question": "a", "good": "b", "bad": None}, "missing-rejected", "`bad`.*is null"),
        ({"good": "b", "bad": "c"}, "missing-prompt", "`question`"),
    ],
)
def test_a_row_without_a_named_column_is_refused_by_both_names(
    row: dict[str, Any], reason: str, says: str
) -> None:
    [content] = contents([row], NAMES)
    assert isinstance(content, RowError)
    assert content.reason == reason
    with pytest.raises(RowError, match=says):
        raise content


def test_an_optional_column_may_be_null() -> None:
    [row] = contents([{"question": None, "good": "b", "bad": "c"}], NAMES)
    assert parse_row(row).prompt is None


def test_a_refused_row_keeps_its_text() -> None:
    plan = plan_sources([{"good": "b"}], max_rows=None, name="train", columns=NAMES)
    [row] = read_work(plan.work[0])
    assert row.line == b'{"good": "b"}'


def test_a_damaged_line_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n7\n")
    damaged, number = contents(str(tmp_path / "a.jsonl"), NAMES)
    assert isinstance(damaged, RowError)
    assert damaged.reason == "bad-json"
    assert number == 7
