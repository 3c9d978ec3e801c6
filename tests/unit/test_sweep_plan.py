"""Which trials a sweep has, and how they are told apart: pure, before anything starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rayrm import cli
from rayrm.errors import ConfigError, DataError, ModelError, RunDirectoryError
from rayrm.sweep_settings import Range, SweepConfig, read_sweep, space_of, space_of_params
from rayrm.train.storage import RunStorage
from rayrm.train.sweep import _Plan, run_sweep
from rayrm.train.sweep_plan import Words, check_space, corners, in_order, plan_trials
from tests.tiny import save_tiny, tiny_rows, write_rows


def planned(params: list[str], seed: int = 0, **settings: Any) -> list[Words]:
    sweep, space = SweepConfig(**settings), space_of_params(params)
    check_space(space, sweep)
    return plan_trials(space, sweep, seed)


def test_lists_make_every_combination_in_order() -> None:
    assert planned(["learning_rate=1e-5,3e-5", "model.lora.r=8,16"]) == [
        ("learning_rate=1e-5", "model.lora.r=8"),
        ("learning_rate=1e-5", "model.lora.r=16"),
        ("learning_rate=3e-5", "model.lora.r=8"),
        ("learning_rate=3e-5", "model.lora.r=16"),
    ]


def test_commas_inside_lists_and_quotes_do_not_separate_values() -> None:
    assert planned(['model.lora.target_modules=["q_proj","v_proj"],"all-linear"']) == [
        ('model.lora.target_modules=["q_proj","v_proj"]',),
        ('model.lora.target_modules="all-linear"',),
    ]


def test_draws_lie_in_their_range_repeat_with_the_seed_and_spread_by_the_logarithm() -> None:
    params = ["learning_rate=log:1e-6:1e-2", "warmup_steps=uniform:0:0.2", "num_train_epochs=int:1:3"]
    plan = planned(params, 3, num_trials=400)
    assert plan == planned(params, 3, num_trials=400)
    assert plan != planned(params, 4, num_trials=400)
    rates, shares, epochs = ([float(trial[place].partition("=")[2]) for trial in plan] for place in (0, 1, 2))
    assert min(rates) >= 1e-6
    assert max(rates) <= 1e-2
    # The middle of a log range is 1e-4; 400 draws put the mean of log10 within 0.25 of it (4 deviations).
    assert sum(map(math.log10, rates)) / len(rates) == pytest.approx(-4, abs=0.25)
    assert sum(shares) / len(shares) == pytest.approx(0.1, abs=0.012)
    # A third each, within 4 deviations of 400 draws.
    assert [epochs.count(number) / 400 for number in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.095)


def test_each_listed_value_gets_as_many_draws() -> None:
    plan = planned(["seed=1,2", "learning_rate=log:1e-6:1e-4"], num_trials=3)
    assert [trial[0] for trial in plan] == ["seed=1"] * 3 + ["seed=2"] * 3
    assert len({trial[1] for trial in plan}) == 6


def test_a_random_search_draws_from_lists_too_and_more_draws_keep_the_first() -> None:
    params = ["seed=1,2,3", "learning_rate=log:1e-6:1e-4"]
    plan = planned(params, search="random", num_trials=60)
    assert len(plan) == 60
    seeds = [trial[0] for trial in plan]
    # Each value before any comes again, in an order that is drawn anew.
    thirds = [tuple(seeds[start : start + 3]) for start in range(0, 60, 3)]
    assert all(set(third) == {"seed=1", "seed=2", "seed=3"} for third in thirds)
    assert len(set(thirds)) > 3
    assert planned(params, search="random", num_trials=90)[:60] == plan


def test_corners_try_each_value_both_ends_and_one_in_between() -> None:
    space = space_of_params(["seed=1,2,3", "learning_rate=log:1e-6:1e-4", "num_train_epochs=int:1:3"])
    *ends, within = corners(space)
    assert ends == [
        ("seed=1", "learning_rate=1e-06", "num_train_epochs=1"),
        ("seed=2", "learning_rate=0.0001", "num_train_epochs=3"),
    ]
    seed, rate, epochs = within
    assert (seed, epochs) == ("seed=3", "num_train_epochs=3")
    assert 1e-6 < float(rate.partition("=")[2]) < 1e-4


def test_a_space_is_the_same_in_any_order_and_with_its_keys_sections(tmp_path: Path) -> None:
    one = {"seed": [1, 2], "learning_rate": [1e-5, 2e-5]}
    other = {"learning_rate": [1e-5, 2e-5], "reward": {"seed": [1, 2]}}
    assert list(in_order(space_of(one)).items()) == list(in_order(space_of(other)).items())
    with pytest.raises(ConfigError, match=r"`space.seed` and `space.reward.seed` are one setting"):
        in_order(space_of({"seed": [1, 2], "reward": {"seed": [3]}}))
    plans = [
        _Plan(read_sweep(None, [*EVAL, f"output_dir={tmp_path}", f"sweep.space={json.dumps(space)}"]), ())
        for space in (one, other)
    ]
    assert plans[0].trials == plans[1].trials
    assert plans[0].identity == plans[1].identity


def test_a_sweep_is_known_by_the_rows_of_a_step_whatever_they_are_made_of(tmp_path: Path) -> None:
    def identity(*words: str) -> dict[str, Any]:
        return _Plan(read_sweep(None, [*EVAL, f"output_dir={tmp_path}", *words]), ["seed=1,2"]).identity

    one = identity("cluster.num_workers=2", "per_device_train_batch_size=4")
    assert identity("cluster.num_workers=4", "per_device_train_batch_size=2") == one
    other = identity("cluster.num_workers=4", "per_device_train_batch_size=4")
    assert {key for key in one if one[key] != other[key]} == {"rows_per_step"}


def test_trials_have_a_store_and_names_of_their_own(tmp_path: Path) -> None:
    """Two sweeps of one store, and two trials, share no key; in trackers each trial is a run."""
    runs = []
    for home in ("first", "second"):
        words = [*EVAL, f"output_dir={tmp_path / home}", "storage_path=file:///shared/store"]
        plan = _Plan(read_sweep(None, words), ["seed=1,2"])
        runs += [plan.run_of(number, trial).reward for number, trial in enumerate(plan.trials or (), start=1)]
        runs.append(plan.run_of(1, ("seed=1",), plan.home / "trial-01.2").reward)
    assert [RunStorage(str(one.storage_path), Path(str(one.output_dir)), {}).url for one in runs] == [
        f"file:///shared/store/{sweep}/{trial}"
        for sweep in ("first", "second")
        for trial in ("trial-01", "trial-02", "trial-01.2")
    ]
    assert [one.run_name for one in runs[:3]] == ["first-trial-01", "first-trial-02", "first-trial-01.2"]
    named = _Plan(read_sweep(None, [*EVAL, f"output_dir={tmp_path}", "run_name=rates"]), ["seed=1,2"])
    assert named.run_of(2, ("seed=2",)).reward.run_name == "rates-trial-02"


def test_a_store_that_holds_another_sweep_of_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store" / "sweep" / "trial-01").mkdir(parents=True)
    (tmp_path / "store" / "sweep" / "trial-01" / "identity.json").write_text("{}")
    base, pairs = save_tiny(tmp_path / "base"), write_rows(tmp_path / "pairs.jsonl", tiny_rows(2))
    words = [f"model.name={base}", f"data.train={pairs}", f"data.eval={pairs}"]
    words += [f"output_dir={tmp_path / 'sweep'}", f"storage_path=file://{tmp_path / 'store'}"]
    with pytest.raises(RunDirectoryError, match=r"store/sweep` holds trials of a sweep already"):
        run_sweep(read_sweep(None, words), ["seed=1,2"])
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "store" / "sweep" / "trial-01" / "identity.json").unlink()
    (tmp_path / "store" / "sweep" / "trial-01").rmdir()
    plan = _Plan(read_sweep(None, words), ["seed=1,2"])
    plan.check_places(begins=True)  # its own probe is no trial
    words[-1] = f"storage_path=file://{tmp_path / 'file' / 'store'}"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="takes no object"):
        run_sweep(read_sweep(None, words), ["seed=1,2"])
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("params", "settings", "said"),
    [
        ([], {}, "--param learning_rate=1e-5,3e-5"),
        (["learning_rate"], {}, "key=values"),
        (["learning_rate=1,2", "learning_rate=3"], {}, "given twice"),
        (["learning_rate=log:1e-6:1e-4"], {}, "--trials 8"),
        (["learning_rate=1,2"], {"num_trials": 3}, "range"),
        (["learning_rate=1,2"], {"search": "random"}, '"random" draws: say how many'),
        (["learning_rate=log:1e-4:1e-6"], {"num_trials": 2}, "below HIGH"),
        (["learning_rate=log:0:1"], {"num_trials": 2}, "above 0"),
        (["learning_rate=log:1"], {"num_trials": 2}, "KIND:LOW:HIGH"),
        (["num_train_epochs=int:1:2.5"], {"num_trials": 2}, "whole ends"),
        (["learning_rate=loguniform:1e-6:1e-4"], {"num_trials": 2}, "no kind of range. Type one of log"),
        (["learning_rate=unifrom:1e-6:1e-4"], {"num_trials": 2}, "`unifrom` is no kind"),
        (["learning_rate=uniform:1:1"], {"num_trials": 2}, "below HIGH"),
        (["learning_rate=log:1e-6:inf"], {"num_trials": 2}, "below HIGH"),
        (["learning_rate=1e-5,1e-5"], {}, "`space.learning_rate` lists `1e-5` twice"),
        (["output_dir=a,b"], {}, "`space.output_dir` cannot vary: each trial has a directory"),
        (["data.eval=a,b"], {}, "`space.data.eval` cannot vary: trials that are measured"),
        (["sweep.num_trials=1,2"], {}, "`space.sweep.num_trials` cannot vary"),
        (["hub_token=a,b"], {}, "`space.hub_token` cannot vary"),
        (["label_smoothing=0,0.1"], {"metric": "eval_loss"}, "`space.label_smoothing` changes what"),
    ],
)
def test_a_parameter_that_cannot_be_planned_is_refused(
    params: list[str], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        planned(params, **settings)
    assert said in str(refusal.value)


SWEEP = """
[model]
name = "m"
[data]
train = "d.jsonl"
eval = "e.jsonl"
[sweep]
metric = "eval_loss"
mode = "min"
num_trials = 2
[sweep.space]
learning_rate = { log = [1e-6, 1e-4] }
num_train_epochs = { int = [1, 4] }
model.lora.r = [4, 8]
"model.lora.target_modules" = [["q_proj"], "all-linear"]
lr_scheduler_type = ["cosine", "linear"]
gradient_checkpointing = [true]
"""


def test_the_space_of_a_file_is_that_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(SWEEP)
    file = read_sweep(tmp_path / "sweep.toml", ["sweep.num_trials=5", "seed=7"])
    run, sweep = file.read(["model.lora.r=8"])
    assert (sweep.metric, sweep.mode, sweep.num_trials) == ("eval_loss", "min", 5)
    assert (run.reward.seed, run.model.lora and run.model.lora.r) == (7, 8)
    assert file.read()[0].model.lora is None  # words of one trial are not another's
    # Which way is better the metric says, and the file where it will: a loss that is to grow is its matter.
    assert file.read(["sweep.mode=none"])[1].direction == sweep.direction == "min"
    assert file.read(["sweep.metric=eval_good_mse", "sweep.mode=none"])[1].direction == "min"
    assert file.read(["sweep.metric=eval_accuracy", "sweep.mode=none"])[1].direction == "max"
    assert file.read(["sweep.mode=max"])[1].direction == "max"
    space = space_of(sweep.space)
    assert space["learning_rate"] == Range("log", 1e-6, 1e-4)
    assert space == space_of_params(
        [
            "learning_rate=log:1e-6:1e-4",
            "num_train_epochs=int:1:4",
            "model.lora.r=4,8",
            'model.lora.target_modules=["q_proj"],all-linear',
            "lr_scheduler_type=cosine,linear",
            "gradient_checkpointing=true",
        ]
    )
    for words in plan_trials(space, sweep, 0):
        made, _ = file.read(words)
        assert made.model.lora is not None
        assert made.model.lora.target_modules in (["q_proj"], "all-linear")
        assert made.reward.num_train_epochs in (1, 2, 3, 4)


def test_a_value_of_a_file_that_looks_like_another_type_stays_a_string() -> None:
    assert space_of({"run_name": ["1", "true", "a,b", "c"]}) == {"run_name": ('"1"', '"true"', '"a,b"', "c")}


def test_config_prints_a_sweep_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.toml").write_text(SWEEP)
    assert cli.main(["config", str(tmp_path / "sweep.toml"), "sweep.grace=20"]) == 0
    (tmp_path / "again.toml").write_text(capsys.readouterr().out)
    once, again = (read_sweep(tmp_path / name).read()[1] for name in ("sweep.toml", "again.toml"))
    assert again.grace == 20
    assert space_of(again.space) == space_of(once.space)


def test_the_sweep_in_jobs_is_one(tmp_path: Path) -> None:
    file = read_sweep(Path(__file__).parents[2] / "jobs" / "sweep.toml", [f"output_dir={tmp_path}"])
    run, sweep = file.read()
    plan = plan_trials(space_of(sweep.space), sweep, run.reward.seed)
    assert len(plan) == 12
    assert {file.read(words)[0].reward.warmup_steps for words in plan} == {0.0, 0.1}


BASE = ["model.name=m", "data.train=d.jsonl"]
EVAL = [*BASE, "data.eval=e.jsonl"]


@pytest.mark.parametrize(
    ("words", "params", "said"),
    [
        (BASE, ["learning_rate=1e-5,2e-5"], r"data\.eval"),
        (EVAL, ["learning_rate=1e-5,fast"], "learning_rate"),
        (EVAL, ["learning_rat=1e-5"], "learning_rate"),
        ([*EVAL, "sweep.search=optuna", "sweep.num_trials=3"], ["zero_stage=int:1:9"], "zero_stage"),
        ([*EVAL, "sweep.scheduler=pbt"], ["seed=1,2"], "`seed` must stay"),
        ([*EVAL, "sweep.scheduler=asha", "num_train_epochs=1"], ["seed=1,2"], "eval_steps=0.1"),
        ([*EVAL, "sweep.scheduler=asha", "sweep.metric=train_loss"], ["seed=1,2"], "eval_loss"),
        ([*EVAL, "sweep.metrik=eval_loss"], ["seed=1,2"], "Did you mean `metric`"),
        ([*EVAL, "sweep.space.seed={log=[1]}"], [], "two numbers"),
        ([*EVAL, "sweep.space.seed=3"], [], "list of values or a range"),
        ([*EVAL, "sweep.space.seed=[]"], [], r"`space.seed` \(\[\]\) must be a list"),
        ([*EVAL, "sweep.space.seed={randint=[1,9]}"], [], "`randint` is no kind of range"),
        ([*EVAL, "sweep.space.seed={int=[1,9],step=2}"], [], "one kind and two ends"),
        ([*EVAL, "sweep.space.model.lora.r={log=[4,2]}"], [], "the range of `model.lora.r`: LOW"),
        ([*EVAL, "sweep.space.model.lora.r=4"], [], r"`space.model.lora.r` \(4\)"),
        (
            [*EVAL, "sweep.search=optuna", "sweep.num_trials=3"],
            ["per_device_train_batch_size=log:1:64"],
            "per_device_train_batch_size",
        ),
        ([*EVAL, "sweep.scheduler=pbt", "sweep.metric=loss"], ["learning_rate=1,2"], '"pbt" compares the'),
        ([*EVAL, "push_to_hub=true"], ["seed=1,2"], "hf upload REPOSITORY registry/NAME/VERSION"),
        (
            [*BASE, 'data.eval={near="e.jsonl", far="f.jsonl"}'],
            ["seed=1,2"],
            "--metric eval_near_accuracy",
        ),
        ([*EVAL, "sweep.metric=eval_acuracy"], ["seed=1,2"], "Did you mean `eval_accuracy`"),
        ([*EVAL, "sweep.metric=eval_chat_accuracy"], ["seed=1,2"], "is nothing that a run logs"),
        (
            [*BASE, 'data.eval={near="e.jsonl"}', "sweep.metric=eval_near_los"],
            ["seed=1,2"],
            "Did you mean `eval_near_loss`",
        ),
        ([*EVAL, "sweep.space.learning_rate={lag=[1e-6,1e-4]}"], [], "`lag` is no kind of range"),
    ],
)
def test_a_sweep_is_refused_before_anything_starts(
    tmp_path: Path, words: list[str], params: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run_sweep(read_sweep(None, [*words, f"output_dir={tmp_path / 'sweep'}"]), params)
    assert list(tmp_path.iterdir()) == []


def test_what_all_trials_lack_is_missed_before_anything_starts(tmp_path: Path) -> None:
    base, pairs = save_tiny(tmp_path / "base"), write_rows(tmp_path / "pairs.jsonl", tiny_rows(2))
    home, absent = tmp_path / "sweep", tmp_path / "absent"
    for model, train, held_out, said in (
        (absent, pairs, pairs, ModelError),
        (base, absent, pairs, DataError),
        (base, pairs, absent, DataError),
    ):
        words = [f"model.name={model}", f"data.train={train}", f"data.eval={held_out}", f"output_dir={home}"]
        with pytest.raises(said, match="absent"):
            run_sweep(read_sweep(None, words), ["seed=1,2"])
    words = [f"model.name={base}", f"data.train={pairs}", f"data.eval={pairs}", f"output_dir={home}"]
    assert cli.main(["sweep", *words, "sweep.publish=../x", "sweep.space.seed=[1, 2]"]) == 2
    assert not (home / "sweep.json").exists()


def test_one_run_of_a_tracker_is_not_for_all_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    words = [*EVAL, f"output_dir={tmp_path / 'sweep'}", "report_to=wandb"]
    with pytest.raises(ConfigError, match=r"WANDB_RUN_ID \(one\).*unset WANDB_RUN_ID"):
        run_sweep(read_sweep(None, words), ["seed=1,2"])
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_refused_and_stays(tmp_path: Path) -> None:
    kept = tmp_path / "sweep" / "precious"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(RunDirectoryError, match="output_dir"):
        run_sweep(read_sweep(None, [*EVAL, f"output_dir={tmp_path / 'sweep'}"]), ["learning_rate=1e-5"])
    assert [path.name for path in kept.parent.iterdir()] == ["precious"]
    assert kept.read_text() == "mine"


def test_another_sweep_s_directory_is_refused_with_what_differs(tmp_path: Path) -> None:
    home = finished_sweep(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"reward\.seed: 42 there, 43 here"):
        run_sweep(read_sweep(None, [*EVAL, f"output_dir={home}", "seed=43"]), ["learning_rate=1e-5,2e-5"])
    with pytest.raises(RunDirectoryError, match=r"sweep\.space\.learning_rate"):
        run_sweep(read_sweep(None, [*EVAL, f"output_dir={home}"]), ["learning_rate=1e-5,3e-5"])


def test_a_finished_sweep_is_told_again_and_nothing_starts(tmp_path: Path) -> None:
    home = finished_sweep(tmp_path)
    sweep = run_sweep(read_sweep(None, [*EVAL, f"output_dir={home}"]), ["learning_rate=1e-5,2e-5"])
    # By the records: of the first trial the last value, and of the second, killed before it was written down.
    assert [trial.metric for trial in sweep.trials] == [0.5, 0.75]
    assert sweep.best == sweep.trials[1]


def finished_sweep(root: Path) -> Path:
    """What a sweep leaves whose process was killed when its last trial had just ended."""
    home = root / "sweep"
    words = ["learning_rate=1e-5", "learning_rate=2e-5"]
    for number, accuracies in ((1, (0.25, 0.5)), (2, (0.9, 0.75))):
        trial = home / f"trial-{number:02d}"
        trial.mkdir(parents=True)
        records = [{"step": step, "eval_accuracy": value} for step, value in enumerate(accuracies, start=1)]
        (trial / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (trial / "progress.json").write_text('{"step": 2, "num_steps": 2, "finished": true}')
    identity = _Plan(read_sweep(None, [*EVAL, f"output_dir={home}"]), ["learning_rate=1e-5,2e-5"]).identity
    trials = [
        {"words": [word], "directory": f"trial-{number:02d}", "metric": metric, "stopped_at": None}
        for number, (word, metric) in enumerate(zip(words, (0.5, None), strict=True), start=1)
    ]
    (home / "sweep.json").write_text(json.dumps({"identity": identity, "trials": trials}))
    return home
