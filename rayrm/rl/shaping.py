"""Scores -> rewards: what is done to a reward model's scores before a policy is trained on them.

Whatever is set is done in this order, and each step sees what the one before left:
1. `pessimism`: an ensemble's score less `k` times its members' spread;
2. `calibrate`: zero and unit of a data set, as they were stored when the version that answered was published;
3. `normalize`: zero and unit of all scores so far, over all ranks;
4. `clip`: the reward stays within a bound;
5. `squash`: the reward approaches a bound;
6. `length_penalty`: taken off for each token beyond a length, last, so that no bound hides it.
`weighted` then adds up several rewards. Nothing is set by default: a reward is the score.

A constant that is taken off and a positive factor cancel where rewards are compared within a group and
divided by its spread, as GRPO does: there `normalize` and `calibrate` alone change nothing. They matter where
rewards are added up, clipped, squashed, or meet a value function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayrm.errors import ConfigError, ScoreError
from rayrm.rl.moments import Moments, RunningMoments
from rayrm.serve.request import ScoreResult
from rayrm.settings import NonNegativeFloat, NonNegativeInt, frozen_settings, nearest, none_word

_NO_SPREAD = 1e-6
"""Times max(1, |mean|): a spread of float32 scores below that is rounding, and dividing by it makes noise."""


@frozen_settings
class Shaping:
    """The `[shaping]` section of a run file. ConfigError for what cannot be meant."""

    pessimism: NonNegativeFloat = 0.0
    """Standard deviations of an ensemble's members that are taken off its score."""
    calibrate: Annotated[str | None, BeforeValidator(none_word)] = None
    """A calibration stored at publication: scores less its mean, divided by its standard deviation."""
    calibrate_column: Annotated[str | None, BeforeValidator(none_word)] = None
    """A column of the prompts' data set that names the calibration of each row, instead of `calibrate`."""
    normalize: bool = False
    """Scores less the mean of all so far, divided by their standard deviation."""
    clip: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(none_word)] = None
    """Rewards beyond ± this are cut to it."""
    squash: Annotated[Literal["sigmoid", "tanh"] | None, BeforeValidator(none_word)] = None
    """`sigmoid`: rewards between 0 and 1; `tanh`: between -1 and 1."""
    length_penalty: NonNegativeFloat = 0.0
    """Taken off for each token of a completion beyond `length_free`."""
    length_free: NonNegativeInt = 0
    """Tokens of a completion that cost nothing."""

    def __post_init__(self) -> None:
        if self.calibrate is not None and self.calibrate_column is not None:
            raise ValueError(
                f"`calibrate` ({self.calibrate!r}) with `calibrate_column` ({self.calibrate_column!r}): one "
                "calibration for all rows, or one for each row. Delete one of the two."
            )
        if self.pessimism and self.calibrates:
            raise ValueError(
                f"`pessimism` ({self.pessimism:g}) with `calibrate`: the first is for an ensemble, and only "
                "a single model has a calibration. Delete one; `normalize=true` gives an ensemble a unit."
            )
        if self.length_free and not self.length_penalty:
            raise ValueError(
                f"`length_free` ({self.length_free}) without `length_penalty`: no token costs anything. Type "
                "`length_penalty=0.001`, or delete `length_free`."
            )

    @property
    def calibrates(self) -> bool:
        """Whether rewards need a stored calibration."""
        return self.calibrate is not None or self.calibrate_column is not None


def pessimistic(scores: Sequence[float], spread: Sequence[float], k: float) -> list[float]:
    """score - k * spread: what one member overrates and others do not is worth little to the policy.

    `spread`: of an ensemble, the standard deviation over its members for each text. UWO of
    https://arxiv.org/abs/2310.02743 (which takes off the variance); https://arxiv.org/abs/2312.09244.
    """
    return [score - k * apart for score, apart in zip(scores, spread, strict=True)]


def calibrated(
    scores: Sequence[float], datasets: Sequence[str], calibration: Mapping[str, tuple[float, float]]
) -> list[float]:
    """(score - mean) / std by the (mean, std > 0) of each score's data set.

    A fixed zero, as in https://arxiv.org/abs/2203.02155, where demonstrations have the mean score 0.
    """
    moments = [calibration[name] for name in datasets]
    return [(score - mean) / std for score, (mean, std) in zip(scores, moments, strict=True)]


def normalized(scores: Sequence[float], moments: Moments) -> list[float]:
    """(score - mean) / std; 0 for each where the scores so far do not differ.

    What the first call gives is therefore whitened by itself: its mean is 0 and its standard deviation 1 over
    all ranks. PPO's implementations whiten a batch at a time (https://arxiv.org/abs/2403.17031); by all that
    was seen so far, a batch of high scores keeps them.
    """
    std = moments.std
    if std <= _NO_SPREAD * max(1.0, abs(moments.mean)):
        return [0.0] * len(scores)
    return [(score - moments.mean) / std for score in scores]


