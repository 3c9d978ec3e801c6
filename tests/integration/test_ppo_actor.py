"""examples/ppo_actor.py on tiny models: a real service, whose replica is killed and whose version rolls."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from examples import ppo_actor
from rayrm.errors import DataError, RunDirectoryError, ScoreError
from rayrm.rl.ppo import PPOSettings
from rayrm.rl.ppo_learner import Learner, Rollout
from rayrm.serve.client import RewardClient
from rayrm.serve.registry import PublishedModel, publish
from rayrm.serve.scorer import RewardModel
from tests.integration.test_cli import write_rows
from tests.served import SAME, replica_pids, served
from tests.tiny import WORDS, save_tiny
from tests.unit.test_ppo import Reward, questions, save_policy

pytestmark = pytest.mark.ray
SHORT = ["--prompts-per-step", "8", "--max-completion-length", "4", "--heldout-prompts", "4"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


def words(home: Path, policy: Path, reward: str, prompts: list[Any], *more: str) -> list[str]:
    for name in ("train", "heldout"):
        write_rows(home / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    return [
        "--policy", str(policy), "--reward", reward, "--prompts", str(home / "train.jsonl"), "--heldout",
        str(home / "heldout.jsonl"), "--output-dir", str(home / "out"), *SHORT, *more,
    ]  # fmt: skip


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def service(ray_cluster: None, published: PublishedModel) -> Iterator[RewardClient]:
    with served(published, f"ppo-{os.getpid()}") as reward:
        yield reward
        reward.roll(published.version)


def test_a_killed_replica_and_a_roll_lose_no_reward_and_each_score_is_its_version_s(
    service: RewardClient,
    published: PublishedModel,
    second: PublishedModel,
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [f"what is the {word}?" for word in WORDS[:12]]
    steps, name = 6, service.name
    plain = ppo_actor.step_prompts

    def disturbed(*given: Any) -> Iterator[Any]:
        for number, taken in enumerate(plain(*given), 1):
            if number == 3:
                os.kill(replica_pids(name)[0], signal.SIGKILL)
            if number == 5:
                service.roll(second.version)
            yield taken

    monkeypatch.setattr(ppo_actor, "step_prompts", disturbed)
    gain = ppo_actor.main(
        words(tmp_path, policy, name, prompts, "--steps", str(steps), "--learning-rate", "1e-3")
    )
    out = tmp_path / "out"
    log, samples = read_lines(out / "metrics.jsonl"), read_lines(out / "samples.jsonl")
    assert [record["step"] for record in log] == list(range(1, steps + 1))
    assert [sample["step"] for sample in samples] == [step for step in range(1, steps + 1) for _ in range(8)]
    assert [record["versions"] for record in log] == [[published.version]] * 4 + [[second.version]] * 2
    for model in (published, second):
        of_it = [sample for sample in samples if sample["version"] == model.version]
        expected = RewardModel.from_pretrained(model.path).score(
            [sample["prompt"] for sample in of_it], [sample["completion"] for sample in of_it]
        )
        assert [sample["score"] for sample in of_it] == pytest.approx(expected, abs=SAME)
    for record in log:
        of_it = [sample for sample in samples if sample["step"] == record["step"]]
        assert record["reward"] == pytest.approx(sum(sample["score"] for sample in of_it) / 8)
        assert {sample["version"] for sample in of_it} == set(record["versions"])
        assert record[f"{name}/version/{record['versions'][0]}"] == 1
    heldout = json.loads((out / "heldout.json").read_text())
    assert heldout["version"] == second.version
    assert heldout["gain"]["gain"] == gain.gain
    assert [len(heldout[side][0]) for side in ("before", "samples_after")] == [2, 2]
    assert "<html" in (out / "report.html").read_text()
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_two_actors_learn_what_one_learns_from_the_same_rollout(ray_cluster: None, policy: Path) -> None:
    """Up to the order of sums in float32."""
    fields: dict[str, Any] = {"prompts_per_step": 8, "num_mini_batches": 1, "max_completion_length": 6}
    fields["learning_rate"] = 1e-3
    alone = Learner(PPOSettings(**fields), str(policy), Reward())
    rollout, _ = alone.roll_out(questions(8))
    rewards = torch.arange(8.0)
    shares = []
    for rank in range(2):
        of_rank = slice(rank, None, 2)
        kept = {
            name: getattr(rollout, name)[of_rank] for name in ("logprobs", "reference_logprobs", "values")
        }
        generated = rollout.generated
        share = type(generated)(
            generated.tokens[of_rank], generated.attention_mask[of_rank], generated.mask[of_rank],
            generated.ended[of_rank], generated.texts[of_rank],
        )  # fmt: skip
        rest = {"entropy": rollout.entropy[of_rank], "scores": rollout.scores[of_rank]}
        shares.append((Rollout(generated=share, **kept, **rest), rewards[of_rank]))
    means = alone.learn(rollout, rewards)

    actors = ppo_actor.start_actors(PPOSettings(num_actors=2, **fields), str(policy), Reward())
    try:
        both = ray.get([actor.learn.remote(*share) for actor, share in zip(actors, shares, strict=True)])
        weights = ray.get(
            [actor.__ray_call__.remote(lambda learner: learner.policy.state_dict()) for actor in actors]
        )
        # A rank that fails ends the step, though the other one waits for its gradients.
        with pytest.raises(IndexError):
            ppo_actor.gathered([actors[0].step.remote(1, questions(4)), actors[1].step.remote(1, [])])
    finally:
        for actor in actors:
            ray.kill(actor)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(means, abs=1e-5)
    for name, expected in alone.policy.state_dict().items():
        assert torch.equal(weights[0][name], weights[1][name])
        # Adam turns a gradient that is all but zero into a step of the learning rate, whatever its sign.
        far = (weights[0][name] - expected).abs() > 1e-5
        assert far.float().mean() < 0.01


def test_a_published_model_is_served_for_the_run_and_bad_input_is_named(
    ray_cluster: None, policy: Path, tmp_path: Path
) -> None:
    published = publish(save_tiny(tmp_path / "reward"), tmp_path / "registry", "judge")
    prompts = questions(9)
    given = words(tmp_path, policy, str(published.path.parent), prompts, "--steps", "1", "--num-actors", "2")
    gain = ppo_actor.main(given)
    assert gain.num_prompts == 4
    assert ppo_actor.SERVED_HERE not in serve.status().applications
    assert len(read_lines(tmp_path / "out" / "samples.jsonl")) == 8
    with pytest.raises(RunDirectoryError, match="is not empty"):
        ppo_actor.main(given)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ScoreError, match=r"plain strings .* given to a model trained on messages"):
        ppo_actor.main(words(other, policy, str(published.path.parent), ["the cat?"], "--steps", "1"))
    assert ppo_actor.SERVED_HERE not in serve.status().applications
    (tmp_path / "out2").mkdir()
    with pytest.raises(DataError, match="all strings, or all message lists"):
        ppo_actor.main(words(tmp_path / "out2", policy, "reward", ["the cat?", *prompts]))
