"""What a sweep remembers of its trials when it goes on, and how it chooses: no Ray is started."""

from __future__ import annotations

import copy
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from rayrm.errors import ConfigError, RunDirectoryError
from rayrm.runfile import Run
from rayrm.sweep_settings import Space, SweepConfig, read_sweep, space_of_params
from rayrm.train.sweep import _leaving
from rayrm.train.sweep_plan import Words, values_by_key
from rayrm.train.sweep_record import Record, Trial, best_of, curve_of, value_of
from rayrm.train.sweep_search import Ends, Halving, Optuna, Planned, Search
from rayrm.train.sweep_trial import STOP

SPACE: Space = space_of_params(["learning_rate=log:1e-6:1e-2", "num_train_epochs=int:1:3", "run_name=a,b"])


def trial(metric: float | None, stopped_at: float | None = None) -> Trial:
    return Trial(("x=1",), Path("t"), metric, None if metric is not None else "lost", stopped_at)


def test_the_best_is_by_the_mode_and_failed_and_stopped_trials_do_not_take_part() -> None:
    trials = [trial(0.5), trial(None), trial(0.7), trial(0.7), trial(0.1), trial(0.9, 10.0), trial(0.0, 10.0)]
    assert best_of(trials, "max") is trials[2]
    assert best_of(trials, "min") is trials[4]
    assert best_of([trial(None), trial(0.9, 10.0)], "max") is None


def write_run(directory: Path, values: list[float], *, num_steps: int, best: str | None = None) -> None:
    """A run that evaluated every 10 steps."""
    directory.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, float]] = []
    for place, value in enumerate(values, start=1):
        records += [{"step": 10 * place, "loss": 9.0}, {"step": 10 * place, "eval_loss": value}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    progress = {"num_steps": num_steps, "finished": True, "best_checkpoint": best}
    (directory / "progress.json").write_text(json.dumps(progress))


def test_a_trial_s_value_is_that_of_the_model_it_leaves(tmp_path: Path) -> None:
    write_run(tmp_path, [0.5, 0.3, 0.4], num_steps=40, best="checkpoint-20")
    assert curve_of(tmp_path, "eval_loss") == [(25.0, 0.5), (50.0, 0.3), (75.0, 0.4)]
    assert value_of(tmp_path, "eval_loss", loads_best=False) == 0.4
    assert value_of(tmp_path, "eval_loss", loads_best=True) == 0.3
    with pytest.raises(ConfigError, match="Type one of eval_loss, loss"):
        value_of(tmp_path, "eval_accuracy", loads_best=False)


def record_of(home: Path, **identity: Any) -> Record:
    home.mkdir(exist_ok=True)
    return Record(home, "eval_loss", "min", identity)


def test_the_record_remembers_what_ended_and_what_began(tmp_path: Path) -> None:
    first = record_of(tmp_path, seed=1)
    for number in (1, 2, 3, 4):
        first.begin(number, (f"seed={number}",))
    first.end(1, metric=0.25)
    first.end(2, metric=0.5, stopped_at=30.0)
    first.end(3, failure="no memory")
    again = record_of(tmp_path, seed=1)
    kept = [again.trials[number] for number in (1, 2, 3, 4)]
    assert [(one.metric, one.stopped_at, one.ended) for one in kept] == [
        (0.25, None, True),
        (0.5, 30.0, True),
        (None, None, False),  # tried again
        (None, None, False),
    ]
    assert [one.words for one in kept] == [(f"seed={number}",) for number in (1, 2, 3, 4)]
    assert again.sweep.best == kept[0]
    with pytest.raises(RunDirectoryError, match="seed: 1 there, 2 here"):
        record_of(tmp_path, seed=2)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="damaged"):
        record_of(tmp_path, seed=1)


def searching(record: Record, source: Any, **numbers: list[int]) -> Search:
    file = read_sweep(None, ["model.name=m", "data.train=d"])

    def run_of(number: int, words: Words) -> Run:
        return file.read(words)[0]

    return Search(record, source, run_of=run_of, mode="min", hand_over=lambda run: run, **numbers)  # type: ignore[arg-type]


