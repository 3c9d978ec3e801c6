"""Population based training: its decisions, what is recorded of them, and going on by that. No Ray."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from rayrm.errors import CheckpointError, ConfigError, RunDirectoryError
from rayrm.report.sweep import write_sweep_report
from rayrm.sweep_command import print_sweep
from rayrm.sweep_settings import Space, SweepConfig, read_sweep, space_of_params
from rayrm.train.checkpoint import IDENTITY, TrainState, checkpoints
from rayrm.train.leg import MAY_CHANGE, Leg
from rayrm.train.sweep import run_sweep
from rayrm.train.sweep_plan import Words, check_population
from rayrm.train.sweep_population import choose, going_on, train_population
from rayrm.train.sweep_record import Record, Stretch, curve_of_trial, schedule_of
from tests.unit.test_rl_report import Page
from tests.whole_checkpoint import save_whole

RATES: Space = space_of_params(["learning_rate=log:1e-5:1e-3"])
BETAS: Space = space_of_params(["adam_beta1=uniform:0.5:0.99", "weight_decay=0,0.1,0.2,0.3"])


def settings(**changes: Any) -> SweepConfig:
    return SweepConfig(**{"metric": "eval_loss", "mode": "min", "scheduler": "pbt", **changes})


def chosen(
    values: list[float | None], rates: list[str], seed: int = 0, at: float = 20.0, **changes: Any
) -> dict[int, tuple[int, Words]]:
    numbers = range(1, len(values) + 1)
    words: dict[int, Words] = {n: (f"learning_rate={rate}",) for n, rate in zip(numbers, rates, strict=True)}
    return choose(dict(zip(numbers, values, strict=True)), words, RATES, settings(**changes), seed, at)


EIGHT = [0.5, 0.9, 0.1, 0.7, 0.8, 0.2, 0.6, 0.4]
EIGHT_RATES = [f"{number}e-5" for number in range(1, 9)]


def test_the_worst_quarter_goes_on_from_one_of_the_best_quarter() -> None:
    donors = {number: set() for number in (2, 5)}  # type: dict[int, set[int]]
    for seed in range(20):
        found = chosen(EIGHT, EIGHT_RATES, seed)
        assert sorted(found) == [2, 5]
        for number, (donor, _) in found.items():
            donors[number].add(donor)
    # Each of the best two, of 20 draws: the other alone has a chance of 2e-6.
    assert donors == {2: {3, 6}, 5: {3, 6}}
    assert sorted(chosen(EIGHT, EIGHT_RATES, mode="max")) == [3, 6]
    assert sorted(chosen(EIGHT, EIGHT_RATES, quantile=0.5)) == [2, 4, 5, 7]
    assert sorted(chosen(EIGHT[:2], EIGHT_RATES[:2])) == [2]


def test_a_new_value_is_the_donor_s_times_0_8_or_1_2_or_one_of_the_range() -> None:
    factors: dict[float, int] = {}
    for seed in range(200):
        ((_, (donor, (word,))),) = chosen([0.1, 0.9], ["1e-4", "5e-5"], seed).items()
        assert donor == 1
        value = float(word.partition("=")[2])
        assert 1e-5 <= value <= 1e-3
        factors[round(value / 1e-4, 3)] = factors.get(round(value / 1e-4, 3), 0) + 1
    kept = [factors.pop(factor) for factor in (0.8, 1.2)]
    # 75 of 200 each on average, 50 drawn anew; 4 deviations are 27 and 24.
    assert all(48 <= count <= 102 for count in kept)
    assert 26 <= sum(factors.values()) <= 74
    assert len(factors) > 20


def test_a_value_stays_in_its_range_and_a_list_s_is_one_of_it() -> None:
    words: dict[int, Words] = {
        1: ("adam_beta1=0.97", "weight_decay=0.2"),
        2: ("adam_beta1=0.6", "weight_decay=0"),
    }
    rates, decays = set(), set()
    for seed in range(60):
        ((_, (_, (beta, decay))),) = choose({1: 0.1, 2: 0.9}, words, BETAS, settings(), seed, 40.0).items()
        rates.add(float(beta.partition("=")[2]))
        decays.add(decay)
    # 0.97 x 1.2 would be no rate of decay.
    assert max(rates) == 0.99
    assert 0.776 in rates
    assert min(rates) >= 0.5
    assert {"weight_decay=0.1", "weight_decay=0.3"} <= decays  # the neighbours of 0.2
    assert decays <= {f"weight_decay={value}" for value in ("0", "0.1", "0.2", "0.3")}


def test_decisions_are_the_seed_s_and_leave_other_draws_alone() -> None:
    random.seed(1)
    before = random.getstate()
    first = chosen(EIGHT, EIGHT_RATES, 3)
    assert random.getstate() == before
    random.seed(2)
    assert chosen(EIGHT, EIGHT_RATES, 3) == first
    others = [chosen(EIGHT, EIGHT_RATES, 4), chosen(EIGHT, EIGHT_RATES, 3, at=40.0)]
    assert first not in others


def test_a_trial_that_failed_is_the_worst_and_nobody_takes_from_it() -> None:
    for mode in ("min", "max"):
        found = chosen([0.5, None, 0.3, 0.4], EIGHT_RATES[:4], mode=mode)
        assert sorted(found) == [2]
        assert found[2][0] == (3 if mode == "min" else 1)
    for seed in range(10):
        found = chosen([None, 0.3, None, None], EIGHT_RATES[:4], seed, quantile=0.5)
        assert {donor for donor, _ in found.values()} <= {2}


@pytest.mark.parametrize(
    ("params", "num_trials", "said"),
    [
        (["seed=1,2"], 2, "`seed` must stay"),
        (["learning_rate=1,2", "per_device_train_batch_size=4,8"], 4, "`per_device_train_batch_size` must"),
        (["model.lora.r=4,8"], 2, r"`model\.lora\.r` must stay"),
        (["learning_rate=1e-5"], 1, "there is one"),
    ],
)
def test_what_cannot_change_in_a_run_s_middle_is_refused_by_name(
    params: list[str], num_trials: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_population(space_of_params(params), num_trials)
    check_population(space_of_params(["reward.learning_rate=1e-5,2e-5", "weight_decay=0,0.1"]), 4)


EVAL = ["model.name=m", "data.train=d.jsonl", "data.eval=e.jsonl", "sweep.scheduler=pbt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep.search=optuna", "sweep.num_trials=4"], 'Type `search = "random"`'),
        (["sweep.metric=train_loss"], "eval_loss"),
        (["num_train_epochs=1"], "compares trials by their evaluations"),
        (
            ["load_best_model_at_end=true", "save_strategy=epoch", "eval_strategy=epoch"],
            "`load_best_model_at_end` .*Leave it out",
        ),
        (["resume_from_checkpoint=runs/checkpoint-3"], "`resume_from_checkpoint` .*Leave it out"),
        (["sweep.perturb_every=100"], "perturb_every"),
        (["sweep.quantile=0.6"], "quantile"),
    ],
)
def test_a_population_is_refused_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    home = tmp_path / "sweep"
    with pytest.raises(ConfigError, match=said):
        run_sweep(read_sweep(None, [*EVAL, *words, f"output_dir={home}"]), ["learning_rate=1e-5,2e-5"])
    assert list(tmp_path.iterdir()) == []


def test_every_setting_that_may_change_is_one_of_the_run_s() -> None:
    run, _ = read_sweep(None, EVAL).read()
    assert all(hasattr(run.reward, key) for key in MAY_CHANGE)


STEPS = 50


class Trainer:
    """Legs of trials that learn by their rates: each 10% add the rate x 1000 to the accuracy of its model."""

    def __init__(self, record: Record, fails: tuple[int, float] = (0, 0.0), dies_at: float = 200.0) -> None:
        self.record, self._fails, self._dies_at = record, fails, dies_at
        self.trained: list[tuple[list[int], float | None]] = []

    def __call__(self, numbers: list[int], leg: Leg) -> None:
        self.trained.append((numbers, leg.until))
        for number in numbers:
            if number not in self.record.trials:
                self.record.begin(number, (f"learning_rate={number}e-5",))
            if (leg.until or 100.0) > self._dies_at and number == numbers[-1]:
                raise KeyboardInterrupt
            self._train(number, leg.until or 100.0)

    def _train(self, number: int, until: float) -> None:
        trial = self.record.trials[number]
        home = trial.directory
        home.mkdir(exist_ok=True)
        run, _ = read_sweep(None, [*EVAL, f"output_dir={home}"]).read()
        start = going_on(run, self.record.home).reward.resume_from_checkpoint
        (home / IDENTITY).write_text("{}")
        found = checkpoints(home) or ([Path(start)] if start else [])
        step, reached = 0, 0.0
        if found:
            step, reached = int(found[-1].name.split("-")[1]), float((found[-1] / "value").read_text())
        with (home / "metrics.jsonl").open("a") as out:
            while step < until * STEPS / 100:
                step, reached = step + 5, reached + 1000 * float(trial.words[0].partition("=")[2])
                out.write(json.dumps({"step": step, "eval_accuracy": reached}) + "\n")
        progress = {"step": step, "num_steps": STEPS, "finished": until == 100}
        (home / "progress.json").write_text(json.dumps(progress))
        if (number, until) == self._fails:
            self.record.end(number, failure="no memory")
            return
        checkpoint = save_whole(home, TrainState(step=step))
        (checkpoint / "value").write_text(repr(reached))
        if until == 100:
            self.record.end(number, metric=reached)


PBT = settings(metric="eval_accuracy", mode="max", perturb_every=40.0)


def population(home: Path, **how: Any) -> Trainer:
    home.mkdir(exist_ok=True)
    record = Record(home, "eval_accuracy", "max", {})
    trainer = Trainer(record, **how)
    train_population(record, RATES, PBT, 5, 4, trainer)
    return trainer


def test_a_population_goes_from_comparison_to_comparison_and_tells_how_each_model_came_to_be(
    tmp_path: Path,
) -> None:
    done = population(tmp_path / "sweep")
    assert done.trained == [([1, 2, 3, 4], 40.0), ([1, 2, 3, 4], 80.0), ([1, 2, 3, 4], None)]
    trials = done.record.sweep.trials
    (first,) = trials[0].exchanges[:1]
    # At 40% the trials have 4 x 0.01, 0.02, 0.03 and 0.04.
    assert (first.at, first.donor, first.words) == (40.0, "trial-04", ("learning_rate=1e-5",))
    assert (first.metric, first.donor_metric) == pytest.approx((0.04, 0.16))
    assert first.directory.name == "trial-01"
    assert len(trials[0].exchanges) + len(trials[1].exchanges) == 2
    for trial in trials:
        number = trial.directory.name.partition(".")[0]
        assert trial.directory.name == number + (f".{len(trial.exchanges) + 1}" if trial.exchanges else "")
        # Its value is the sum over the stretches that its model was trained for, wherever that was.
        stretches = schedule_of(trials, trial)
        assert [one.begin for one in stretches[1:]] == [one.end for one in stretches[:-1]]
        rates = [float(one.words[0].partition("=")[2]) for one in stretches]
        whole = sum(100 * rate * (one.end - one.begin) for rate, one in zip(rates, stretches, strict=True))
        assert trial.metric == pytest.approx(whole)
    story = schedule_of(trials, trials[0])
    assert story[0] == Stretch(0.0, 40.0, ("learning_rate=4e-5",), "trial-04")
    assert story[-1].words == trials[0].words
    assert not (tmp_path / "sweep" / ".donors").exists()


def story_of(done: Trainer) -> list[Any]:
    return [
        (trial.words, trial.metric, trial.directory.name, [(one.at, one.donor) for one in trial.exchanges])
        for trial in done.record.sweep.trials
    ]


@pytest.mark.parametrize("dies_at", [10.0, 50.0, 90.0])
def test_a_population_that_was_cut_off_goes_on_to_the_same_end(tmp_path: Path, dies_at: float) -> None:
    whole = population(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        population(tmp_path / "sweep", dies_at=dies_at)
    again = population(tmp_path / "sweep")
    # What had come to its leg's end is not trained again.
    assert again.trained[0][0] == [4]
    assert story_of(again) == story_of(whole)


def test_a_trial_that_fails_takes_another_s_model_and_goes_on(tmp_path: Path) -> None:
    done = population(tmp_path / "sweep", fails=(3, 40.0))
    third = done.record.trials[3]
    (exchange,) = third.exchanges[:1]
    assert (exchange.metric, exchange.donor) == (None, "trial-04")
    assert third.metric is not None
    assert third.failure is None


def test_a_pin_is_the_donor_s_files(tmp_path: Path) -> None:
    home, seen = tmp_path / "sweep", []

    class Looks(Trainer):
        def __call__(self, numbers: list[int], leg: Leg) -> None:
            if leg.until == 80.0:
                pinned = home / ".donors" / "trial-01.2" / "checkpoint-20"
                own = home / "trial-04" / "checkpoint-20"
                seen.append(os.path.samefile(pinned / "state.json", own / "state.json"))
                run, _ = read_sweep(None, [*EVAL, f"output_dir={home / 'trial-01.2'}"]).read()
                seen.append(going_on(run, home).reward.resume_from_checkpoint == str(pinned))
            super().__call__(numbers, leg)

    home.mkdir()
    record = Record(home, "eval_accuracy", "max", {})
    train_population(record, RATES, PBT, 5, 4, Looks(record))
    assert seen == [True, True]


def test_table_and_page_tell_who_went_on_from_whom_and_how_the_best_came_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = population(tmp_path / "sweep").record.sweep
    assert sweep.best is not None
    print_sweep(sweep)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = [line for line in lines if line[:2] == ["40%", "trial-01"]]
    changed = sweep.trials[0]
    value = changed.legs[1][1][0].partition("=")[2]
    assert row == ["40%", "trial-01", "(0.0400)", "trial-04", "(0.1600)", "trial-01.2", value]
    stretches = schedule_of(sweep.trials, sweep.best)
    begins = next(place for place, line in enumerate(lines) if line[:1] == ["from-to"])
    told = [(line[0], line[1]) for line in lines[begins + 1 : begins + 1 + len(stretches)]]
    assert told == [(f"{one.begin:.0f}-{one.end:.0f}%", one.name) for one in stretches]
    page = Page(write_sweep_report(sweep).read_text())
    cells = page.of("td")
    at = cells.index("40%")
    assert cells[at : at + 7] == ["40%", "trial-01", "0.0400", "trial-04", "0.1600", "trial-01.2", value]
    assert page.of("h2").count("Population") == 1
    # Its curve goes on through both directories.
    assert [point[0] for point in curve_of_trial(changed, "eval_accuracy")] == [
        10.0 * n for n in range(1, 11)
    ]


def test_a_leg_whose_checkpoint_is_gone_does_not_begin_anew(tmp_path: Path) -> None:
    run, _ = read_sweep(None, [*EVAL, f"output_dir={tmp_path / 'trial-01.2'}"]).read()
    with pytest.raises(CheckpointError, match=r"`trial-01\.2` was to go on from"):
        going_on(run, tmp_path)
    run, _ = read_sweep(None, [*EVAL, f"output_dir={tmp_path / 'trial-01'}"]).read()
    assert going_on(run, tmp_path) == run


def test_the_record_reads_back_what_was_exchanged(tmp_path: Path) -> None:
    done = population(tmp_path / "sweep")
    again = Record(tmp_path / "sweep", "eval_accuracy", "max", {})
    assert again.trials == done.record.trials
    assert again.until == done.record.until == 120.0
    text = (tmp_path / "sweep" / "sweep.json").read_text()
    (tmp_path / "sweep" / "sweep.json").write_text(text.replace('"donor"', '"giver"'))
    with pytest.raises(RunDirectoryError, match="damaged"):
        Record(tmp_path / "sweep", "eval_accuracy", "max", {})


def test_a_population_that_is_never_compared_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class AtTheEnd(Trainer):
        def _train(self, number: int, until: float) -> None:
            super()._train(number, 100.0)

    record = Record(tmp_path, "eval_accuracy", "max", {})
    train_population(record, RATES, PBT, 5, 2, AtTheEnd(record))
    assert "changed nothing" in caplog.text
