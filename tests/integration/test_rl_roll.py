"""ROLL's contract, executed: our reward worker as ROLL's `Cluster` starts it, asked as its schedulers ask.

ROLL is on no package index: `tests/stand_ins/roll` has what the worker imports, after alibaba/ROLL at
8eb27cc2. The calls are those of roll/distributed/executor/cluster.py (actors with `system_envs`, keyword
`worker_config`), and `compute_rewards` of roll/distributed/scheduler/generate_scheduler.py (a prompt's
answers, many at a time) and reward_scheduler.py (one batch, a share for each worker).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from rayrm.errors import MissingExtraError, RewardUnavailableError, ScoreError
from rayrm.serve.client import RewardClient
from rayrm.serve.registry import PublishedModel
from tests.served import SAME, sent_together, served
from tests.tiny import WORDS, save_tiny, tiny_tokenizer

NAME = "roll-test"
QUESTIONS = [[{"role": "user", "content": f"the {word} cat?"}] for word in WORDS[:12]]
ANSWERS = [" ".join(WORDS[n % 9 : n % 9 + 1 + n % 5]) for n in range(12)]
STAND_INS = Path(__file__).parents[1] / "stand_ins"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("roll"))


@pytest.fixture(scope="module")
def reward(ray_cluster: None, model: Path) -> Iterator[RewardClient]:
    with served(model, NAME) as client:
        yield client


@pytest.fixture
def roll(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`rayrm.rl.roll` beside what stands in for ROLL."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    before = set(sys.modules)
    yield importlib.import_module("rayrm.rl.roll")
    for name in set(sys.modules) - before:
        if name == "rayrm.rl.roll" or name.split(".")[0] == "roll":
            del sys.modules[name]


def started(roll: Any, tokenizer: Path, service: str = NAME, num_workers: int = 2) -> list[Any]:
    """The workers of a `rewards` entry, as `Cluster` starts them."""
    config = SimpleNamespace(world_size=num_workers)
    workers = []
    for rank in range(num_workers):
        env_vars = {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_workers),
            "RAYRM_REWARD": service,  # of system_envs
            "PYTHONPATH": os.pathsep.join([str(STAND_INS), str(STAND_INS.parents[1])]),
        }
        options = {"num_cpus": 0.01, "max_concurrency": 1000, "runtime_env": {"env_vars": env_vars}}
        workers.append(ray.remote(roll.RewardWorker).options(**options).remote(worker_config=config))
    pipeline = SimpleNamespace(actor_train=policy_of(tokenizer))
    ray.get([worker.initialize.remote(pipeline) for worker in workers])
    return workers


def policy_of(tokenizer: Path) -> Any:
    """The settings that the worker takes the policy's tokenizer and the data's columns from."""
    return SimpleNamespace(
        model_args=SimpleNamespace(model_name_or_path=str(tokenizer)),
        data_args=SimpleNamespace(messages=None, prompt=None),
    )


def batch_of(roll: Any, **columns: Any) -> Any:
    """Prompts and answers as the rollout leaves them: padded, with the tokens that end them."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode(answer + "<|end|>", add_special_tokens=False) for answer in ANSWERS]
    longest = max(map(len, ids))
    responses = torch.tensor([one + [tokenizer.pad_token_id] * (longest - len(one)) for one in ids])
    return roll.DataProto.from_dict({"responses": responses, "prompts": torch.zeros(12, 3).long()}, columns)


def expected_of(client: RewardClient) -> tuple[list[float], str]:
    result = client.score(QUESTIONS, [[{"role": "assistant", "content": answer}] for answer in ANSWERS])
    assert len({round(score, 4) for score in result.scores}) > 8  # they tell answers apart
    return result.scores, result.version