def test_a_sweep_goes_on_with_the_trials_that_were_cut_off_and_then_the_rest(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    plan: list[Words] = [(f"seed={number}",) for number in (1, 2, 3)]
    record.begin(2, plan[1])
    search = searching(record, Planned(plan), again=[2], new=[1, 3])
    told = [search.suggest(f"id-{number}") for number in range(4)]
    assert [one["number"] for one in told[:3]] == [2, 1, 3]
    assert [one["held"].run.reward.seed for one in told[:3]] == [2, 1, 3]
    assert told[3] == Search.FINISHED
    assert json.loads((tmp_path / "sweep.json").read_text())["trials"][2]["words"] == ["seed=3"]
    (tmp_path / STOP).touch()
    assert searching(record, Planned(plan), again=[1], new=[]).suggest("id") == Search.FINISHED


def test_what_tune_writes_of_the_search_and_of_trials_holds_no_secret(tmp_path: Path) -> None:
    token, handed = "hf_secret_of_this_test", []
    file = read_sweep(None, ["model.name=m", "data.train=s3://me:secret@bucket/d", f"hub_token={token}"])

    def hand_over(run: Run) -> str:
        handed.append(run)
        return "a reference"

    search = Search(
        record_of(tmp_path),
        Planned([("seed=1",)]),
        again=[],
        new=[1],
        run_of=lambda number, words: file.read(words)[0],
        mode="min",
        hand_over=hand_over,
    )
    told = search.suggest("id")
    assert handed[0].reward.hub_token == token
    assert copy.deepcopy(told)["held"].run == "a reference"  # as Tune copies what it is told
    written = cloudpickle.dumps({"search": search, "trial": told})
    assert b"a reference" in written
    assert token.encode() not in written
    assert b"secret@bucket" not in written


def test_a_trial_whose_words_make_no_run_fails_alone(tmp_path: Path) -> None:
    search = searching(record_of(tmp_path), Planned([("zero_stage=9",)]), again=[], new=[1])
    held = search.suggest("id")["held"]
    assert held.run is None
    assert "zero_stage" in held.refusal


def told_of(number: int, **last: Any) -> Any:
    return SimpleNamespace(config={"number": number}, last_result=last)


def test_each_ending_is_written_down_and_told_to_the_search(tmp_path: Path) -> None:
    record, heard = record_of(tmp_path), []
    source = SimpleNamespace(
        tell=lambda number, ended, progress: heard.append((number, ended.metric, progress))
    )
    ends = Ends(record, source, 4)  # type: ignore[arg-type]
    for number in (1, 2, 3, 4):
        record.begin(number, ("seed=1",))
    nan = float("nan")
    ends.on_trial_complete(0, [], told_of(1, value=0.5, progress=100.0))
    ends.on_trial_complete(0, [], told_of(2, value=0.9, progress=25.0, ending="stopped"))
    ends.on_trial_complete(0, [], told_of(3, value=nan, failure="max_length (3) leaves nothing"))
    ends.on_trial_complete(0, [], told_of(4, value=0.1, progress=50.0, ending="left"))
    assert heard == [(1, 0.5, 100.0), (2, 0.9, 25.0), (3, None, 0.0)]
    assert [record.trials[number].ended for number in (1, 2, 3, 4)] == [True, True, False, False]
    assert record.trials[2].stopped_at == 25.0
    assert record.sweep.best == record.trials[1]  # the fourth goes on at the next start


def test_halving_stops_the_worse_trials_and_remembers_those_of_an_earlier_start(tmp_path: Path) -> None:
    """Of three trials at a rung the best third goes on: with losses 0.5 and 0.4 before, 0.45 is stopped and
    0.3 is not. Without a memory the first to come would go on whatever it has."""
    record = record_of(tmp_path)
    sweep = SweepConfig(metric="eval_loss", mode="min", scheduler="asha", grace=25, reduction=3)
    for number, loss in ((1, 0.5), (2, 0.4)):
        record.begin(number, (f"seed={number}",))
        write_run(record.directory(number), [loss], num_steps=40)
        record.end(number, metric=loss)
    for remembers in (False, True):
        scheduler = Halving(record, sweep)
        if remembers:
            scheduler.remember(1, "eval_loss")
            scheduler.remember(2, "eval_loss")
        stopped = []
        for number, loss in ((3, 0.45), (4, 0.3)):
            record.begin(number, (f"seed={number}",))
            record.directory(number).mkdir(exist_ok=True)
            seen = SimpleNamespace(trial_id=f"id-{number}", config={"number": number})
            scheduler.on_trial_add(None, seen)
            result = {"value": loss, "progress": 25.0}
            assert scheduler.on_trial_result(None, seen, result) == "CONTINUE"  # it leaves by itself
            stopped.append((record.directory(number) / STOP).exists())
            (record.directory(number) / STOP).unlink(missing_ok=True)
        assert stopped == [remembers, False]


def loss_of(words: Words) -> float:
    """Least at a rate of 1e-4, 2 epochs and the name b."""
    values = dict(word.split("=") for word in words)
    rate, epochs = math.log10(float(values["learning_rate"])), int(values["num_train_epochs"])
    return (rate + 4) ** 2 + abs(epochs - 2) + (values["run_name"] != "b")


def test_optuna_s_suggestions_lie_in_the_space_and_get_better() -> None:
    sweep = SweepConfig(metric="eval_loss", mode="min", search="optuna", num_trials=60)
    source = Optuna(SPACE, sweep, seed=0, num_before=0)
    losses = []
    for number in range(1, 61):
        words = source.ask(number)
        assert [word.partition("=")[0] for word in words] == list(SPACE)
        values = dict(word.split("=") for word in words)
        assert 1e-6 <= float(values["learning_rate"]) <= 1e-2
        assert values["num_train_epochs"] in ("1", "2", "3")
        losses.append(loss_of(words))
        source.tell(number, Trial(words, Path("t"), losses[-1]), 100.0)
    # The first ten are random; by chance the last twenty would have their mean, about 3.
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:10]) / 10


