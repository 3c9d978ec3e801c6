"""Ensembles: what is combined, by its definition, and which settings cannot be meant."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from rayrm.errors import ConfigError
from rayrm.serve.ensemble import combine
from rayrm.serve_settings import Ensemble

SCORES = [[1.0, -2.0, 0.5], [4.0, -2.0, 0.0], [1.0, -2.0, -3.5]]
# Three members: mean 2, deviations -1, 2, -1; all alike; mean -1, deviations 1.5, 1, -2.5.
MEAN = [2.0, -2.0, -1.0]
SPREAD = [math.sqrt(6 / 3), 0.0, math.sqrt((1.5**2 + 1 + 2.5**2) / 3)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reduce": "mean"}, MEAN),
        ({"reduce": "min"}, [1.0, -2.0, -3.5]),
        ({"reduce": "mean-std"}, [m - s for m, s in zip(MEAN, SPREAD, strict=True)]),
        ({"reduce": "mean-std", "k": 2.5}, [m - 2.5 * s for m, s in zip(MEAN, SPREAD, strict=True)]),
        ({"reduce": "mean-std", "k": 0}, MEAN),
    ],
)
def test_scores_are_combined_by_their_definition_and_the_spread_is_told(
    settings: dict[str, Any], expected: list[float]
) -> None:
    scores, spread = combine(Ensemble(members=["a", "b", "c"], **settings), SCORES)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert spread == pytest.approx(SPREAD, abs=1e-12)
    assert {type(value) for value in (*scores, *spread)} == {float}


def test_no_texts_have_no_scores() -> None:
    assert combine(Ensemble(members=["a", "b"]), [[], []]) == ([], [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": ["a"]}, "`members`.*at least 2"),
        ({"members": []}, "`members`.*at least 2"),
        ({"members": ["a", "b", "a"]}, "'a' stands there twice"),
        ({"members": ["a", " "]}, "is no name"),
        ({"members": ["a", "b"], "reduce": "mean-std", "k": -1}, r"`k` \(-1"),
        ({"members": ["a", "b"], "reduce": "min", "k": 2}, '`k` \\(2\\) is for `reduce` "mean-std"'),
        ({"members": ["a", "b"], "reduce": "median"}, "`reduce`"),
        ({"members": ["a", "b"], "reduces": "min"}, "Did you mean `reduce`"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ensemble(**settings)


def test_an_ensemble_does_not_change() -> None:
    ensemble = Ensemble(members=["a", "b"], reduce="mean-std", k="0.5")  # type: ignore[arg-type]
    assert ensemble.k == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        ensemble.k = 2.0  # type: ignore[misc]
