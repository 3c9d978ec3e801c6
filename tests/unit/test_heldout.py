"""The gain between two policies: by hand, and its interval in simulation."""

from __future__ import annotations

import numpy as np
import pytest

from rayrm.rl.heldout import paired_gain


def test_a_gain_by_hand() -> None:
    gain = paired_gain([[1.0, 3.0], [0.0, 0.0]], [[4.0, 4.0], [1.0, 3.0]])
    assert (gain.before, gain.after, gain.gain) == (1.0, 3.0, 2.0)
    assert (gain.low, gain.high) == (2.0, 2.0)  # both prompts gained 2
    assert (gain.num_samples, gain.num_prompts) == (4, 2)
    with pytest.raises(ValueError, match="2 and 1 prompts"):
        paired_gain([[1.0], [2.0]], [[1.0]])


def test_prompts_are_paired_and_drawn_whole() -> None:
    """Prompts differ by far more than policies: unpaired, a gain of 0.5 would drown; and many samples of one
    prompt are no more than one prompt."""
    rng = np.random.default_rng(0)
    level = rng.normal(0, 50, size=60)
    before = [[x + rng.normal() for _ in range(2)] for x in level]
    after = [[x + 0.8 + rng.normal() for _ in range(2)] for x in level]
    gain = paired_gain(before, after)
    assert 0 < gain.low < gain.gain < gain.high
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * 1.0 / np.sqrt(60), rel=0.25)
    one = paired_gain([[0.0] * 1000, [0.0] * 1000], [[0.0] * 1000, [1.0] * 1000])
    assert (one.low, one.high) == (0.0, 1.0)


def test_the_interval_covers_no_gain_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        first, second = rng.normal(size=(2, 64, 2))
        gain = paired_gain(first.tolist(), second.tolist())
        covered += gain.low <= 0 <= gain.high
    assert 0.90 <= covered / 300 <= 0.98