def clipped(rewards: Sequence[float], bound: float) -> list[float]:
    """Within ±`bound`, above 0."""
    return [min(max(reward, -bound), bound) for reward in rewards]


def squashed(rewards: Sequence[float], form: Literal["sigmoid", "tanh"]) -> list[float]:
    """1 / (1 + exp(-reward)), or tanh(reward).

    The sigmoid of a Bradley-Terry score is the probability of being preferred to a completion that scores 0.
    Why a reward should be bounded: https://arxiv.org/abs/2502.18770.
    """
    if form == "tanh":
        return [math.tanh(reward) for reward in rewards]
    # The same number, without exp(-reward) where that is beyond all floats.
    return [0.5 * (1.0 + math.tanh(0.5 * reward)) for reward in rewards]


def length_penalized(
    rewards: Sequence[float], lengths: Sequence[int], per_token: float, free: int
) -> list[float]:
    """reward - per_token * max(0, length - free), `lengths` in tokens of the policy.

    Why: much of what a policy gains under a reward model can be length alone, which a model that was trained
    on longer answers rewards (https://arxiv.org/abs/2310.03716).
    """
    return [reward - per_token * max(0, n - free) for reward, n in zip(rewards, lengths, strict=True)]


def weighted(rewards: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """The sum over names of weight * reward, for each completion. Weights may be negative.

    Raises ConfigError for a name without a weight, a weight without a reward or that is not finite, and
    ScoreError for rewards of unequal number or that are not finite.
    """
    for name in weights.keys() - rewards.keys():
        raise ConfigError(f"weight `{name}`: no reward has this name.{_known(name, rewards)}")
    for name in rewards.keys() - weights.keys():
        raise ConfigError(f"reward `{name}` has no weight. Give it one, 0 to leave it out.")
    if not rewards:
        raise ConfigError("`rewards` is empty: there is nothing to add up. Give at least one reward.")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ConfigError(f"weight `{name}` ({weight}) must be a finite number.")
    counts = {name: len(own) for name, own in rewards.items()}
    if len(set(counts.values())) != 1:
        raise ScoreError(f"each reward needs one number for each completion, and they have {counts}.")
    for name, own in rewards.items():
        _check_finite(f"reward `{name}`", own)
    rows = zip(*(rewards[name] for name in weights), strict=True)
    factors = list(weights.values())
    return [math.fsum(factor * reward for factor, reward in zip(factors, row, strict=True)) for row in rows]


class Shaper:
    """Shapes the answers of one reward service, call by call; with `normalize` it remembers what it has seen.

    Under several ranks with `normalize` every call is a collective (`moments.py`): construct shapers in the
    same order on every rank, and call each equally often. Where a rank has no scores for a call, since the
    service failed, it calls `give_up` and raises, and the other ranks raise too instead of waiting for half
    an hour. What `shape` itself refuses, it tells the others itself.
    """

    def __init__(self, settings: Shaping | None = None) -> None:
        self.settings = settings or Shaping()
        self._running = RunningMoments() if self.settings.normalize else None

    @property
    def moments(self) -> Moments | None:
        """Of all scores so far, over all ranks; None without `normalize`."""
        return None if self._running is None else self._running.current

    def shape(
        self,
        result: ScoreResult,
        *,
        lengths: Sequence[int] | None = None,
        datasets: Sequence[str] | None = None,
    ) -> list[float]:
        """The reward of each of the result's scores: finite floats.

        Args:
            lengths: tokens of each completion, for `length_penalty`.
            datasets: the value of `calibrate_column` for each completion.

        Raises:
            ConfigError: a setting that this answer cannot honour, or ranks that hold different states.
            ScoreError: a score that is not finite.
            RewardUnavailableError: another rank failed, under `normalize`.
        """
        try:
            scores = self._own_scale(result, lengths, datasets)
        except Exception:
            self.give_up()
            raise
        seen = None if self._running is None else self._running.update(scores)
        return self._rewards(scores, seen, lengths)

    async def shape_async(
        self,
        result: ScoreResult,
        *,
        lengths: Sequence[int] | None = None,
        datasets: Sequence[str] | None = None,
    ) -> list[float]:
        """`shape` for asyncio: the other ranks are waited for in a thread."""
        try:
            scores = self._own_scale(result, lengths, datasets)
        except Exception:
            await self.give_up_async()
            raise
        seen = None if self._running is None else await self._running.update_async(scores)
        return self._rewards(scores, seen, lengths)

    def give_up(self) -> None:
        """Instead of `shape`, where this rank has no scores: the other ranks raise instead of waiting."""
        if self._running is not None:
            self._running.give_up()

    async def give_up_async(self) -> None:
        """`give_up` for asyncio."""
        if self._running is not None:
            await self._running.give_up_async()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next reward to be what it would have been. As JSON too."""
        return {} if self._running is None else {"normalize": self._running.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, the same on every rank. ConfigError where `normalize` is otherwise."""
        if (self._running is not None) != ("normalize" in state):
            was = "set" if "normalize" in state else "not set"
            raise ConfigError(
                f"`normalize` was {was} where this state was saved, and is not so now: rewards would have "
                "another unit. Go on with the setting that the run began with."
            )
        if self._running is not None:
            self._running.load_state_dict(state["normalize"])

    def _own_scale(
        self, result: ScoreResult, lengths: Sequence[int] | None, datasets: Sequence[str] | None
    ) -> list[float]:
        """Steps 1 and 2, which look at one answer alone; all that can be wrong is found here."""
        settings, scores = self.settings, list(result.scores)
        _check_finite("score", scores)
        if settings.length_penalty:
            _check_lengths(lengths, len(scores))
        if settings.pessimism:
            scores = pessimistic(scores, _spread_of(result, settings.pessimism), settings.pessimism)
        if settings.calibrates:
            names = self._dataset_names(datasets, len(scores))
            _check_calibration(result, names)
            scores = calibrated(scores, names, result.calibration)
        _check_finite("score", scores)
        return scores

    def _dataset_names(self, datasets: Sequence[str] | None, count: int) -> list[str]:
        if self.settings.calibrate is not None:
            return [self.settings.calibrate] * count
        column = self.settings.calibrate_column
        if datasets is None:
            raise ConfigError(
                f"`calibrate_column` ({column!r}): the prompts' data set has no such column. Add it, with "
                "the name of a calibration in each row, or name one for all rows by `calibrate`."
            )
        if len(datasets) != count:
            raise ScoreError(f"column `{column}` has {len(datasets)} entries for {count} completions.")
        return list(datasets)

    def _rewards(
        self, scores: list[float], seen: Moments | None, lengths: Sequence[int] | None
    ) -> list[float]:
        """Steps 3 to 6."""
        settings, rewards = self.settings, scores
        if seen is not None:
            rewards = normalized(rewards, seen)
        if settings.clip is not None:
            rewards = clipped(rewards, settings.clip)
        if settings.squash is not None:
            rewards = squashed(rewards, settings.squash)
        if settings.length_penalty and lengths is not None:
            per_token, free = settings.length_penalty, settings.length_free
            rewards = length_penalized(rewards, lengths, per_token, free)
        _check_finite("reward", rewards)
        return rewards


def _check_finite(name: str, numbers: Sequence[float]) -> None:
    for place, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ScoreError(
                f"{name} {place} of {len(numbers)} is {number}, and must be a finite number. Look at the "
                "text in that place; a policy is not trained on it."
            )


def _check_lengths(lengths: Sequence[int] | None, count: int) -> None:
    if lengths is None:
        raise ConfigError(
            "`length_penalty` needs the number of tokens of each completion, and the caller gives no "
            "`completion_ids`. Delete `length_penalty`, or pass `lengths`."
        )
    if len(lengths) != count:
        raise ScoreError(f"{len(lengths)} lengths for {count} completions: each needs one.")


def _spread_of(result: ScoreResult, k: float) -> list[float]:
    if result.spread is None:
        raise ConfigError(
            f"`pessimism` ({k:g}): {result.model or 'the model'!r} is a single model, and only an ensemble's "
            "members have a spread. Serve an ensemble and pass model=ITS NAME, or delete `pessimism`."
        )
    _check_finite("spread", result.spread)
    return result.spread


def _check_calibration(result: ScoreResult, names: Sequence[str]) -> None:
    if result.spread is not None:
        raise ConfigError(
            f"`calibrate`: {result.model!r} is an ensemble, and only a single model has a calibration. "
            "Delete it; `normalize=true` gives an ensemble's rewards a unit."
        )
    for name in dict.fromkeys(names):
        if name not in result.calibration:
            raise ConfigError(
                f"`calibrate`: version {result.version} of {result.model or 'the model'!r} was published "
                f"without a calibration {name!r}.{_known(str(name), result.calibration)} Type rayrm publish "
                f"CHECKPOINT --calibrate {name}=FILE (under another --name if it is published already)."
            )


def _known(name: str, known: Mapping[str, Any]) -> str:
    return f" It has: {', '.join(known)}.{nearest(name, known)}" if known else " It has none."
