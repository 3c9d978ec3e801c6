"""Running moments: those of the values themselves, whatever way they came in."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import pickle
import statistics
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from rayrm.errors import ConfigError, ScoreError
from rayrm.rl.moments import Moments, RunningMoments


def test_mean_and_standard_deviation_are_those_of_all_values() -> None:
    running = RunningMoments()
    assert running.update([2.0, 4.0]) == Moments(2, 3.0, 2.0)
    seen = running.update([9.0])
    assert (seen.count, seen.mean) == (3, 5.0)
    assert seen.squares == pytest.approx(9 + 1 + 16)
    assert seen.std == pytest.approx(statistics.pstdev([2.0, 4.0, 9.0]))
    assert running.current is seen


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_batches_of_any_sizes_merge_to_the_single_stream(offset: float) -> None:
    """Exact sums are the reference. On a mean of 1e8 the difference of two sums of squares would be noise."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=1000) + offset).tolist()
    cuts = sorted(rng.integers(0, 1000, size=20).tolist())
    running = RunningMoments()
    for start, stop in zip([0, *cuts], [*cuts, 1000], strict=True):
        running.update(values[start:stop])
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / 1000
    variance = sum((value - mean) ** 2 for value in exact) / 1000
    assert running.current.count == 1000
    assert running.current.mean == pytest.approx(float(mean), rel=1e-12, abs=1e-12)
    assert running.current.std == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_no_values_change_nothing_and_have_no_spread() -> None:
    assert Moments.of([]) == Moments(0, 0.0, 0.0)
    assert Moments().std == 0.0
    some = Moments.of([1.0, 2.0])
    assert some.merge(Moments()) is some
    assert Moments().merge(some) is some
    running = RunningMoments()
    running.update([1.0, 2.0])
    assert running.update([]) == some


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_and_not_counted(bad: float) -> None:
    running = RunningMoments()
    before = running.update([1.0, 5.0])
    with pytest.raises(ScoreError, match=r"score 1 of 3 is (nan|-?inf)"):
        running.update([0.0, bad, 2.0])
    assert running.current == before


def test_what_was_counted_is_restored_bit_by_bit() -> None:
    whole, first = RunningMoments(), RunningMoments()
    batches = np.random.default_rng(1).normal(3.0, 0.1, size=(6, 7)).tolist()
    for batch in batches:
        whole.update(batch)
    for batch in batches[:3]:
        first.update(batch)
    restored = RunningMoments()
    restored.load_state_dict(json.loads(json.dumps(first.state_dict())))
    copies = [restored, pickle.loads(pickle.dumps(first)), copy.deepcopy(first)]
    for one in copies:
        for batch in batches[3:]:
            one.update(batch)
        assert one.current == whole.current
    assert first.current != whole.current


def test_what_is_no_state_is_refused() -> None:
    for state in (
        {},
        {"count": 1, "mean": "x", "squares": 0.0},
        {"count": None, "mean": 0.0, "squares": 0.0},
    ):
        with pytest.raises(ConfigError, match="must be what `state_dict"):
            RunningMoments().load_state_dict(state)  # type: ignore[arg-type]


def test_the_async_call_counts_alike() -> None:
    running = RunningMoments()
    assert asyncio.run(running.update_async([2.0, 4.0])) == Moments(2, 3.0, 2.0)
    asyncio.run(running.give_up_async())
    running.give_up()
    assert running.current == Moments(2, 3.0, 2.0)


def test_a_process_without_torch_loads_none() -> None:
    code = (
        "import sys\nfrom rayrm.rl.shaping import Shaper, Shaping\n"
        "from rayrm.serve.request import ScoreResult\n"
        "print(Shaper(Shaping(normalize=True)).shape(ScoreResult([1.0, 3.0], 'v')), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[-1.0, 1.0] False"), ran.stderr
