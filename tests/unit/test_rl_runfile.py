"""What an RL run is told: read, refused, written back; and what its directory may hold."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from trl import GRPOConfig, RLOOConfig

from rayrm.config import ClusterConfig
from rayrm.errors import ConfigError, DataError, ModelError, RunDirectoryError
from rayrm.rl.prompts import prompt_set, read_prompts, without_heldout
from rayrm.rl.run_directory import begin, own_directory
from rayrm.rl.run_log import last_checkpoint, shares_of_versions
from rayrm.rl.runfile import dump_rl_run, read_rl_run, with_absolute_places
from rayrm.rl.settings import PromptsConfig, RewardSource, RLRun
from rayrm.rl.shaping import Shaping
from rayrm.rl.trainer_config import _BOUNDS, check_policy, check_trainer, trainer_config
from tests.tiny import CHAT_TEMPLATE, save_tiny, tiny_llama_config, tiny_tokenizer

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
    check_trainer(a_run(num_generations=24, gradient_accumulation_steps=3), 1, 0)
    check_trainer(a_run(generation_batch_size=16), 2, 0)
    both = {"generation_batch_size": 16, "steps_per_generation": 2}
    with pytest.raises(ConfigError, match=r"refused by TRL's GRPOConfig: .*both"):
        check_trainer(a_run(**both), 4, 0)
    check_trainer(a_run(tf32=True, fp16=True), 4, 3)  # a matter of the workers' hardware
    with pytest.raises(ConfigError, match="3 prompts are fewer than the 4 that a step of 2 workers takes"):
        check_trainer(a_run(num_generations=2), 3, 0)


@pytest.mark.parametrize(
    ("given", "said", "fits"),
    [
        (
            {"num_generations": 3},
            r"`rl.num_generations` \(3\) must divide the answers of a step, `per_device_train_batch_size` "
            r"\(4\) x `cluster.num_workers` \(2\) x `gradient_accumulation_steps` \(1\) = 8: .* Type "
            "num_generations=2 or 4, per_device_train_batch_size=3 or 6 or gradient_accumulation_steps=3",
            [
                *({"num_generations": group} for group in (2, 4)),
                *({"num_generations": 3, "per_device_train_batch_size": each} for each in (3, 6)),
                {"num_generations": 3, "gradient_accumulation_steps": 3},
            ],
        ),
        (
            {"num_generations": 12, "steps_per_generation": 2},
            r"the answers of a step, .* x `steps_per_generation` \(2\) = 16: .* Type "
            "num_generations=8 or 16, per_device_train_batch_size=3 or 6 or steps_per_generation=3",
            [
                {"num_generations": 16, "steps_per_generation": 2},
                {"num_generations": 12, "steps_per_generation": 3},
                {"num_generations": 12, "steps_per_generation": 2, "per_device_train_batch_size": 6},
            ],
        ),
        (
            {"num_generations": 3, "generation_batch_size": 32},
            r"`rl.generation_batch_size` \(32\) must be a multiple of `per_device_train_batch_size` \(4\) x "
            r"`cluster.num_workers` \(2\) and of `num_generations` \(3\). "
            "Type generation_batch_size=24 or 48",
            [{"num_generations": 3, "generation_batch_size": whole} for whole in (24, 48)],
        ),
        (
            {"num_generations": 4, "generation_batch_size": 4},
            "Type generation_batch_size=8[.]",
            [{"num_generations": 4, "generation_batch_size": 8}],
        ),
    ],
)
def test_a_step_of_split_groups_is_refused_with_values_that_fit(
    given: dict[str, object], said: str, fits: list[dict[str, object]]
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_trainer(a_run(**given), 100, 0)
    for fitting in fits:
        check_trainer(a_run(**fitting), 100, 0)


def test_one_process_with_one_answer_a_step_is_told_what_fits() -> None:
    run = read_rl_run(None, [*WORDS, "cluster.num_workers=0", "per_device_train_batch_size=1"])
    said = (
        r"\(8\) must divide the answers of a step, `per_device_train_batch_size` \(1\) x "
        r"`gradient_accumulation_steps` \(1\) = 1: .* Type per_device_train_batch_size=8 or "
        "gradient_accumulation_steps=8[.]"
    )
    with pytest.raises(ConfigError, match=said):
        check_trainer(run, 100, 0)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("max_steps=-5", "must be at least 1, or -1 to train for `num_train_epochs`"),
        ("max_steps=0", "must be at least 1, or -1"),
        ("max_steps=1.5", "must be a whole number"),
        ("num_generations=8.0", "must be a whole number, without a decimal point"),
        ("max_steps=true", "must be a number"),
        ("num_train_epochs=0", "must be above 0"),
        ("num_generations=1", "must be at least 2"),
        ("num_generations=0", "must be at least 2"),
        ("max_completion_length=0", "must be at least 1"),
        ("per_device_train_batch_size=0", "must be at least 1"),
        ("per_device_eval_batch_size=0", "must be at least 1"),
        ("gradient_accumulation_steps=-1", "must be at least 1"),
        ("steps_per_generation=0", "must be at least 1"),
        ("num_iterations=0", "must be at least 1"),
        ("logging_steps=-1", "must be above 0"),
        ("learning_rate=-1", "must be at least 0"),
        ("learning_rate=nan", "must be finite"),
        ("learning_rate=inf", "must be finite"),
        ("max_grad_norm=nan", "must be finite"),
        ("beta=inf", "must be finite"),
        ("learning_rate=[1]", "must be a number"),
        ("weight_decay=-0.1", "must be at least 0"),
        ("adam_beta2=1.0", "must be at least 0 and below 1"),
        ("seed=-1", "must be from 0 to"),
        ("beta=nan", "must be finite"),
        ("beta=-1", "must be at least 0"),
        ("epsilon=nan", "must be finite"),
        ("epsilon_high=-0.1", "must be at least 0"),
        ("epsilon_high=wide", "must be a number"),
        ("delta=0", "must be above 0"),
        ("temperature=0", "must be above 0"),
        ("temperature=-1", "must be above 0"),
        ("temperature=nan", "must be finite"),
        ("top_p=0", "must be above 0 and at most 1"),
        ("top_p=1.1", "must be above 0 and at most 1"),
        ("top_k=-1", "must be at least 0"),
        ("min_p=1.5", "must be from 0 to 1"),
        ("top_entropy_quantile=-0.2", "must be from 0 to 1"),
        ("reward_weights=[1.0, nan]", "must be finite"),
        ("generation_kwargs={typical_p = inf}", "must be finite"),
        ("fp16=yes", "must be true or false"),
    ],
)
def test_numbers_that_cannot_train_are_refused_by_name(word: str, said: str) -> None:
    run = read_rl_run(None, [*WORDS, word])
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"`rl\.{key}` \({re.escape(repr(run.trainer[key]))}\) {said}"):
        check_trainer(run, 100, 3)


def test_numbers_at_their_bounds_are_taken() -> None:
    at_bounds = {"learning_rate": 0, "beta": 0, "top_p": 1, "top_k": 0, "min_p": 0.0, "max_steps": -1}
    check_trainer(a_run(**at_bounds, num_train_epochs=0.5, warmup_steps=0.1, pad_to_multiple_of="auto"), 9, 3)


def test_numbers_that_are_bound_are_the_trainers() -> None:
    known = {one.name for kind in (GRPOConfig, RLOOConfig) for one in dataclasses.fields(kind)}
    assert set(_BOUNDS) <= known


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


def test_a_policy_renders_the_prompts_it_is_given(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a"}]
    policy = str(tmp_path)
    tiny_llama_config(architectures=["LlamaForCausalLM"]).save_pretrained(policy)
    with pytest.raises(ModelError, match=r"`policy.name` \('.*'\) is no tokenizer that can be loaded"):
        check_policy(policy)
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.save_pretrained(policy)
    check_policy(policy)
    check_policy(policy, [{"prompt": "a"}])
    no_template = r"has no `chat_template`, and prompts are message lists.* Type policy.name=MODEL.*strings"
    with pytest.raises(ModelError, match=no_template):
        check_policy(policy, [{"prompt": "a"}, {"prompt": said}])
    tokenizer.chat_template = {"tool_use": CHAT_TEMPLATE}
    tokenizer.save_pretrained(policy)
    with pytest.raises(ModelError, match=no_template):
        check_policy(policy, [{"prompt": said}])
    tokenizer.chat_template = {"tool_use": CHAT_TEMPLATE, "default": CHAT_TEMPLATE}
    tokenizer.save_pretrained(policy)
    check_policy(policy, [{"prompt": said}])


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


def test_prompts_of_two_forms_are_refused_where_the_second_begins(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n')
    with pytest.raises(
        DataError, match=r"mixed.jsonl:2: `prompt` .* is a message list, and each before it is a string"
    ):
        read_prompts(str(file))


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
    assert without_heldout(rows, [{"prompt": " B?"}]) == [rows[0], rows[2]]
    with pytest.raises(DataError, match="some are strings and others message lists"):
        without_heldout(rows, [{"prompt": [{"role": "user", "content": "B"}]}])
    with pytest.raises(DataError, match=r"every prompt to train on is held out too"):
        without_heldout(rows[:1], rows)
