"""Signs that a policy games its reward: what a run's log shows of it, one warning for each. Pure numpy.

A policy trained against a learned reward ends by finding what only that reward likes: the reward goes on
rising while what it stands for falls (https://arxiv.org/abs/2210.10760). `HackingGuard` reads the run's
logging records one by one and looks for the reward rising while a gold reward falls, while the members of an
ensemble part (https://arxiv.org/abs/2312.09244, https://arxiv.org/abs/2310.02743), or by length
(https://arxiv.org/abs/2310.03716); for repetition that rises; and for a KL beyond its bound.

A trend is a Mann-Kendall test over the last 20, 40, 80 and 160 records: it asks for no distribution, and one
wild step moves it by its rank only. Its variance is widened by the autocorrelation of what the fitted trend
leaves. Testing at every step finds a trend in anything, so the chance of a false alarm is spent: half of what
is left for each longer window, and 1 / (m (m + 1)) of that in a window's m-th length; over a run of any
length that sums to `false_alarms`. tests/unit/test_guard.py measures what comes of it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrm.errors import DataError
from rayrm.settings import Fraction, NonNegativeFloat, frozen_settings

Array = NDArray[np.float64]

NGRAM = 4
WINDOWS = (20, 40, 80, 160)
"""In logging records. A run shorter than the first is told nothing about trends."""
_KL_RECORDS = 10

_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana and Han: no spaces between words."""
_MARKS = "\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
"""Accents, and vowel signs of Semitic and Indic scripts, which stand inside words and are no letters."""
_UNIT = re.compile(rf"[{_NO_SPACES}]|(?:(?![{_NO_SPACES}])[\w{_MARKS}])+|[^\w\s]")
_LONGEST_WORD = 40