@pytest.mark.ray
def test_workers_give_each_response_the_services_score(roll: Any, reward: RewardClient, model: Path) -> None:
    expected, version = expected_of(reward)
    workers = started(roll, model)
    assert [ray.get(worker.get_rank_info.remote()).dp_rank for worker in workers] == [0, 1]
    data = batch_of(roll, messages=QUESTIONS, domain=["preference"] * 12)
    # One at a time, all at once: as the generate scheduler asks.
    asked = [workers[n % 2].compute_rewards.remote(data.rows(n, n + 1)) for n in range(12)]
    alone = [output.batch["response_level_rewards"].item() for output in ray.get(asked)]
    assert alone == pytest.approx(expected, abs=SAME)
    # A share for each worker, as the reward scheduler asks; messages as JSON, which ROLL takes too.
    told = batch_of(roll, messages=[json.dumps(question) for question in QUESTIONS])
    shares = ray.get(
        [worker.compute_rewards.remote(told.rows(6 * n, 6 * n + 6)) for n, worker in enumerate(workers)]
    )
    for output, share in zip(shares, (expected[:6], expected[6:]), strict=True):
        assert output.batch["response_level_rewards"].tolist() == pytest.approx(share, abs=SAME)
        assert output.batch["scores"].tolist() == pytest.approx(share, abs=SAME)
        assert output.batch["scores"].dtype == torch.float32
        assert output.batch["token_level_rewards"].shape == told.rows(0, 6).batch["responses"].shape
        assert not output.batch["token_level_rewards"].any()
        metrics = output.meta_info["metrics"]
        assert metrics[f"{NAME}/score_mean"] == pytest.approx(sum(share) / 6, abs=SAME)
        assert metrics[f"{NAME}/version/{version}"] == 1.0


@pytest.mark.ray
def test_prompts_that_are_rewarded_together_travel_together(
    roll: Any, reward: RewardClient, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker in this process, asked as Ray asks an actor of coroutines."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "RAYRM_REWARD": NAME}.items():
        monkeypatch.setenv(name, value)
    worker = roll.RewardWorker(worker_config=None)
    worker.initialize(SimpleNamespace(actor_train=policy_of(model)))
    data = batch_of(roll, messages=QUESTIONS)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(worker.compute_rewards(data.rows(n, n + 1)) for n in range(12)))

    with sent_together(monkeypatch) as sizes:
        outputs = asyncio.run(all_of_them())
    assert sum(sizes) == 12
    assert len(sizes) <= 6
    assert [output.batch["scores"].item() for output in outputs] == pytest.approx(
        expected_of(reward)[0], abs=SAME
    )


@pytest.mark.ray
def test_a_prompt_column_is_plain_text(roll: Any, ray_cluster: None, published: PublishedModel) -> None:
    prompts = [str(question[0]["content"]) for question in QUESTIONS]
    with served(published, "roll-plain") as plain:
        expected = plain.score(prompts, ANSWERS).scores
        (worker,) = started(roll, published.path, "roll-plain", num_workers=1)
        output = ray.get(worker.compute_rewards.remote(batch_of(roll, prompt=prompts)))
        assert output.batch["scores"].tolist() == pytest.approx(expected, abs=SAME)


@pytest.mark.ray
def test_no_reward_is_made_up(roll: Any, reward: RewardClient, model: Path) -> None:
    (worker,) = started(roll, model, num_workers=1)
    with pytest.raises(ScoreError, match=r"neither `messages` nor `prompt` \(it has domain"):
        ray.get(worker.compute_rewards.remote(batch_of(roll, domain=["preference"] * 12)))
    (lost,) = started(roll, model, "nowhere", num_workers=1)
    with pytest.raises(RewardUnavailableError, match="no application 'nowhere' runs"):
        ray.get(lost.compute_rewards.remote(batch_of(roll, messages=QUESTIONS)))


def test_methods_are_bound_as_rolls_cluster_looks_for_them(roll: Any) -> None:
    flag = importlib.import_module("roll.distributed.scheduler.decorator").BIND_WORKER_METHOD_FLAG
    modes = {
        name: getattr(getattr(roll.RewardWorker, name), flag)["dispatch_mode"].name
        for name in ("initialize", "compute_rewards")
    }
    assert modes == {"initialize": "ONE_TO_ALL", "compute_rewards": "DP_MP_COMPUTE"}


def test_without_roll_the_import_says_what_to_type() -> None:
    with pytest.raises(MissingExtraError, match="Run inside a checkout of https"):
        importlib.import_module("rayrm.rl.roll")
