"""What is said of planted models: one that scores by length, one that never saw it, a mixture, and chance."""

from __future__ import annotations

import numpy as np
import pytest

from rayrm.metrics.evaluation import evaluate_scores
from rayrm.metrics.intervals import wilson_interval
from rayrm.metrics.length_bias import (
    accuracy_by_length,
    length_controlled_accuracy,
    length_controlled_margin,
    length_correlation,
    length_findings,
    length_margin_correlation,
    length_metrics,
    length_rank_correlation,
    weighted_ranks,
)
from rayrm.metrics.outcomes import Outcomes, outcomes_of
from tests.planted import Floats, outcomes_with
from tests.unit.test_metrics import index_of

NUM = 20_000


def lengths_of(rng: np.random.Generator, num: int = NUM, longer_by: float = 0.3) -> tuple[Floats, Floats]:
    """Lengths of winners and others, log-normal; winners are longer by a factor of e^longer_by on average."""
    won = np.exp(rng.normal(5 + longer_by, 0.6, num)).astype(np.int64) + 1
    lost = np.exp(rng.normal(5, 0.6, num)).astype(np.int64) + 1
    return won, lost


def scored(rng: np.random.Generator, skill: float, of_length: float, noise: float = 1.0) -> Outcomes:
    """Scores of `of_length` a token, of `skill` for the winner, and of noise."""
    won_length, lost_length = lengths_of(rng)
    won = skill + of_length * won_length + rng.normal(0, noise, NUM)
    lost = of_length * lost_length + rng.normal(0, noise, NUM)
    return outcomes_with(won, lost=lost, won_length=won_length, lost_length=lost_length)


def plain_accuracy(outcomes: Outcomes) -> float:
    return float((outcomes.margin > 0).mean())


@pytest.mark.parametrize(
    "curve",
    [lambda n: n / 50, lambda n: -n / 50, np.log, lambda n: 3 * n / 500 + np.log(n)],
    ids=["longer", "shorter", "log", "both"],
)
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_score_of_length_alone_is_at_50_percent_and_flagged(curve, kind) -> None:  # type: ignore[no-untyped-def]
    won_length, lost_length = lengths_of(np.random.default_rng(0))
    won, lost = curve(won_length.astype(kind)).astype(kind), curve(lost_length.astype(kind)).astype(kind)
    outcomes = outcomes_with(won, lost=lost, won_length=won_length, lost_length=lost_length)
    controlled = length_controlled_accuracy(outcomes)
    assert controlled is not None
    assert controlled.share == pytest.approx(0.5, abs=1e-3)
    assert abs(length_rank_correlation(outcomes) or 0) == pytest.approx(1, abs=1e-3)
    assert abs(length_margin_correlation(outcomes) or 0) > 0.8
    said = length_findings(outcomes)
    assert any(one.startswith("Scores follow length") for one in said)
    assert any("preferred whether it is right or not" in one for one in said)


def test_noisy_length_is_at_50_percent_too() -> None:
    outcomes = scored(np.random.default_rng(1), skill=0, of_length=0.02)
    assert plain_accuracy(outcomes) > 0.6
    controlled = length_controlled_accuracy(outcomes)
    assert controlled is not None
    assert controlled.low < 0.5 < controlled.high


def test_a_model_that_never_saw_the_length_keeps_its_accuracy_where_winners_are_longer() -> None:
    """A fit without the term for skill would take some of it for length's: 2 points here."""
    outcomes = scored(np.random.default_rng(2), skill=1.0, of_length=0)
    controlled = length_controlled_accuracy(outcomes)
    assert controlled is not None
    assert controlled.share == pytest.approx(plain_accuracy(outcomes), abs=0.003)
    assert length_margin_correlation(outcomes) == pytest.approx(0, abs=0.03)
    assert length_findings(outcomes) == []


def test_of_a_mixture_the_part_without_length_is_left() -> None:
    """skill + noise alone wins with Phi(1 / sqrt 2) = 0.760; skill, noise and length with more."""
    outcomes = scored(np.random.default_rng(3), skill=1.0, of_length=0.02)
    controlled = length_controlled_accuracy(outcomes)
    assert controlled is not None
    assert controlled.share == pytest.approx(0.7602, abs=0.01)
    assert abs(plain_accuracy(outcomes) - 0.7602) > 0.02
    assert not any(one.startswith("Scores follow length") for one in length_findings(outcomes))


def test_chance_stays_chance_and_is_not_called_length() -> None:
    outcomes = scored(np.random.default_rng(4), skill=0, of_length=0)
    controlled = length_controlled_accuracy(outcomes)
    assert controlled is not None
    assert controlled.low < 0.5 < controlled.high
    (only,) = length_findings(outcomes)
    assert 'not above that of "the longer one wins"' in only


def test_length_control_is_the_same_whichever_side_is_called_winner_first() -> None:
    """To exchange both sides of everything turns every margin round."""
    rng = np.random.default_rng(5)
    one = scored(rng, skill=0.5, of_length=0.01)
    other = outcomes_with(one.lost, lost=one.won, won_length=one.lost_length, lost_length=one.won_length)
    first, second = length_controlled_margin(one), length_controlled_margin(other)
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first, -second, atol=1e-9)