def test_optuna_goes_on_with_what_the_record_knows_and_draws_nothing_twice() -> None:
    sweep = SweepConfig(metric="eval_loss", mode="min", search="optuna", num_trials=30)
    first = Optuna(SPACE, sweep, seed=0, num_before=0)
    asked = [first.ask(number) for number in range(1, 13)]
    again = Optuna(SPACE, sweep, seed=0, num_before=12)
    for number, words in enumerate(asked[:9], start=1):
        again.tell(number, Trial(words, Path("t"), loss_of(words)), 100.0)
    again.tell(10, Trial(asked[9], Path("t"), 5.0, stopped_at=30.0), 30.0)
    again.tell(11, Trial(asked[10], Path("t"), None, "lost"), 0.0)
    again.again(12, asked[11])
    study = again._study
    assert [one.state.name for one in study.trials] == ["COMPLETE"] * 9 + ["PRUNED", "FAIL", "RUNNING"]
    assert study.trials[9].intermediate_values == {30: 5.0}
    assert [one.value for one in study.trials[:9]] == [loss_of(words) for words in asked[:9]]
    # All digits survive the words.
    assert [values_by_key(SPACE, words) for words in asked] == [one.params for one in study.trials]
    assert again.ask(13) not in asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_tells_the_trials_and_the_second_does_what_it_did(
    tmp_path: Path, number: signal.Signals
) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with _leaving(tmp_path / STOP) as told:
            signal.raise_signal(number)
            assert (told, heard) == ([number], [])
            assert (tmp_path / STOP).exists()
            signal.raise_signal(number)
            assert heard == [number]
        assert not (tmp_path / STOP).exists()
        signal.raise_signal(number)
        assert heard == [number, number]
    finally:
        signal.signal(number, before)
