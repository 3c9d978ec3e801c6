"""What a policy's log shows of reward hacking: each sign is found when it is planted, and noise is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rayrm.errors import ConfigError, DataError
from rayrm.rl.guard import (
    RULES,
    Alarm,
    GuardSettings,
    HackingGuard,
    find_trend,
    length_correlation,
    repetition,
)

ONSET = 40
Drift = Callable[[int, int], dict[str, float]]


def noise(
    seed: int, steps: int, drift: Drift | None = None, *, memory: float = 0.0
) -> Iterator[dict[str, Any]]:
    """A run's records: each value wanders about its level, and `drift(step, steps since ONSET)` moves it.

    `memory`: how much of a step's deviation the next one keeps.
    """
    rng = np.random.default_rng(seed)
    levels = {
        "kl": (0.1, 0.02),
        "completions/mean_length": (100.0, 5.0),
        "rm/score_mean": (0.0, 0.1),
        "rm/gold_mean": (0.0, 0.1),
        "rm/spread": (0.3, 0.03),
        "rm/length_correlation": (0.0, 0.3),
        "rm/repetition": (0.1, 0.03),
    }
    deviation = np.zeros(len(levels))
    for step in range(1, steps + 1):
        deviation = memory * deviation + np.sqrt(1 - memory**2) * rng.standard_normal(len(levels))
        moved = drift(step, max(step - ONSET, 0)) if drift else {}
        yield {"step": step} | {
            key: level + sd * z + moved.get(key, 0.0)
            for (key, (level, sd)), z in zip(levels.items(), deviation, strict=True)
        }


def alarms(records: Iterator[dict[str, Any]], settings: GuardSettings | None = None) -> list[Alarm]:
    guard = HackingGuard(settings)
    told = [text for record in records for text in guard.see(record)]
    assert told == [alarm.text for alarm in guard.alarms]
    return guard.alarms


def share_warned(runs: int, steps: int, drift: Drift | None = None, memory: float = 0.0) -> float:
    return sum(bool(alarms(noise(seed, steps, drift, memory=memory))) for seed in range(runs)) / runs


def test_noise_gives_a_warning_in_fewer_than_one_run_of_twenty() -> None:
    """All rules together, 100 steps. Over 300 runs: 1.0% (400 steps, 60 runs: 1.7%)."""
    assert share_warned(100, 100) < 0.05


def test_an_honest_rise_of_reward_and_gold_gives_no_more_warnings_than_noise() -> None:
    assert (
        share_warned(60, 100, lambda step, _: {"rm/score_mean": 0.01 * step, "rm/gold_mean": 0.01 * step})
        < 0.05
    )


def test_noise_that_remembers_the_step_before_gives_few_warnings() -> None:
    """An uncorrected test warns several times as often here: neighbours say the same thing twice."""
    assert share_warned(60, 100, memory=0.3) <= 0.1


def hacked(rule: str) -> Drift:
    """Reward rises by a tenth of a step's noise with every step, and from ONSET on one thing goes wrong."""
    wrong = {
        "gold": {"rm/gold_mean": -0.01},
        "spread": {"rm/spread": 0.004},
        "length": {"completions/mean_length": 1.0},
        "repetition": {"rm/repetition": 0.004},
        "kl": {"kl": 0.02},
    }[rule]
    always = {"rm/length_correlation": 0.7} if rule == "length" else {}
    return lambda step, after: (
        {"rm/score_mean": 0.01 * step} | always | {key: slope * after for key, slope in wrong.items()}
    )


@pytest.mark.parametrize("rule", RULES)
def test_planted_hacking_is_found_within_forty_steps_and_named(rule: str) -> None:
    found = [alarms(noise(seed, ONSET + 40, hacked(rule))) for seed in range(20)]
    named = [next((alarm for alarm in run if alarm.rule == rule), None) for run in found]
    late = [run for run, alarm in zip(found, named, strict=True) if alarm is None]
    assert len(late) <= 1, late
    caught = [alarm for alarm in named if alarm is not None]
    assert np.median([alarm.step for alarm in caught]) <= ONSET + 30
    # Where it began is estimated from noise: within ten steps for most.
    if rule != "kl":
        assert np.median([abs(alarm.since - ONSET) for alarm in caught]) <= 10


def test_a_slow_decline_is_found_in_the_longer_windows() -> None:
    """A fiftieth of a step's noise per step: the first windows cannot see it."""
    drift: Drift = lambda step, _: {"rm/score_mean": 0.002 * step, "rm/gold_mean": -0.003 * step}  # noqa: E731
    found = [alarms(noise(seed, 200, drift)) for seed in range(8)]
    assert sum(any(alarm.rule == "gold" for alarm in run) for run in found) >= 7


