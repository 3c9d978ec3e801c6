"""A row log tells what a model was trained on: every row of an epoch once, whatever happened between."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayrm.data.order import Cursor
from rayrm.train.row_log import RowLog, read_row_log
from tests.numerics.ranks import NUM_PAIRS, PAIRS_PER_STEP, Variant, run_variants, tokenized
from tests.numerics.test_soundness import POISON

STEPS_PER_EPOCH = 13
SETTINGS: dict[str, Any] = {
    "log_rows": True,
    "max_steps": 2 * STEPS_PER_EPOCH,
    "save_strategy": "steps",
    "save_steps": 5,
}
LONGEST = max(len(row.ids) for row in tokenized())
VARIANTS = [
    Variant("one", SETTINGS),
    # A budget of one pair: the shorter plan is filled up with dummies.
    Variant("two", SETTINGS, num_ranks=2, max_tokens=LONGEST),
    Variant("two_zero2", {**SETTINGS, "zero_stage": 2}, num_ranks=2),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    cut_off = [
        # In a step after the second checkpoint; fetches are counted, of which "two" makes four a step.
        replace(variant, name=f"{variant.name}_resumed", stop_in=55 if variant.name == "two" else 18)
        for variant in VARIANTS
    ]
    run_variants([*VARIANTS, *cut_off], root)
    return root


def rows_by_step(directory: Path) -> dict[int, set[str]]:
    steps: dict[int, set[str]] = {}
    for line in read_row_log(directory):
        steps.setdefault(line["step"], set()).update(line["rows"])
    return steps


@pytest.mark.parametrize("end", ["", "_resumed"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_an_epoch_trains_on_every_row_once(runs: Path, variant: Variant, end: str) -> None:
    lines = read_row_log(runs / f"{variant.name}{end}")
    assert len(lines) == 2 * STEPS_PER_EPOCH * variant.num_ranks
    for epoch in (0, 1):
        counts = Counter(name for line in lines if line["epoch"] == epoch for name in line["rows"])
        assert counts == {f"rows[{number}]": 1 for number in range(NUM_PAIRS)}


@pytest.mark.parametrize("name", ["one_resumed", "two", "two_resumed", "two_zero2_resumed"])
def test_steps_have_the_same_rows_however_they_were_shared_or_cut_off(runs: Path, name: str) -> None:
    whole = rows_by_step(runs / "one")
    assert {len(rows) for rows in whole.values()} == {PAIRS_PER_STEP, NUM_PAIRS % PAIRS_PER_STEP}
    assert rows_by_step(runs / name) == whole


def test_a_step_that_was_left_out_says_so(tmp_path: Path) -> None:
    rows = tokenized()
    rows[3 * PAIRS_PER_STEP].ids[-1] = POISON
    settings = {**SETTINGS, "shuffle": False, "nonfinite_loss": "skip", "max_steps": 6}
    run_variants([Variant("run", settings, poison=POISON)], tmp_path, rows)
    assert [line["step"] for line in read_row_log(tmp_path / "run") if "skipped" in line] == [4]


def write(directory: Path, rank: int, num_ranks: int, after: int, *steps: int) -> None:
    log = RowLog(directory, rank, num_ranks, active=True)
    log.begin(after)
    for step in steps:
        log.write(step, Cursor(0, step), [f"a.jsonl:{step}\u2028"], skipped=False)
    log.close()


def test_what_ranks_that_are_gone_did_beyond_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    for rank in range(3):
        write(tmp_path, rank, 3, 0, 1, 2, 3)
    with (tmp_path / "rows-2.jsonl").open("a") as torn:
        torn.write('{"step": 4, "ro')
    write(tmp_path, 0, 1, 2, 3)
    left = [
        (file.name[5], json.loads(line)["step"])
        for file in sorted(tmp_path.iterdir())
        for line in file.open()
    ]
    # Rank 1 would drop its own, were it there: the run has one rank now.
    assert left == [("0", 1), ("0", 2), ("0", 3), ("1", 1), ("1", 2), ("2", 1), ("2", 2)]


def test_a_run_that_begins_anew_has_no_rows_of_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 0, 1, 2)
    RowLog(tmp_path, 0, 1, active=False).begin(0)
    assert read_row_log(tmp_path) == []


def test_no_row_is_logged_unless_asked_for(tmp_path: Path) -> None:
    run_variants([Variant("run", {"max_steps": 2})], tmp_path)
    assert list((tmp_path / "run").glob("rows-*")) == []
