"""Shaping: each step against numbers by hand, their order, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import pickle
from typing import Any

import pytest

from rayrm.errors import ConfigError, ScoreError
from rayrm.rl.moments import Moments
from rayrm.rl.shaping import (
    Shaper,
    Shaping,
    calibrated,
    clipped,
    length_penalized,
    normalized,
    pessimistic,
    squashed,
    weighted,
)
from rayrm.serve.request import ScoreResult

CALIBRATION = {"chat": (1.0, 2.0), "code": (-3.0, 0.5)}


def answer(scores: list[float], **fields: Any) -> ScoreResult:
    return ScoreResult(scores, "v1", "reward", **fields)


def shaped(scores: list[float], settings: dict[str, Any], result: dict[str, Any] | None = None, **more: Any):  # type: ignore[no-untyped-def]
    return Shaper(Shaping(**settings)).shape(answer(scores, **(result or {})), **more)


def test_nothing_is_done_by_default() -> None:
    assert shaped([1.5, -700.0, 0.0], {}) == [1.5, -700.0, 0.0]
    assert Shaper().moments is None
    assert Shaper().shape(answer([])) == []
    off = {"pessimism": 0, "calibrate": "none", "clip": "none", "squash": "none", "length_penalty": 0}
    assert Shaping(**off) == Shaping()


def test_pessimism_takes_off_k_standard_deviations_of_the_members() -> None:
    assert pessimistic([1.0, 2.0], [0.5, 3.0], 2.0) == [0.0, -4.0]
    assert shaped([1.0, 2.0], {"pessimism": 0.5}, {"spread": [0.5, 3.0]}) == [0.75, 0.5]


def test_calibration_is_by_the_data_set_of_each_row() -> None:
    assert calibrated([1.0, 5.0, -3.5], ["chat", "chat", "code"], CALIBRATION) == [0.0, 2.0, -1.0]
    one = shaped([1.0, 5.0], {"calibrate": "code"}, {"calibration": CALIBRATION})
    assert one == [8.0, 16.0]
    by_row = shaped(
        [5.0, -3.5], {"calibrate_column": "kind"}, {"calibration": CALIBRATION}, datasets=["chat", "code"]
    )
    assert by_row == [2.0, -1.0]


def test_normalization_is_by_all_scores_so_far_this_call_included() -> None:
    shaper = Shaper(Shaping(normalize=True))
    assert shaper.shape(answer([2.0, 4.0])) == [-1.0, 1.0]
    # 2, 4, 9: mean 5, squared deviations 9 + 1 + 16.
    assert shaper.shape(answer([9.0])) == pytest.approx([4 / math.sqrt(26 / 3)])
    assert shaper.moments == Moments(3, 5.0, pytest.approx(26.0))
    assert shaper.shape(answer([])) == []
    assert normalized([7.0], Moments(3, 5.0, 12.0)) == [1.0]


@pytest.mark.parametrize("level", [0.0, 0.1, -0.3, 1e6])
def test_scores_without_spread_are_worth_nothing_and_not_noise(level: float) -> None:
    """Sums of equal numbers round: 0.1 thirty times has a spread of 1e-17, and one to divide by."""
    assert shaped([level] * 30, {"normalize": True}) == [0.0] * 30
    assert shaped([level], {"normalize": True}) == [0.0]
    noisy = [level * (1 + sign * 1e-7) for sign in (-1, 1)] * 15
    assert shaped(noisy, {"normalize": True}) == [0.0] * 30


def test_clipping_is_symmetric_and_keeps_what_is_within() -> None:
    assert clipped([-9.0, -2.5, 0.1, 2.6], 2.5) == [-2.5, -2.5, 0.1, 2.5]
    assert shaped([-9.0, 1.0], {"clip": 2}) == [-2.0, 1.0]


def test_squashing_is_the_function_it_is_called_by() -> None:
    assert squashed([0.0, math.log(3.0), -math.log(3.0)], "sigmoid") == pytest.approx([0.5, 0.75, 0.25])
    assert squashed([0.0, 0.5 * math.log(3.0)], "tanh") == pytest.approx([0.0, 0.5])
    assert squashed([-1e30, 1e30], "sigmoid") == [0.0, 1.0]
    assert squashed([-1e30, 1e30], "tanh") == [-1.0, 1.0]


def test_the_length_penalty_counts_tokens_beyond_the_free_ones() -> None:
    assert length_penalized([1.0, 1.0, 1.0], [9, 10, 14], 0.25, 10) == [1.0, 1.0, 0.0]
    assert shaped([1.0], {"length_penalty": 0.25}, lengths=[4]) == [0.0]


def test_the_steps_are_taken_in_their_order() -> None:
    """Every two neighbours would give other numbers the other way round."""
    everything = {
        "calibrate": "chat", "normalize": True, "clip": 0.5, "squash": "sigmoid",
        "length_penalty": 0.1, "length_free": 2,
    }  # fmt: skip
    shaper = Shaper(Shaping(**everything))
    rewards = shaper.shape(answer([1.0, 5.0, 5.0, 9.0], calibration=CALIBRATION), lengths=[1, 2, 3, 12])
    # Calibrated: 0, 2, 2, 4, of mean 2 and variance 2; normalized: -1.41, 0, 0, 1.41; clipped to 0.5.
    low, high = 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))
    assert rewards == pytest.approx([low, 0.5, 0.4, high - 1.0])
    assert shaper.moments == Moments(4, 2.0, 8.0)
    pessimist = Shaper(Shaping(pessimism=1.0, normalize=True))
    assert pessimist.shape(answer([3.0, 3.0], spread=[2.0, 0.0])) == [-1.0, 1.0]
    assert pessimist.moments == Moments(2, 2.0, 2.0)


def test_the_async_twin_gives_the_same() -> None:
    settings = Shaping(normalize=True, clip=1, length_penalty=0.5, length_free=1)
    one, other = Shaper(settings), Shaper(settings)
    for scores in ([2.0, 4.0, -8.0], [1.0], []):
        lengths = list(range(len(scores)))
        found = asyncio.run(other.shape_async(answer(scores), lengths=lengths))
        assert found == one.shape(answer(scores), lengths=lengths)
    assert other.moments == one.moments
    with pytest.raises(ScoreError, match="score 0 of 1 is nan"):
        asyncio.run(other.shape_async(answer([math.nan])))


def test_a_shaper_goes_on_where_it_was_saved() -> None:
    settings = Shaping(normalize=True)
    whole, first = Shaper(settings), Shaper(settings)
    for shaper in (whole, first):
        shaper.shape(answer([0.1, 0.7, 5.0]))
    resumed = Shaper(settings)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    then = whole.shape(answer([3.0, 0.2]))
    assert resumed.shape(answer([3.0, 0.2])) == then
    assert pickle.loads(pickle.dumps(first)).shape(answer([3.0, 0.2])) == then
    assert Shaper(settings).shape(answer([3.0, 0.2])) != then
    plain = Shaper()
    assert plain.state_dict() == {}
    plain.load_state_dict({})
    with pytest.raises(ConfigError, match="`normalize` was set where this state was saved"):
        plain.load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match="`normalize` was not set where this state was saved"):
        resumed.load_state_dict({})


def refused(
    match: str, error: type[Exception], settings: dict[str, Any], result: dict[str, Any], **more: Any
) -> None:
    shaper = Shaper(Shaping(**{"normalize": True, **settings}))
    with pytest.raises(error, match=match):
        shaper.shape(dataclasses.replace(answer([1.0, 2.0]), **result), **more)
    assert shaper.moments == Moments(), "what was refused must not be counted"


def test_an_answer_that_a_setting_cannot_be_honoured_with_is_refused() -> None:
    refused("'reward' is a single model", ConfigError, {"pessimism": 1}, {})
    ensemble = {"spread": [0.1, 0.2], "model": "both"}
    refused("'both' is an ensemble", ConfigError, {"calibrate": "chat"}, ensemble)
    chat = {"calibrate": "chat"}
    refused(
        r"version v1 of 'reward' .* 'chat'\. It has none\. .*--calibrate chat=FILE", ConfigError, chat, {}
    )
    known = {"calibration": CALIBRATION}
    typo = {"calibrate": "chatt"}
    refused(r"It has: chat, code\. Did you mean `chat`\?", ConfigError, typo, known)
    column = {"calibrate_column": "kind"}
    refused(r"`calibrate_column` \('kind'\): .* no such column", ConfigError, column, known)
    refused("column `kind` has 1 entries for 2", ScoreError, column, known, datasets=["chat"])
    refused("without a calibration 'math'", ConfigError, column, known, datasets=["chat", "math"])
    refused("gives no `completion_ids`", ConfigError, {"length_penalty": 1}, {})
    refused("1 lengths for 2 completions", ScoreError, {"length_penalty": 1}, {}, lengths=[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_by_its_place(bad: float) -> None:
    refused("score 1 of 2 is", ScoreError, {}, {"scores": [0.0, bad]})
    refused("spread 0 of 2 is", ScoreError, {"pessimism": 1}, {"spread": [bad, 0.0]})
    with pytest.raises(ScoreError, match=r"reward `a` 1 of 2 is"):
        weighted({"a": [0.0, bad]}, {"a": 1.0})
    with pytest.raises(ConfigError, match=r"weight `a` \((nan|inf)\)"):
        weighted({"a": [0.0]}, {"a": bad})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"clip": 0}, r"`clip` \(0\)"),
        ({"clip": -1}, r"`clip` \(-1\)"),
        ({"pessimism": -1}, r"`pessimism` \(-1\)"),
        ({"length_penalty": -0.1}, r"`length_penalty` \(-0\.1\)"),
        ({"squash": "relu"}, r"`squash` \('relu'\): .*'sigmoid' or 'tanh'"),
        ({"clip": math.nan}, r"`clip` \(nan\)"),
        ({"calibrate": "a", "calibrate_column": "b"}, "Delete one of the two"),
        ({"calibrate": "a", "pessimism": 1}, "only a single model has a calibration"),
        ({"length_free": 10}, "no token costs anything"),
        ({"normalise": True}, r"Did you mean `normalize`\?"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Shaping(**settings)


def test_several_rewards_are_added_up_by_their_weights() -> None:
    rewards = {"helpful": [1.0, 2.0], "safe": [10.0, -4.0]}
    assert weighted(rewards, {"safe": -0.5, "helpful": 2.0}) == [-3.0, 6.0]
    assert weighted(rewards, {"safe": 0, "helpful": 1}) == [1.0, 2.0]
    for wrong, match in (
        ({"helpful": 1.0}, "reward `safe` has no weight"),
        ({"helpful": 1.0, "safe": 1.0, "save": 1.0}, r"weight `save`: .*Did you mean `safe`\?"),
    ):
        with pytest.raises(ConfigError, match=match):
            weighted(rewards, wrong)
    with pytest.raises(ScoreError, match=r"\{'helpful': 2, 'safe': 1\}"):
        weighted({"helpful": [1.0, 2.0], "safe": [1.0]}, {"helpful": 1.0, "safe": 1.0})
    with pytest.raises(ConfigError, match="nothing to add up"):
        weighted({}, {})
