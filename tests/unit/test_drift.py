"""Drift: windows by their definition, and one warning for each change of state."""

from __future__ import annotations

import math
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrm.serve.drift import WINDOW, Distribution, ScoreWindow

STORED = Distribution(mean=2.0, std=0.5, count=256, source="probe.jsonl")
FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 7))
def test_each_window_is_read_once_however_the_scores_come(scores, size, per_call) -> None:
    window = ScoreWindow(STORED, size)
    readings = [
        reading
        for at in range(0, len(scores), per_call)
        for reading in window.add(scores[at : at + per_call])
    ]
    windows = [scores[at : at + size] for at in range(0, len(scores) - size + 1, size)]
    assert [reading.count for reading in readings] == [size] * len(windows)
    for reading, inside in zip(readings, windows, strict=True):
        mean, std = statistics.fmean(inside), statistics.pstdev(inside)
        # 1e6 is the largest score, and a float64 holds 16 digits.
        assert reading.mean == pytest.approx(mean, rel=1e-9, abs=1e-8)
        assert reading.std == pytest.approx(std, rel=1e-6, abs=1e-6)
        assert reading.shift == pytest.approx((mean - 2.0) / 0.5, rel=1e-6, abs=1e-6)
        assert reading.std_ratio == pytest.approx(std / 0.5, rel=1e-6, abs=1e-5)
    assert window.reading == (readings[-1] if readings else None)


def test_a_small_spread_around_a_large_mean_is_not_lost() -> None:
    scores = [1e8 + offset for offset in (-1.0, 1.0) * 512]
    assert Distribution.of(scores, "x").std == pytest.approx(1.0, rel=1e-6)
    assert Distribution.of(scores, "x").count == WINDOW


def around(mean: float, std: float) -> list[float]:
    """A window of four scores with this mean and standard deviation."""
    return [mean - std, mean + std] * 2


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        (2.0, 0.5, None),
        (2.49, 0.5, None),
        (1.51, 0.98, None),
        (2.0, 0.26, None),
        (2.51, 0.5, r"mean \(2\.51\) is 1\.0 standard deviations above that at publication \(2\)"),
        (1.0, 0.5, r"mean \(1\) is 2\.0 standard deviations below"),
        (2.0, 1.01, r"standard deviation \(1\.01\) is 2\.02 times that at publication \(0\.5\)"),
        (2.0, 0.24, r"standard deviation \(0\.24\) is 0\.48 times"),
        (9.0, 0.0, r"14\.0 standard deviations above .* and their standard deviation \(0\) is 0\.00 times"),
    ],
)
def test_a_window_is_warned_of_beyond_one_standard_deviation_or_twice_the_spread(
    mean: float, std: float, said: str | None
) -> None:
    window = ScoreWindow(STORED, 4)
    assert window.warning() is None
    window.add(around(mean, std))
    warning = window.warning()
    if said is None:
        assert warning is None
    else:
        assert warning is not None
        assert re.search(said, warning)
        assert "256 texts of probe.jsonl" in warning


def test_a_change_of_state_is_said_once() -> None:
    window = ScoreWindow(STORED, 4)
    said = []
    for mean, std in [(2, 0.5), (3, 0.5), (3.2, 0.5), (3, 2), (3, 2), (2, 0.5), (3, 0.5), (1, 0.5)]:
        window.add(around(mean, std))
        said.append(window.warning() is not None)
        assert window.warning() is None
    assert said == [False, True, False, True, False, False, True, True]


def test_without_a_stored_distribution_windows_are_measured_and_never_warned_of() -> None:
    window = ScoreWindow(Distribution.stored({"name": "reward"}), 4)
    (reading,) = window.add(around(1e6, 3.0))
    assert (reading.mean, reading.std, reading.shift, reading.std_ratio) == (1e6, 3.0, None, None)
    assert window.warning() is None


def test_what_is_stored_is_read_back() -> None:
    stored = {"mean": 1.5, "std": math.pi, "count": 3, "source": "x.jsonl"}
    assert Distribution.stored({"distribution": stored}) == Distribution(1.5, math.pi, 3, "x.jsonl")
