"""Rows of skipped steps stand in the quarantine beside refused ones, and each once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayrm.data.blocks import Refusal
from rayrm.data.quarantine import (
    drop_skipped,
    replace_refusals,
    skipped_lines,
    write_quarantine,
    write_skipped,
)


@pytest.fixture
def quarantine(tmp_path: Path) -> Path:
    path = tmp_path / "quarantine.jsonl"
    # U+2028 ends a line for str.splitlines, and for no reader of JSON lines.
    write_quarantine(path, ["a.jsonl"], [Refusal(0, 3, "bad-json", "a.jsonl:4: no JSON", "one\u2028two")])
    write_skipped(path, 4, ["a.jsonl:8"])
    write_skipped(path, 9, ["b.parquet[0]", "a.jsonl:1"])
    with path.open("a") as stream:
        stream.write('{"source": "a.jsonl", "reas')  # a kill
    return path


def entries(path: Path) -> list[tuple[str, int, str]]:
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [(line["source"], line["row"], line["reason"]) for line in lines]


def test_a_run_that_goes_on_drops_the_rows_of_steps_it_does_again(quarantine: Path) -> None:
    drop_skipped(quarantine, 4)
    kept = [("a.jsonl", 3, "bad-json"), ("a.jsonl", 7, "nonfinite-loss")]
    assert entries(quarantine) == kept
    drop_skipped(quarantine, 4)
    assert entries(quarantine) == kept
    drop_skipped(quarantine, 0)
    assert entries(quarantine) == kept[:1]


def test_the_lines_of_skipped_steps_are_told_from_refusals(quarantine: Path) -> None:
    found = [json.loads(line) for line in skipped_lines(quarantine)]
    assert [(line["step"], line["row"]) for line in found] == [(4, 7), (9, 0), (9, 0)]
    assert skipped_lines(quarantine.with_name("none")) == []


def test_a_new_start_s_refusals_take_the_place_of_the_earlier_one_s_but_for_streamed_rows(
    tmp_path: Path,
) -> None:
    kept, aside = tmp_path / "quarantine.jsonl", tmp_path / "aside.jsonl"
    again = Refusal(0, 3, "bad-json", "a.jsonl:4: no JSON", "{")
    write_quarantine(kept, ["a.jsonl"], [again])
    write_quarantine(kept, ["s.jsonl"], [Refusal(0, 5, "bad-json", "s.jsonl:6: no JSON", "{")])
    write_skipped(kept, 4, ["a.jsonl:8"])
    write_quarantine(aside, ["a.jsonl"], [again])
    replace_refusals(aside, kept, ["s.jsonl"])
    assert entries(kept) == [
        ("a.jsonl", 3, "bad-json"),
        ("s.jsonl", 5, "bad-json"),
        ("a.jsonl", 7, "nonfinite-loss"),
    ]


def test_no_refused_row_is_lost_while_rows_of_skipped_steps_are_dropped(tmp_path: Path) -> None:
    """A stream's dispatcher writes while a rank that goes on drops: two processes, one file."""
    path = tmp_path / "quarantine.jsonl"
    script = (
        "import sys; from pathlib import Path; from rayrm.data.blocks import Refusal\n"
        "from rayrm.data.quarantine import write_quarantine\n"
        "path = Path(sys.argv[1])\n"
        "for row in range(2000):\n"
        "    write_quarantine(path, ['a.jsonl'], [Refusal(0, row, 'bad-json', 'no JSON', '{')])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)]) as dispatcher:
        step = 0
        while dispatcher.poll() is None:
            step += 1
            write_skipped(path, step, ["a.jsonl:8"])
            drop_skipped(path, 0)
        assert dispatcher.returncode == 0
    assert step > 10
    assert entries(path) == [("a.jsonl", row, "bad-json") for row in range(2000)]
