"""What a record says of speed is the steps' alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from rayrm.data.order import Cursor
from rayrm.data.packing import pack_rows
from rayrm.train.checkpoint import TrainState
from rayrm.train.loop import Events, RankStep, Record, Schedule, run_loop
from tests.numerics.ranks import tokenized
from tests.unit.test_engine import engine_of


@dataclass
class Time:
    """A clock that stands still unless something says how long it took."""

    seconds: float = 100.0

    def now(self) -> float:
        return self.seconds

    def takes(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.mark.parametrize("log_every", [1, 3])
def test_speed_leaves_evaluation_and_saving_out(log_every: int) -> None:
    time = Time()
    rows = tokenized(4)

    def steps() -> Iterator[RankStep]:
        for number in range(1, 7):
            time.takes(0.5)
            yield RankStep(
                [pack_rows(rows, 0)],
                4,
                120,
                Cursor(0, number),
                row_names=[["a", "b", "c", "d"]],
                pack_alone=lambda _, row: pack_rows([rows[row]], 0),
            )

    records: list[Record] = []
    run_loop(
        engine_of(),
        steps(),
        Schedule(6, 6, log_every=log_every, evaluate_every=1, save_every=2),
        TrainState(),
        Events(
            progress=lambda step: time.takes(1.5),
            log=records.append,
            evaluate=lambda state: time.takes(1000),
            save=lambda state: time.takes(3000),
        ),
        now=time.now,
    )
    assert len(records) == 6 // log_every
    for record in records:
        # A step takes half a second of waiting and one and a half of computing.
        assert record["pairs_per_second"] == pytest.approx(4 / 2)
        assert record["tokens_per_second"] == pytest.approx(120 / 2)
        assert record["data_wait_s"] == pytest.approx(0.5 * log_every)