def repetition(text: str) -> float:
    """The share of `text`'s 4-grams that stood in it before, from 0 (nothing comes again) to almost 1.

    Units are words and single marks, whatever their case; characters in scripts that put no spaces between
    words, and in "words" of more than 40 letters. A text of fewer than 8 units is counted by n-grams of half
    its length ("no no no": 2 of 3 words came before); one of fewer than 2 units repeats nothing: 0.0.
    """
    units: list[str] = []
    for unit in _UNIT.findall(text.casefold()):
        units.extend(unit if len(unit) > _LONGEST_WORD else (unit,))
    if len(units) < 2:
        return 0.0
    size = min(NGRAM, len(units) // 2)
    grams = [tuple(units[place : place + size]) for place in range(len(units) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams)


def length_correlation(rewards: Sequence[float], lengths: Sequence[float]) -> float:
    """Pearson's correlation of N rewards with N lengths, in [-1, 1].

    0.0 where it is undefined: fewer than two texts, all rewards equal or all lengths equal.
    Raises ValueError for unequal numbers, or a value that is not finite.
    """
    if len(rewards) != len(lengths):
        raise ValueError(f"{len(rewards)} rewards and {len(lengths)} lengths: each text has one of both")
    deviations = [_deviations(np.asarray(values, np.float64)) for values in (rewards, lengths)]
    norms = [float(np.linalg.norm(values)) for values in deviations]
    if not all(norms):
        return 0.0
    return float(np.clip(deviations[0] @ deviations[1] / (norms[0] * norms[1]), -1.0, 1.0))


def _deviations(values: Array) -> Array:
    """From the mean, in units of the largest value; exactly zero where only rounding tells values apart."""
    if not np.isfinite(values).all():
        raise ValueError("a reward or a length is not finite")
    scale = np.abs(values).max(initial=0.0)
    if scale == 0.0:
        return np.zeros_like(values)
    scaled = values / scale
    deviations: Array = scaled - scaled.mean()
    return deviations if np.ptp(scaled) > 1e-12 else np.zeros_like(values)


@frozen_settings
class GuardSettings:
    """When `HackingGuard` warns."""

    false_alarms: Fraction = 0.04
    """The chance that a run of any length without a trend gets a warning of one, all rules together."""
    max_kl: NonNegativeFloat = 0.5
    """Nats per token from the reference, as TRL logs `kl`: the bound for the median of 10 records."""
    min_length_correlation: Fraction = 0.5
    """From which correlation on a reward that rises with the lengths is said to track them."""
    min_repetition_rise: Fraction = 0.05
    """By how much repetition must have risen, as a share of n-grams: less is seen and not worth a warning."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One warning: by which `rule`, for which reward, at which `step` it was given, `since` when it holds."""

    rule: str
    name: str
    step: int
    since: int
    text: str


_KEYS: dict[str, tuple[str, ...]] = {
    "gold": ("{}/score_mean", "{}/gold_mean"),
    "spread": ("{}/score_mean", "{}/spread"),
    "length": ("{}/score_mean", "completions/mean_length", "{}/length_correlation"),
    "repetition": ("{}/repetition",),
    "kl": ("kl",),
}
RULES = tuple(_KEYS)
"""What is watched, where the log has it: gold, spread, length, repetition, kl."""
_NUM_TREND_RULES = 4
_REWARD_RISES_Z = 1.96
_MIN_GROWTH = {"spread": 0.25, "length": 0.1}
"""Relative. An ensemble parts a little on anything new, and a better answer may be somewhat longer."""
_REMEDY = {
    "gold": "Go back to a checkpoint from before it, raise `beta` (the KL penalty), reward by an ensemble "
    '(`reduce = "min"`), or refresh the reward model on samples of this policy.',
    "spread": 'Reward by the ensemble\'s `min` or by its mean less its spread (`reduce = "mean-std"`), '
    "raise `beta` (the KL penalty), or refresh the reward model on samples of this policy.",
    "length": "Give the reward a length penalty, or refresh the reward model with pairs whose better side is "
    "the shorter one.",
    "repetition": "Read samples*.jsonl. Raise `beta` (the KL penalty) or the `temperature`, or refresh the "
    "reward model with pairs whose rejected side repeats itself.",
    "kl": "Raise `beta` (the KL penalty), lower `learning_rate`, or stop here: what a reward says of "
    "texts this far from its training data means little.",
}


class HackingGuard:
    """Reads a run's logging records in order; each rule warns once for each reward.

    The reward is `NAME/score_mean`, the reward model's own score: a shaped or normalised one need not rise.
    """

    def __init__(self, settings: GuardSettings | None = None) -> None:
        self._settings = settings or GuardSettings()
        self._rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        self._num_rows: dict[tuple[str, str], int] = {}
        self.alarms: list[Alarm] = []

    def see(self, record: Mapping[str, Any]) -> list[str]:
        """Take the next logging record; the warnings it gives, most often none.

        Records without a reward (an evaluation, a summary) are passed over, as are values that are missing or
        not finite. A record of an earlier step than the last says that the run was resumed there: what came
        after is forgotten. Raises DataError for a record without `step`.
        """
        if not isinstance(record.get("step"), int | float):
            raise DataError(
                f"A logging record without a `step` ({sorted(record)[:5]}): add the step it was logged at."
            )
        names = sorted(key.removesuffix("/score_mean") for key in record if key.endswith("/score_mean"))
        found = []
        for rule in RULES:
            for name in [""] if rule == "kl" else names:
                if self._take(rule, name, record) and (alarm := self._judge(rule, name)):
                    found.append(alarm)
        self.alarms.extend(found)
        return [alarm.text for alarm in found]

    def watched(self, rule: str) -> int:
        """How many records told something to `rule` (one of `RULES`)."""
        return max((num for (of, _), num in self._num_rows.items() if of == rule), default=0)

    def _take(self, rule: str, name: str, record: Mapping[str, Any]) -> bool:
        values = [_number(record.get(key.format(name))) for key in _KEYS[rule]]
        if not all(math.isfinite(value) for value in values):
            return False
        place = rule, name
        rows = self._rows.setdefault(place, [])
        step = float(record["step"])
        self._num_rows[place] = self._num_rows.get(place, 0) + 1
        while rows and rows[-1][0] >= step:
            rows.pop()
            self._num_rows[place] -= 1
        rows.append((step, *values))
        del rows[: -WINDOWS[-1]]
        return not any((alarm.rule, alarm.name) == place for alarm in self.alarms)

    def _judge(self, rule: str, name: str) -> Alarm | None:
        rows = np.array(self._rows[rule, name])
        found = self._judge_kl(rows) if rule == "kl" else self._judge_trend(rule, name, rows)
        if found is None:
            return None
        since, what = found
        step = int(rows[-1, 0])
        return Alarm(rule, name, step, int(since), f"Step {step}: {what} {_REMEDY[rule]}")

    def _judge_kl(self, rows: Array) -> tuple[float, str] | None:
        last = rows[-_KL_RECORDS:]
        median = float(np.median(last[:, 1]))
        if len(last) < _KL_RECORDS or median <= self._settings.max_kl:
            return None
        return last[0, 0], (
            f"the KL from the reference has been {median:.3g} nats per token (the median since step "
            f"{int(last[0, 0])}), beyond the bound of {self._settings.max_kl:g}."
        )

    def _judge_trend(self, rule: str, name: str, rows: Array) -> tuple[float, str] | None:
        """The first window in which the rule holds: since which step, and the sentence."""
        chance = self._settings.false_alarms / _NUM_TREND_RULES
        for window in WINDOWS:
            if window > len(rows):
                break
            chance /= 2
            lengths = -(-self._num_rows[rule, name] // window)
            bound = NormalDist().inv_cdf(1 - chance / (lengths * (lengths + 1))) if chance else math.inf
            last = rows[-window:]
            bad = find_trend(
                -last[:, 2] if rule == "gold" else last[:, 1 if rule == "repetition" else 2], bound
            )
            if bad is None:
                continue
            since = f"since step {int(last[bad.begins, 0])}"
            if rule == "repetition":
                what = self._repeats(name, bad, since)
            else:
                what = self._against_the_reward(rule, name, last, bad, since)
            if what is not None:
                return last[bad.begins, 0], what
        return None

    def _repeats(self, name: str, bad: Trend, since: str) -> str | None:
        if bad.after - bad.before < self._settings.min_repetition_rise:
            return None
        return (
            f"completions scored by `{name}` repeat themselves more, {bad.before:.1%} -> {bad.after:.1%} of "
            f"their n-grams {since}."
        )

    def _against_the_reward(self, rule: str, name: str, last: Array, bad: Trend, since: str) -> str | None:
        reward = find_trend(last[:, 1], _REWARD_RISES_Z)
        if reward is None:
            return None
        rises = f"`{name}`'s score rises, {reward.before:.3g} -> {reward.after:.3g},"
        if rule == "gold":
            falls = f"{-bad.before:.3g} -> {-bad.after:.3g}"
            return (
                f"{rises} while the gold reward falls, {falls} {since}: the policy learns what only it likes."
            )
        grown = bad.after - bad.before
        if rule == "spread":
            if grown < _MIN_GROWTH[rule] * abs(bad.before) and grown <= reward.after - reward.before:
                return None
            return (
                f"{rises} while its members' spread grows, {bad.before:.3g} -> {bad.after:.3g} {since}: the "
                "policy goes where they do not agree."
            )
        correlation = float(last[:, 3].mean())
        short = correlation < self._settings.min_length_correlation
        if short or grown < _MIN_GROWTH[rule] * abs(bad.before):
            return None
        return (
            f"{rises} with the length of completions, {bad.before:.0f} -> {bad.after:.0f} tokens {since}, "
            f"and within a step it tracks length (correlation {correlation:.2f})."
        )


@dataclass(frozen=True, slots=True)
class Trend:
    """A rise that noise does not explain: from the level `before` to `after`, from row `begins` on."""

    z: float
    begins: int
    before: float
    after: float


def find_trend(values: Array, bound: float) -> Trend | None:
    """The rise in `values` `[n]`, if its Mann-Kendall z is beyond `bound`; a fall is the rise of `-values`.

    z = (S - 1) / sqrt(var S * (1 + r) / (1 - r)), S = sum over i < j of sign(x_j - x_i), var S with its
    correction for ties, r the lag-1 autocorrelation of what the fit leaves, where positive (after Yue and
    Wang, https://doi.org/10.1023/B:WARM.0000043140.61082.60). The fit is level up to `begins`, from there a
    line.
    """
    num = len(values)
    ties = np.unique(values, return_counts=True)[1].astype(np.float64)
    rising = np.count_nonzero((values[None, :] > values[:, None]) & _later(num))
    total = 2 * rising - (num * (num - 1) - float((ties * (ties - 1)).sum())) / 2
    variance = (_pairs_variance(float(num)) - float(_pairs_variance(ties).sum())) / 18
    if total <= 1 or variance <= 0 or (total - 1) / math.sqrt(variance) <= bound:
        return None
    begins, before, after, rest = _bent_line(values)
    left = float(rest @ rest)
    # The estimate of r falls short by about (3 + 4 r) / n after such a fit.
    r = (float(rest[1:] @ rest[:-1]) / left + 3 / num) / (1 - 4 / num) if left > 0 else 0.0
    r = min(max(r, 0.0), 0.95)
    z = (total - 1) / math.sqrt(variance * (1 + r) / (1 - r))
    return Trend(z, begins, before, after) if z > bound else None


@functools.cache
def _later(num: int) -> NDArray[np.bool_]:
    return np.triu(np.ones((num, num), np.bool_), 1)


def _pairs_variance(num: Any) -> Any:
    return num * (num - 1) * (2 * num + 5)


def _bent_line(values: Array) -> tuple[int, float, float, Array]:
    """The best bend in the first three quarters, the levels before it and at the end, and what is left."""
    num = len(values)
    bends_B = np.arange(num - num // 4)
    rises_BN = np.maximum(np.arange(num)[None, :] - bends_B[:, None], 0).astype(np.float64)
    rises_BN -= rises_BN.mean(axis=1, keepdims=True)
    centred = values - values.mean()
    products_B = rises_BN @ centred
    best = int(np.argmax(products_B**2 / (rises_BN**2).sum(axis=1)))
    fitted = products_B[best] / (rises_BN[best] ** 2).sum() * rises_BN[best]
    return (
        int(bends_B[best]),
        float(values.mean() + fitted[0]),
        float(values.mean() + fitted[-1]),
        centred - fitted,
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
