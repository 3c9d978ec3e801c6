"""Which trials a sweep has, and which of them is the best: pure, before anything starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rayrm.errors import ConfigError, RunDirectoryError
from rayrm.train.sweep import Trial, best_of, plan_trials, run_sweep


def test_lists_make_every_combination_in_order() -> None:
    assert plan_trials(["learning_rate=1e-5,3e-5", "model.lora.r=8,16"], None, 0) == [
        ("learning_rate=1e-5", "model.lora.r=8"),
        ("learning_rate=1e-5", "model.lora.r=16"),
        ("learning_rate=3e-5", "model.lora.r=8"),
        ("learning_rate=3e-5", "model.lora.r=16"),
    ]


def test_commas_inside_lists_and_quotes_do_not_separate_values() -> None:
    plan = plan_trials(['model.lora.target_modules=["q_proj","v_proj"],"all-linear"'], None, 0)
    assert plan == [
        ('model.lora.target_modules=["q_proj","v_proj"]',),
        ('model.lora.target_modules="all-linear"',),
    ]


def test_draws_lie_in_their_range_repeat_with_the_seed_and_spread_by_the_logarithm() -> None:
    params = ["learning_rate=log:1e-6:1e-2", "warmup_steps=uniform:0:0.2"]
    plan = plan_trials(params, 400, 3)
    assert plan == plan_trials(params, 400, 3)
    assert plan != plan_trials(params, 400, 4)
    rates = [float(trial[0].partition("=")[2]) for trial in plan]
    shares = [float(trial[1].partition("=")[2]) for trial in plan]
    assert min(rates) >= 1e-6
    assert max(rates) <= 1e-2
    # The middle of a log range is 1e-4; 400 draws put the mean of log10 within 0.25 of it (4 deviations).
    assert sum(map(math.log10, rates)) / len(rates) == pytest.approx(-4, abs=0.25)
    assert sum(shares) / len(shares) == pytest.approx(0.1, abs=0.012)


def test_each_listed_value_gets_as_many_draws() -> None:
    plan = plan_trials(["seed=1,2", "learning_rate=log:1e-6:1e-4"], 3, 0)
    assert [trial[0] for trial in plan] == ["seed=1"] * 3 + ["seed=2"] * 3
    assert len({trial[1] for trial in plan}) == 6


@pytest.mark.parametrize(
    ("params", "num_trials", "said"),
    [
        ([], None, "--param learning_rate=1e-5,3e-5"),
        (["learning_rate"], None, "key=values"),
        (["learning_rate=1,2", "learning_rate=3"], None, "given twice"),
        (["learning_rate=log:1e-6:1e-4"], None, "--trials 8"),
        (["learning_rate=1,2"], 3, "range"),
        (["learning_rate=log:1e-4:1e-6"], 2, "below HIGH"),
        (["learning_rate=log:0:1"], 2, "above 0"),
        (["learning_rate=log:1"], 2, "KIND:LOW:HIGH"),
    ],
)
def test_a_parameter_that_cannot_be_planned_is_refused(
    params: list[str], num_trials: int | None, said: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_trials(params, num_trials, 0)
    assert said in str(refusal.value)


def trial(metric: float | None) -> Trial:
    return Trial(("x=1",), Path("t"), metric, None if metric is not None else "lost")


def test_the_best_is_by_the_mode_and_failed_trials_do_not_take_part() -> None:
    trials = [trial(0.5), trial(None), trial(0.7), trial(0.7), trial(0.1)]
    assert best_of(trials, "max") is trials[2]
    assert best_of(trials, "min") is trials[4]
    assert best_of([trial(None)], "max") is None


BASE = ["model.name=m", "data.train=d.jsonl"]


def test_a_sweep_is_refused_before_anything_starts(tmp_path: Path) -> None:
    out = f"output_dir={tmp_path / 'sweep'}"
    with pytest.raises(ConfigError, match=r"data\.eval"):
        run_sweep(None, [*BASE, out], ["learning_rate=1e-5,2e-5"])
    with pytest.raises(ConfigError, match="learning_rate"):
        run_sweep(None, [*BASE, "data.eval=e.jsonl", out], ["learning_rate=1e-5,fast"])
    with pytest.raises(ConfigError, match="learning_rate"):
        run_sweep(None, [*BASE, "data.eval=e.jsonl", out], ["learning_rat=1e-5"])
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "sweep" / "precious"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(RunDirectoryError, match="output_dir"):
        run_sweep(None, [*BASE, "data.eval=e.jsonl", out], ["learning_rate=1e-5"])
    assert kept.read_text() == "mine"
