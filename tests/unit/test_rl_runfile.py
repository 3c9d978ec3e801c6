"""What an RL run is told: read, refused, written back; and what its directory may hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rayrm.config import ClusterConfig
from rayrm.errors import ConfigError, DataError, ModelError, RunDirectoryError
from rayrm.rl.prompts import prompt_set, without_heldout
from rayrm.rl.run_directory import begin, own_directory
from rayrm.rl.run_log import last_checkpoint, shares_of_versions
from rayrm.rl.runfile import dump_rl_run, read_rl_run, with_absolute_places
from rayrm.rl.settings import PromptsConfig, RewardSource, RLRun
from rayrm.rl.shaping import Shaping
from rayrm.rl.trainer_config import check_policy, check_trainer, trainer_config
from tests.tiny import save_tiny

WORDS = ["policy.name=org/model", "prompts.train=data", "reward.model=registry/helpful", "output_dir=out"]


def test_the_shipped_file_is_read_and_written_back(tmp_path: Path) -> None:
    run = read_rl_run(
        "jobs/grpo.toml", ["algorithm=rloo", "max_steps=7", "shaping.clip=2", "serve.num_cpus=1"]
    )
    assert run.algorithm == "rloo"
    assert run.trainer["max_steps"] == 7
    assert run.trainer["learning_rate"] == 2e-5
    assert run.shaping.clip == 2.0
    again = tmp_path / "run.toml"
    again.write_text(dump_rl_run(run))
    assert read_rl_run(again) == run


def test_fields_are_those_of_the_algorithms_own_config() -> None:
    assert read_rl_run(None, [*WORDS, "epsilon_high=0.3"]).trainer["epsilon_high"] == 0.3
    with pytest.raises(ConfigError, match=r"\[rl\] `normalize_advantage` is no setting of GRPOConfig"):
        read_rl_run(None, [*WORDS, "normalize_advantage=true"])
    run = read_rl_run(None, [*WORDS, "algorithm=rloo", "normalize_advantages=true"])
    assert run.trainer["normalize_advantages"] is True
    with pytest.raises(ConfigError, match=r"`algorithm` \('ppo'\)"):
        read_rl_run(None, [*WORDS, "algorithm=ppo"])
    with pytest.raises(ConfigError, match=r"\[rl\] `output_dir` is missing"):
        read_rl_run(None, WORDS[:3])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward.service=reward"], r"one of `model` .* and `service`"),
        (['reward.model={"a": "x", "b": "y"}'], r"`use` is missing among the models a, b"),
        (
            ['reward.model={"a": "x", "b": "y"}', "reward.use=a", "reward.gold=a"],
            r"`gold` \('a'\) is the reward",
        ),
        (["reward.use=a", 'reward.weights={"a": 1.0}'], r"`use` \('a'\) with `weights`"),
        (["reward.weights={}"], "`weights` .* no reward"),
        (["prompts.samples_per_prompt=1"], "samples_per_prompt"),
        (["policy.name= "], "names no model"),
        (["lerning_rate=1"], "Did you mean `learning_rate`"),
        (["polcy.name=x"], "Did you mean `policy`"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_rl_run(None, [*WORDS, *words])


def test_places_are_absolute_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "registry" / "helpful").mkdir(parents=True)
    run = with_absolute_places(read_rl_run(None, WORDS))
    assert run.policy.name == "org/model"
    assert run.prompts.train == str(tmp_path / "data")
    assert run.reward.model == str(tmp_path / "registry" / "helpful")
    assert run.output_dir == tmp_path / "out"


def a_run(**trainer: object) -> RLRun:
    run = read_rl_run(None, [*WORDS, "cluster.num_workers=2"])
    given = {"num_generations": 8, "per_device_train_batch_size": 4, "max_steps": 1}
    return dataclasses.replace(run, trainer={"output_dir": "out", **given, **trainer})


def test_batches_are_checked_for_all_workers_together() -> None:
    check_trainer(a_run(), 4, 3)  # 2 workers x 4 completions: one prompt of 8
    with pytest.raises(ConfigError, match=r"refused by TRL's GRPOConfig: .*divisible"):
        check_trainer(a_run(num_generations=3), 4, 3)
    check_trainer(a_run(tf32=True, fp16=True), 4, 3)  # a matter of the workers' hardware
    with pytest.raises(ConfigError, match="3 prompts are fewer than the 4 that a step of 2 workers takes"):
        check_trainer(a_run(num_generations=2), 3, 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_generations_eval": 4}, "Set `prompts.samples_per_prompt`"),
        ({"eval_strategy": "steps"}, "answered before and after"),
        ({"dataloader_drop_last": True}, "Every held-out prompt is answered"),
        ({"remove_unused_columns": True}, "Columns of the prompts go to the reward"),
        ({"resume_from_checkpoint": "x"}, "goes on from the last checkpoint"),
        ({"per_device_eval_batch_size": 3}, r"must be a multiple of `prompts.samples_per_prompt` \(2\)"),
        ({"max_steps": "ten"}, r"`rl.max_steps` \('ten'\) must be a number"),
        ({"learning_rat": 1.0}, "Did you mean `learning_rate`"),
    ],
)
def test_fields_that_would_be_ignored_or_fail_late_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_trainer(a_run(**given), 100, 3)


def test_a_policy_is_a_model_that_writes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`policy.name` \('/nope/dir'\) does not exist"):
        check_policy("/nope/dir")
    with pytest.raises(ModelError, match="is no model that can be loaded"):
        check_policy(str(tmp_path))
    with pytest.raises(ModelError, match="holds LlamaForSequenceClassification, which cannot write"):
        check_policy(str(save_tiny(tmp_path / "reward")))


def test_one_process_at_a_time_trains_in_a_directory(tmp_path: Path) -> None:
    run = with_absolute_places(a_run(output_dir=str(tmp_path / "out")))
    with (
        own_directory(run),
        pytest.raises(RunDirectoryError, match="another process trains in"),
        own_directory(run),
    ):
        pass
    with own_directory(run):
        pass
    nowhere = with_absolute_places(a_run(output_dir="/proc/none/out"))
    with pytest.raises(RunDirectoryError, match="cannot be made"), own_directory(nowhere):
        pass


def test_save_steps_saves() -> None:
    assert str(trainer_config(a_run(save_steps=5, num_generations=2), 0).save_strategy).endswith("STEPS")
    assert str(trainer_config(a_run(num_generations=2), 0).save_strategy).endswith("NO")


def test_a_directory_is_this_runs_or_is_refused(tmp_path: Path) -> None:
    run = with_absolute_places(a_run(output_dir=str(tmp_path / "out")))
    begin(run)
    begin(dataclasses.replace(run, prompts=PromptsConfig(train="other")))  # nothing has been learned yet
    begin(run)
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    elsewhere = ClusterConfig(num_workers=1)
    begin(dataclasses.replace(run, cluster=elsewhere, reward=RewardSource(service="other")))
    for other, key in (
        (dataclasses.replace(run, shaping=Shaping(clip=1.0)), "shaping.clip"),
        (dataclasses.replace(run, trainer={**run.trainer, "beta": 0.1}), "rl.beta"),
    ):
        with pytest.raises(RunDirectoryError, match=f"another run. They differ in {key}"):
            begin(other)
    (tmp_path / "out" / "finished.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="a finished run"):
        begin(run)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="holds something else"):
        begin(with_absolute_places(a_run(output_dir=str(tmp_path / "model"))))


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    for step, files in ((4, ("trainer_state.json", "shaping.json")), (8, ("trainer_state.json",)), (12, ())):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
    assert last_checkpoint(tmp_path, with_shaping=True) == tmp_path / "checkpoint-4"
    assert last_checkpoint(tmp_path, with_shaping=False) == tmp_path / "checkpoint-8"
    assert last_checkpoint(tmp_path / "checkpoint-4", with_shaping=False) is None


def test_a_versions_share_of_a_step_adds_up() -> None:
    """As TRL gives it where two ranks met two versions: the mean over those ranks that logged each."""
    shares = shares_of_versions({"a/version/x": 1.0, "a/version/y": 1.0, "b/version/z": 1.0, "reward": 3.0})
    assert shares == {"a/version/x": 0.5, "a/version/y": 0.5, "b/version/z": 1.0}


def test_prompts_keep_their_columns_and_what_the_template_is_given() -> None:
    tools = [{"name": "add", "parameters": {"x": 1}}], [{"name": "sub", "parameters": {"y": 2}}]
    rows = [
        {"prompt": "a", "tools": tools[0]},
        {"prompt": "b", "tools": tools[1], "kind": "x"},
        {"prompt": "c"},
    ]
    kept = prompt_set(rows)
    assert kept["kind"] == [None, "x", None]
    assert [json.loads(text) for text in kept["tools"][:2]] == [*tools]
    assert kept["tools"][2] is None
    held_out = [{"prompt": [{"role": "user", "content": " B?"}]}]
    assert without_heldout(rows, held_out) == [rows[0], rows[2]]
    with pytest.raises(DataError, match=r"every prompt to train on is held out too"):
        without_heldout(rows[:1], rows)
