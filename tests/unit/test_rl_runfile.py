"""RL run files: what they become, what they refuse, and that they are read back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrm.errors import ConfigError
from rayrm.rl.runfile import dump_rl_run, read_rl_run, with_absolute_places

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
        (['reward.model={"a": "x", "b": "y"}'], r"`use` is missing: \[reward\] has the models a, b"),
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
