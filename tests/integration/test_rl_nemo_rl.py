"""NeMo-RL's contract, executed: our environment actor as `create_env` starts it, asked as its rollouts ask.

NeMo-RL is on no package index (PyPI's is a placeholder). The calls are those of NVIDIA-NeMo/RL at 7ea279ab:
nemo_rl/environments/utils.py (`create_env`) and nemo_rl/experience/rollouts.py (`calculate_rewards`: messages
of role and content alone, in groups by task; the six fields by their order, each indexed by sample).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from rayrm.errors import ConfigError, MissingExtraError, RewardUnavailableError, ScoreError
from rayrm.rl import nemo_rl
from rayrm.rl.nemo_rl import RewardEnvironment, RewardEnvironmentActor
from rayrm.serve.client import RewardClient
from tests.served import SAME, sent_together, served
from tests.tiny import CHAT_TEMPLATE, WORDS, save_tiny, tiny_tokenizer

NAME = "nemo-test"
QUESTIONS = [[{"role": "user", "content": f"the {word} cat?"}] for word in WORDS[:12]]
ANSWERS = [" ".join(WORDS[n % 9 : n % 9 + 1 + n % 5]) for n in range(12)]


@pytest.fixture(scope="module")
def reward(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardClient]:
    with served(save_tiny(tmp_path_factory.mktemp("nemo")), NAME) as client:
        yield client


@pytest.fixture
def environment(reward: RewardClient) -> Iterator[Any]:
    actor = created({"service": NAME, "end": "<|end|>"})
    yield actor
    ray.get(actor.shutdown.remote())
    ray.kill(actor)


def created(config: dict[str, Any]) -> Any:
    """As `create_env`."""
    runtime_env = {"py_executable": sys.executable, "env_vars": dict(os.environ)}
    return RewardEnvironment.options(runtime_env=runtime_env, num_cpus=0.1).remote(config)


def logs() -> list[list[dict[str, str]]]:
    """Message logs as `math_hf_data_processor` and the generation leave them: the prompt rendered already."""
    tokenizer = tiny_tokenizer()
    rendered = [
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        for question in QUESTIONS
    ]
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(rendered, ANSWERS, strict=True)
    ]


def calculated(groups: list[tuple[list[Any], list[Any]]], environment: Any) -> tuple[list[float], Any]:
    """As `calculate_rewards` puts the answers of its groups together."""
    results = ray.get([environment.step.remote(messages, infos) for messages, infos in groups])
    rewards, ended, rest = [], [], []
    for observations, metadata, stop_strings, task_rewards, terminateds, answers in results:
        for place in range(len(terminateds)):
            rewards.append(task_rewards[place])
            ended.append(terminateds[place])
            rest.append((observations[place], metadata[place], stop_strings[place], answers[place]))
    assert torch.tensor(ended).all()
    return torch.stack(rewards).tolist(), rest


@pytest.mark.ray
def test_a_batch_and_single_samples_get_the_services_scores(environment: Any, reward: RewardClient) -> None:
    result = reward.score(QUESTIONS, [[{"role": "assistant", "content": answer}] for answer in ANSWERS])
    assert len({round(score, 4) for score in result.scores}) > 8  # they tell answers apart
    infos: list[Any] = [{"ground_truth": "x"}] * 12
    rewards, rest = calculated([(logs(), infos)], environment)
    assert rewards == pytest.approx(result.scores, abs=SAME)
    assert rest[3] == ({"role": "environment", "content": ""}, {"ground_truth": "x"}, None, ANSWERS[3])
    singles, _ = calculated([([log], [None]) for log in logs()], environment)
    assert singles == pytest.approx(result.scores, abs=SAME)
    # Messages in the metadata go before the text of the log, sample by sample.
    mixed = [{"messages": question} if n % 3 else None for n, question in enumerate(QUESTIONS)]
    assert calculated([(logs(), mixed)], environment)[0] == pytest.approx(result.scores, abs=SAME)
    batch = {"rewards": torch.tensor(rewards)}
    same, metrics = ray.get(environment.global_post_process_and_metrics.remote(batch))
    assert torch.equal(same["rewards"], batch["rewards"])
    assert metrics[f"version/{result.version}"] == 1.0
    assert metrics["reward_mean"] == pytest.approx(sum(result.scores) / 12, abs=SAME)
    assert metrics["reward_max"] == pytest.approx(max(result.scores), abs=SAME)
    assert metrics["truncated"] == 0.0
    assert ray.get(environment.global_post_process_and_metrics.remote({}))[1] == {}


@pytest.mark.ray
def test_samples_of_asynchronous_rollouts_travel_together(
    reward: RewardClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = RewardEnvironmentActor({"service": NAME, "end": "<|end|>"})

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(actor.step([log], [None]) for log in logs()))

    with sent_together(monkeypatch) as sizes:
        returned = asyncio.run(all_of_them())
    assert sum(sizes) == 12
    assert len(sizes) <= 6
    assert len({round(one.rewards.item(), 4) for one in returned}) > 8


@pytest.mark.ray
def test_no_reward_is_made_up(environment: Any, reward: RewardClient) -> None:
    with pytest.raises(RewardUnavailableError, match="no application 'nowhere' runs"):
        calculated([(logs(), [None] * 12)], created({"service": "nowhere", "end": ""}))
    with pytest.raises(ConfigError, match=r"`env\.NAME\.end` is missing"):
        calculated([(logs(), [None] * 12)], created({"service": NAME}))
    with pytest.raises(ScoreError, match=r"message_log_batch\[1\] does not end with the text of an answer"):
        calculated([([logs()[0], logs()[1][:1]], [None, None])], environment)


def test_the_template_of_these_tests_writes_the_end_that_they_give() -> None:
    """Else the rendered text and the messages would be scored alike by chance."""
    assert CHAT_TEMPLATE.count("<|end|>") == 2
    shown = tiny_tokenizer().apply_chat_template(
        [*QUESTIONS[0], {"role": "assistant", "content": "x"}], tokenize=False
    )
    assert shown.endswith("x<|end|>")


def test_settings_that_are_none_of_its_own_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`num_workers` \(2\) is no setting"):
        RewardEnvironmentActor({"num_workers": 2})
    with pytest.raises(ConfigError, match=r"`end` \(3\) must be text"):
        RewardEnvironmentActor({"end": 3})


def test_register_tells_nemo_rl_the_actor_and_its_python(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError, match="Run inside a checkout of https"):
        nemo_rl.register()
    known: dict[str, str] = {}
    pythons: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {
        "nemo_rl": {"__path__": []},
        "nemo_rl.environments": {"__path__": []},
        "nemo_rl.environments.utils": {"register_env": known.__setitem__},
        "nemo_rl.distributed": {"__path__": []},
        "nemo_rl.distributed.ray_actor_environment_registry": {"ACTOR_ENVIRONMENT_REGISTRY": pythons},
        "nemo_rl.distributed.virtual_cluster": {"PY_EXECUTABLES": SimpleNamespace(SYSTEM="python")},
    }
    for name, attributes in values.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    nemo_rl.register("reward")
    assert known == {"reward": "rayrm.rl.nemo_rl.RewardEnvironment"}
    assert pythons == {"rayrm.rl.nemo_rl.RewardEnvironment": "python"}
