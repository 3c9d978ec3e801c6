"""What a log of several ranks says of all their scores."""

from __future__ import annotations

import numpy as np
import pytest

from rayrm.rl.run_log import over_all_ranks
from rayrm.rl.trl import SQUARE


def test_the_deviation_is_that_of_all_scores_and_not_the_mean_of_the_ranks() -> None:
    ranks = np.array([[0.0, 1.0, 2.0], [7.0, 8.0, 12.0]])
    logged = {
        "a/score_mean": ranks.mean(axis=1).mean(),
        "a/score_std": ranks.std(axis=1).mean(),
        f"a/{SQUARE}": np.square(ranks).mean(axis=1).mean(),
        "reward": 3.0,
    }
    found = over_all_ranks(logged)
    assert found == {"a/score_mean": 5.0, "a/score_std": pytest.approx(ranks.std()), "reward": 3.0}
    assert found["a/score_std"] > 2 * logged["a/score_std"]