def test_a_warning_says_what_since_when_by_how_much_and_what_to_try() -> None:
    (alarm,) = [one for one in alarms(noise(1, 90, hacked("gold"))) if one.rule == "gold"]
    assert f"Step {alarm.step}: `rm`'s score rises" in alarm.text
    assert "the gold reward falls, " in alarm.text
    assert f"since step {alarm.since}" in alarm.text
    assert "`beta`" in alarm.text
    assert 'reduce = "min"' in alarm.text
    assert "refresh the reward model" in alarm.text
    before, after = (
        float(word.strip(" ,")) for word in alarm.text.split("falls, ")[1].split(" since")[0].split("->")
    )
    # Gold lost 0.01 a step from step 40 on.
    assert before == pytest.approx(0.0, abs=0.06)
    assert after == pytest.approx(-0.01 * (alarm.step - ONSET), abs=0.1)


def test_each_warning_is_given_once() -> None:
    everything: Drift = lambda step, after: {  # noqa: E731
        key: value for rule in RULES for key, value in hacked(rule)(step, after).items()
    }
    found = alarms(noise(0, 160, everything))
    assert sorted(alarm.rule for alarm in found) == sorted(RULES)


def test_two_rewards_are_watched_apart() -> None:
    def both() -> Iterator[dict[str, Any]]:
        for honest, gamed in zip(noise(0, 90), noise(1, 90, hacked("gold")), strict=True):
            other = {key.replace("rm/", "safe/"): value for key, value in honest.items() if "/" in key}
            yield other | gamed

    assert [(alarm.rule, alarm.name) for alarm in alarms(both())] == [("gold", "rm")]


def test_a_spread_that_grows_less_than_the_reward_and_little_in_itself_is_no_sign() -> None:
    """0.3 -> 0.34 under a reward that rises by 2: any step towards better texts does that."""
    drift: Drift = lambda step, _: {"rm/score_mean": 0.02 * step, "rm/spread": 0.0004 * step}  # noqa: E731
    quiet = [record | {"rm/spread": 0.3 + 0.0004 * record["step"]} for record in noise(0, 100, drift)]
    assert alarms(iter(quiet)) == []
    pulled = [record | {"rm/spread": 0.3 + 0.004 * record["step"]} for record in quiet]
    assert [alarm.rule for alarm in alarms(iter(pulled))] == ["spread"]


def test_longer_completions_without_the_correlation_are_no_sign() -> None:
    drift: Drift = lambda step, after: hacked("length")(step, after) | {"rm/length_correlation": 0.0}  # noqa: E731
    assert alarms(noise(0, 90, drift)) == []


def test_settings_decide_when_it_warns() -> None:
    near = hacked("kl")
    assert [alarm.rule for alarm in alarms(noise(0, 80, near), GuardSettings(max_kl=0.3))] == ["kl"]
    assert alarms(noise(0, 80, near), GuardSettings(max_kl=2.0)) == []
    assert alarms(noise(1, 90, hacked("gold")), GuardSettings(false_alarms=0.0)) == []
    assert alarms(noise(0, 90, hacked("repetition")), GuardSettings(min_repetition_rise=0.9)) == []
    assert alarms(noise(0, 90, hacked("length")), GuardSettings(min_length_correlation=0.95)) == []
    with pytest.raises(ConfigError, match="max_kl"):
        GuardSettings(max_kl=-1.0)


def test_a_spike_of_kl_is_no_warning() -> None:
    records = [record | {"kl": 50.0 if record["step"] % 10 == 0 else 0.1} for record in noise(0, 60)]
    assert alarms(iter(records)) == []


def test_what_is_missing_or_not_finite_is_passed_over_and_the_rest_is_judged() -> None:
    def holes() -> Iterator[dict[str, Any]]:
        for record in noise(1, 110, hacked("gold")):
            del record["kl"], record["rm/spread"]
            if record["step"] % 4 == 0:
                record["rm/gold_mean"] = float("nan")
            yield record
            yield {"step": record["step"], "eval_reward": 3.0, "versions": ["a"]}

    guard = HackingGuard()
    for record in holes():
        guard.see(record)
    assert [alarm.rule for alarm in guard.alarms] == ["gold"]
    assert [guard.watched(rule) for rule in RULES] == [83, 0, 110, 110, 0]


def test_a_resumed_run_forgets_the_records_beyond_its_checkpoint() -> None:
    """Sixty steps into the hacking the run goes back to before it: what was seen there proves nothing now."""
    guard = HackingGuard(GuardSettings(max_kl=100.0))
    lost = [record for record in noise(1, 52, hacked("gold")) if record["step"] > 40]
    fresh = list(noise(2, 60, lambda step, _: {"rm/score_mean": 0.01 * step}))
    for record in [*fresh[:40], *lost, *fresh[40:]]:
        guard.see(record)
    assert guard.watched("gold") == 60
    assert guard.alarms == []


