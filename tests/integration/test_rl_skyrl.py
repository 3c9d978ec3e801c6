"""SkyRL's own generator (skyrl 0.3.0) drives our environment against a deployed reward model.

Real: `SkyRLGymGenerator`, its configuration, and skyrl_gym. Stood in for: the inference engine (fixed
answers), `func_timeout`, which skyrl_gym's SQL environment imports and nothing here calls; two packages' own
`__init__`, which load SkyRL's HTTP API and its image generator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from rayrm.errors import ConfigError, RewardUnavailableError
from rayrm.serve.client import RewardClient
from tests.installed import only
from tests.served import SAME, sent_together, served
from tests.tiny import WORDS, save_tiny, tiny_tokenizer

NAME = "skyrl-test"
QUESTIONS = [[{"role": "user", "content": f"the {word} cat?"}] for word in WORDS[:24]]
ANSWERS = [" ".join(WORDS[n % 9 : n % 9 + 1 + n % 5]) for n in range(24)]


@pytest.fixture(scope="module")
def reward(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardClient]:
    with served(save_tiny(tmp_path_factory.mktemp("skyrl")), NAME) as client:
        yield client


@pytest.fixture
def skyrl() -> Iterator[None]:
    timed: dict[str, Any] = {"FunctionTimedOut": TimeoutError, "func_timeout": None}
    with only("skyrl", bare=("skyrl.backends", "skyrl.train.generators"), stand_ins={"func_timeout": timed}):
        skyrl_gym = pytest.importorskip("skyrl_gym")
        yield
        if "reward" in skyrl_gym.registry:
            skyrl_gym.envs.deregister("reward")


class Engine:
    """SkyRL's inference engine with answers that are known beforehand, by prompt; all come at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._num_asked = 0
        self._all_asked = asyncio.Event()
        self._answers = {
            tuple(
                tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
            ): answer
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        }

    async def generate(self, asked: Any, model: str | None = None) -> dict[str, Any]:
        answers = [self._answers[tuple(ids)] for ids in asked["prompt_token_ids"]]
        self._num_asked += len(answers)
        if self._num_asked == len(ANSWERS):
            self._all_asked.set()
        await self._all_asked.wait()
        return {
            "responses": answers,
            "response_ids": [self._tokenizer.encode(text, add_special_tokens=False) for text in answers],
            "stop_reasons": ["stop"] * len(answers),
        }

    async def finish_session(self, session_id: str) -> None: ...


def rollout(service: str, *, workers: int = 32, batched: bool = False) -> Any:
    """SkyRL's `generate` over all questions, with the lines that its user writes."""
    from skyrl.train.config import GeneratorConfig, SkyRLGymConfig
    from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
    from skyrl_gym.envs import deregister, register
    from skyrl_gym.envs.registration import registry

    if "reward" in registry:
        deregister("reward")
    register(
        id="reward", entry_point="rayrm.rl.skyrl:RewardEnv", kwargs={"service": service, "deadline_s": 60}
    )
    tokenizer = tiny_tokenizer()
    generator = SkyRLGymGenerator(
        GeneratorConfig(max_input_length=500, batched=batched),
        SkyRLGymConfig(max_env_workers=workers),
        Engine(tokenizer),
        tokenizer,
    )
    batch: dict[str, Any] = {
        "prompts": QUESTIONS,
        "env_classes": ["reward"] * len(QUESTIONS),
        "env_extras": [{} for _ in QUESTIONS],
    }
    return asyncio.run(generator.generate(batch, disable_tqdm=True))


def scores_of(client: RewardClient) -> tuple[list[float], str]:
    completions = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    result = client.score(QUESTIONS, completions)
    return result.scores, result.version


@pytest.mark.ray
@pytest.mark.parametrize("batched", [False, True])
def test_skyrls_generator_gives_each_answer_the_services_score(
    skyrl: None, reward: RewardClient, batched: bool
) -> None:
    expected, version = scores_of(reward)
    assert len({round(score, 4) for score in expected}) > 10  # they tell answers apart
    output = rollout(NAME, batched=batched)
    given = [reward if batched else sum(reward) for reward in output["rewards"]]
    assert given == pytest.approx(expected, abs=SAME)
    metrics = output["rollout_metrics"]
    assert metrics[f"environment/version/{version}"] == 1.0
    assert metrics["environment/score"] == pytest.approx(sum(expected) / 24, abs=SAME)


@pytest.mark.ray
def test_answers_that_are_ready_together_travel_together(
    skyrl: None, reward: RewardClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sent_together(monkeypatch) as sizes:
        rollout(NAME)
    assert sum(sizes) == 24
    assert len(sizes) <= 12


@pytest.mark.ray
def test_no_reward_is_made_up_where_the_service_is_gone_or_would_block(
    skyrl: None, reward: RewardClient
) -> None:
    with pytest.raises(RewardUnavailableError, match="no application 'nowhere' runs"):
        rollout("nowhere")
    with pytest.raises(ConfigError, match=r"max_env_workers` \(0\)"):
        rollout(NAME, workers=0)