def test_a_weight_of_two_is_the_comparison_twice() -> None:
    rng = np.random.default_rng(6)
    one = scored(rng, skill=0.5, of_length=0.01).take(np.arange(200))
    twice = one.take(np.concatenate([np.arange(200), np.arange(50)]))
    weight = np.ones(200)
    weight[:50] = 2
    heavy = outcomes_with(
        one.won, lost=one.lost, won_length=one.won_length, lost_length=one.lost_length, weight=weight
    )
    for figure in (length_correlation, length_rank_correlation, length_margin_correlation):
        assert figure(heavy) == pytest.approx(figure(twice), abs=1e-12)
    first, second = length_controlled_accuracy(heavy), length_controlled_accuracy(twice)
    assert first is not None
    assert second is not None
    assert first.share == pytest.approx(second.share, abs=1e-12)


def test_correlations_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(7)
    outcomes = scored(rng, skill=0.5, of_length=0.01).take(np.arange(300))
    scores = np.concatenate([outcomes.won, outcomes.lost])
    lengths = np.concatenate([outcomes.won_length, outcomes.lost_length])
    assert length_correlation(outcomes) == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    by_length = outcomes.won_length - outcomes.lost_length
    assert length_margin_correlation(outcomes) == pytest.approx(np.corrcoef(outcomes.margin, by_length)[0, 1])

    def mean_ranks(of: Floats) -> list[float]:
        return [float((of < one).sum() + ((of == one).sum() + 1) / 2) for one in of]

    spearman = np.corrcoef(mean_ranks(scores), mean_ranks(lengths))[0, 1]
    assert length_rank_correlation(outcomes) == pytest.approx(spearman)
    np.testing.assert_allclose(weighted_ranks(lengths, np.ones(600)), np.array(mean_ranks(lengths)) - 0.5)


def test_accuracy_by_length_counts_each_kind_by_itself() -> None:
    outcomes = outcomes_with(
        [1, 1, -1, 1, 0, -1],
        won_length=np.array([9, 9, 9, 5, 5, 7]),
        lost_length=np.array([5, 5, 5, 9, 9, 7]),
    )
    by_length = accuracy_by_length(outcomes)
    found = {name: (one.share, one.low, one.high, one.num_pairs) for name, one in by_length.items()}
    assert found["longer"] == pytest.approx((2 / 3, *wilson_interval(2, 3), 3))
    assert found["shorter"] == pytest.approx((1 / 2, *wilson_interval(1, 2), 2))
    assert found["equal"] == pytest.approx((0, *wilson_interval(0, 1), 1))


def test_a_model_that_scores_by_length_is_as_good_as_the_length_baseline() -> None:
    won_length, lost_length = (one[:400] for one in lengths_of(np.random.default_rng(8)))
    both = np.stack([won_length, lost_length], axis=1)
    lengths = both.ravel()
    index = index_of([[0, 1]] * 400, lengths=both.tolist())
    figures = evaluate_scores(lengths.astype(np.float64), index)
    by_length = outcomes_of(lengths.astype(np.float64), index)
    equal = float((won_length == lost_length).mean())
    assert figures["accuracy"] == pytest.approx(figures["length_baseline_accuracy"] - equal / 2)
    assert plain_accuracy(by_length) == pytest.approx(figures["accuracy"])


@pytest.mark.parametrize(
    "outcomes",
    [
        outcomes_with([]),
        outcomes_with([1.0]),
        outcomes_with(np.zeros(50)),
        outcomes_with(np.arange(50.0)),
        outcomes_with(np.arange(50.0), won_length=np.full(50, 12)),
        outcomes_with(np.ones(50), won_length=np.arange(50), lost_length=np.arange(50)),
        outcomes_with(np.ones(50), won_length=np.arange(50)),
    ],
    ids=["none", "one", "equal", "one length", "always longer", "equal lengths", "one margin"],
)
def test_what_does_not_exist_is_absent_and_nothing_is_nan(outcomes: Outcomes) -> None:
    figures = length_metrics(outcomes)
    assert all(np.isfinite(one) for one in figures.values())
    assert "num_chosen_shorter" not in figures or (outcomes.won_length < outcomes.lost_length).any()
    constant = np.ptp(outcomes.won_length - outcomes.lost_length) == 0 if len(outcomes.row) else True
    assert ("length_controlled_accuracy" in figures) != constant
    assert isinstance(length_findings(outcomes), list)


def test_where_the_longer_side_always_wins_accuracy_is_not_called_skill() -> None:
    rng = np.random.default_rng(4)
    lost_length = rng.integers(10, 60, 200)
    won_length = lost_length + rng.integers(1, 20, 200)
    outcomes = outcomes_with(rng.normal(5, 0.5, 200), won_length=won_length, lost_length=lost_length)
    (said,) = [one for one in length_findings(outcomes) if "the longer one wins" in one]
    assert "not above" in said
    assert "cannot be told from length" in said
    won_length[:3], lost_length[:3] = lost_length[:3].copy(), won_length[:3].copy()
    outcomes = outcomes_with(rng.normal(5, 0.5, 200), won_length=won_length, lost_length=lost_length)
    (said,) = [one for one in length_findings(outcomes) if "the longer one wins" in one]
    assert "not clearly above" in said