def test_a_record_without_a_step_is_refused() -> None:
    with pytest.raises(DataError, match=r"without a `step`.*add the step"):
        HackingGuard().see({"rm/score_mean": 1.0})


def test_a_trend_is_measured_as_mann_kendall_does() -> None:
    """1, 2, 4, 3, 5 ...: every pair is in order but one; S and its variance by hand."""
    values = np.array([1.0, 2, 4, 3, 5, 6, 7, 8, 9, 10])
    trend = find_trend(values, 1.0)
    assert trend is not None
    pairs, variance = 45 - 2, 10 * 9 * 25 / 18
    # What the straight line leaves swings from one to the next, so nothing is taken off for memory.
    assert trend.z == pytest.approx((pairs - 1) / variance**0.5)
    assert (trend.begins, trend.before, trend.after) == (
        0,
        pytest.approx(1.1, abs=0.3),
        pytest.approx(9.9, abs=0.3),
    )
    assert find_trend(-values, 1.0) is None
    assert find_trend(np.ones(50), 0.0) is None


def test_ties_and_memory_make_a_trend_weaker() -> None:
    rng = np.random.default_rng(0)
    line = np.arange(40) * 0.2
    plain = find_trend(line + rng.standard_normal(40), 1.0)
    steps = np.zeros(40)
    for place in range(1, 40):
        steps[place] = 0.9 * steps[place - 1] + 0.3 * rng.standard_normal()
    lasting = find_trend(line + 3 * steps, 0.0)
    assert plain is not None
    assert plain.z > 5
    assert lasting is None or lasting.z < plain.z
    two_levels = find_trend(np.repeat([0.0, 1.0], 20), 0.0)
    # S = 400 of 780 pairs; ties take 2 * 20 * 19 * 45 / 18 from the variance.
    assert two_levels is not None
    assert two_levels.z <= 399 / ((40 * 39 * 85 - 2 * 20 * 19 * 45) / 18) ** 0.5


def test_the_bend_of_a_trend_is_found() -> None:
    trend = find_trend(np.maximum(np.arange(80) - 30, 0) * 0.5, 3.0)
    assert trend is not None
    assert (trend.begins, trend.before, trend.after) == (
        30,
        pytest.approx(0.0, abs=1e-9),
        pytest.approx(24.5),
    )


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("Hello", 0.0),
        ("no no no", 2 / 3),
        ("yes yes", 1 / 2),
        ("The cat sat on the mat while the dog slept.", 0.0),
        # 12 words, 9 4-grams, of which 4 are told apart.
        ("one two three four one two three four one two three four", 5 / 9),
        ("One two THREE four. one two three four.", 2 / 7),
        # 40 marks, 37 4-grams, one kind.
        ("!" * 40, 36 / 37),
        ("haha" * 20, 1 - 2 / 77),
        ("今天天气很好", 0.0),
        # 12 characters, 9 4-grams, of which 4 are told apart.
        ("今天很好今天很好今天很好", 5 / 9),
        ("ดีดีดีดีดีดี", 1 - 2 / 9),
        # Vowel signs belong to their words: 4 words, told apart.
        ("हिन्दी में लिखा हुआ", 0.0),
    ],
)
def test_repetition_is_the_share_of_ngrams_that_came_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_length_correlation_is_pearsons() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(5, 200, 64).tolist()
    rewards = [0.01 * length + float(rng.standard_normal()) for length in lengths]
    expected = np.corrcoef(rewards, lengths)[0, 1]
    assert length_correlation(rewards, lengths) == pytest.approx(expected, abs=1e-12)
    assert length_correlation([-reward * 1e300 for reward in rewards], lengths) == pytest.approx(-expected)


@pytest.mark.parametrize(
    ("rewards", "lengths"),
    [([], []), ([1.0], [3]), ([0.1, 0.1, 0.1], [1, 2, 3]), ([1.0, 2.0], [7, 7]), ([0.1 + 0.2, 0.3], [1, 2])],
)
def test_length_correlation_is_zero_where_undefined(rewards: list[float], lengths: list[float]) -> None:
    assert length_correlation(rewards, lengths) == 0.0


def test_length_correlation_refuses_what_is_no_pair_of_series() -> None:
    with pytest.raises(ValueError, match="2 rewards and 1 lengths"):
        length_correlation([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="not finite"):
        length_correlation([1.0, float("nan")], [1, 2])
