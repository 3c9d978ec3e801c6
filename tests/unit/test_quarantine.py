"""Refusals by source: a bad source ends the reading early, by its own rows, and says why in numbers."""

from __future__ import annotations

import itertools
import random
import shutil
import stat
from collections.abc import Sequence

import pytest

from rayrm.data.blocks import Refusal
from rayrm.data.quarantine import RefusalWatch, quarantine_aside, write_quarantine
from rayrm.errors import DataError

Block = tuple[dict[int, int], list[Refusal]]


def refusal(source: int, row: int, reason: str = "bad-json") -> Refusal:
    return Refusal(source, row, reason, f"s{source}:{row + 1}: {reason} here", "{")


def blocks_of(source: int, bad: Sequence[bool], size: int = 50, reason: str = "bad-json") -> list[Block]:
    """The blocks of a source, `bad` row by row."""
    return [
        (
            {source: len(bad[start : start + size])},
            [refusal(source, row, reason) for row in range(start, min(start + size, len(bad))) if bad[row]],
        )
        for start in range(0, len(bad), size)
    ]


def read_all(watch: RefusalWatch, blocks: Sequence[Block]) -> None:
    for block in blocks:
        watch.add(*block)
    watch.finish()


def test_a_bad_source_is_refused_within_its_first_thousand_rows_whatever_stands_beside_it() -> None:
    good = [blocks_of(source, [False] * 100_000) for source in (0, 1)]
    bad = blocks_of(2, [row % 20 == 0 for row in range(100_000)])  # 5%, five times the limit
    watch = RefusalWatch("train", ["a", "b", "c"], 0.01)
    with pytest.raises(DataError, match=r"13 of 250 rows read so far of c "):
        read_all(watch, list(itertools.chain.from_iterable(zip(*good, bad, strict=True))))
    assert watch.counts["c"].num_rows <= 1000


@pytest.mark.parametrize("num_rows", [60, 999, 1000, 1500, 20_000])
def test_at_the_end_the_share_of_each_source_decides_exactly(num_rows: int) -> None:
    allowed = num_rows * 2 // 100
    for num_bad in (allowed, allowed + 1):
        marks = [True] * num_bad + [False] * (num_rows - num_bad)
        random.Random(0).shuffle(marks)
        watch = RefusalWatch("train", ["a", "b"], 0.02)
        blocks = [*blocks_of(0, [False] * 50_000), *blocks_of(1, marks, size=num_rows)]
        if num_bad <= 0.02 * num_rows:
            read_all(watch, blocks)
        else:
            with pytest.raises(DataError, match=f"{num_bad:,} of {num_rows:,} rows.* of b "):
                read_all(watch, blocks)


def test_a_few_bad_rows_at_the_beginning_do_not_end_a_reading() -> None:
    read_all(
        RefusalWatch("train", ["a"], 0.01),
        blocks_of(0, [row < 10 for row in range(2000)], size=10),
    )


def test_files_of_one_name_are_one_source_and_names_are_judged_apart() -> None:
    marks = [row < 9 for row in range(300)]  # 3% of one file, 1% of all three
    blocks = [*blocks_of(0, [False] * 300), *blocks_of(1, marks), *blocks_of(2, [False] * 300)]
    read_all(RefusalWatch("train", ["all"] * 3, 0.01), blocks)
    with pytest.raises(DataError, match=r"9 of 300 rows of b \(3\.0%\)"):
        read_all(RefusalWatch("train", ["a", "b", "c"], 0.01), blocks)


def test_the_order_of_blocks_changes_neither_counts_nor_examples() -> None:
    blocks = [
        *blocks_of(0, [row % 40 == 7 for row in range(400)]),
        *blocks_of(1, [row % 90 == 8 for row in range(900)], reason="too-long"),
    ]
    said = set()
    for seed in range(5):
        random.Random(seed).shuffle(blocks)
        watch = RefusalWatch("train", ["a", "b"], 0.01)
        with pytest.raises(DataError) as error:
            read_all(watch, blocks)
        said.add((str(error.value), *watch.lines()))
    ((message, whole, *each),) = said
    assert "s0:8: bad-json here" in message
    assert whole == "train: 1,300 rows, 1,280 kept; refused: bad-json 10, too-long 10"
    assert each == [
        "  a: 400 rows, 390 kept; refused: bad-json 10",
        "  b: 900 rows, 890 kept; refused: too-long 10",
    ]


@pytest.mark.parametrize("reason", ["too-long", "excluded-prompt"])
def test_filtered_rows_are_never_held_against_their_source_unless_none_is_left(reason: str) -> None:
    marks = [row % 10 > 0 for row in range(3000)]
    read_all(RefusalWatch("train", ["a"], 0.0), blocks_of(0, marks, reason=reason))
    with pytest.raises(DataError, match=f"(?s)all 30 rows of a were refused.*{reason} x 30"):
        read_all(RefusalWatch("a", ["a"], 1.0), blocks_of(0, [True] * 30, reason=reason))


def test_rows_of_the_other_part_are_counted_apart_and_a_part_without_rows_is_an_error() -> None:
    watch = RefusalWatch("eval", ["a"], 0.01)
    watch.add({0: 1000}, [refusal(0, 3)], {0: 950})
    watch.finish()
    assert watch.lines() == ["eval: 1,000 rows, 49 kept, 950 of the other part; refused: bad-json 1"]
    watch = RefusalWatch("eval", ["a"], 0.01)
    watch.add({0: 1000}, [], {0: 1000})
    with pytest.raises(DataError, match=r"none of 1,000 rows.*eval_fraction"):
        watch.finish()


def test_the_message_has_three_reasons_with_a_place_and_the_others_in_numbers() -> None:
    reasons = ["bad-json"] * 5 + ["not-utf8"] * 4 + ["wrong-type"] * 3 + ["bad-roles"] * 2 + ["identical"]
    watch = RefusalWatch("train", ["a"], 0.01, "runs/first/quarantine.jsonl")
    with pytest.raises(DataError) as error:
        watch.add({0: 90}, [refusal(0, row, reason) for row, reason in enumerate(reasons)])
    assert str(error.value).splitlines() == [
        "15 of 90 rows read so far of a (16.7%) were refused, above `max_bad_row_fraction` (0.01); correct "
        "the rows, or raise it to go on without them",
        "  bad-json x 5, first: s0:1: bad-json here",
        "  not-utf8 x 4, first: s0:6: not-utf8 here",
        "  wrong-type x 3, first: s0:10: wrong-type here",
        "  and 2 more: bad-roles x 2, identical x 1",
        "  the refused rows: runs/first/quarantine.jsonl",
    ]


def test_a_source_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match=r"train \(a, b\) has no rows"):
        RefusalWatch("train", ["a", "b"], 0.01).finish()


@pytest.mark.parametrize("refused", [0, 1])
def test_the_file_aside_goes_with_its_owner_unless_it_holds_rows(refused: int) -> None:
    class Owner:
        pass

    owner = Owner()
    file = quarantine_aside(owner)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    write_quarantine(
        file, ["a.jsonl"], [Refusal(0, row, "empty", "it is empty", "{}") for row in range(refused)]
    )
    del owner
    assert file.exists() == file.parent.exists() == bool(refused)
    if refused:
        shutil.rmtree(file.parent)
