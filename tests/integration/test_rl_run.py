"""RL runs on tiny models: TRL's trainers in Ray Train workers, whose only reward is the service."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from examples import grpo_actor
from rayrm.config import ClusterConfig, LoraConfig
from rayrm.errors import (
    ClusterError,
    ConfigError,
    DataError,
    RewardUnavailableError,
    RunDirectoryError,
    ScoreError,
)
from rayrm.rl.launch import RLSummary, train_policy
from rayrm.rl.prompts import read_prompts
from rayrm.rl.settings import PolicyConfig, PromptsConfig, RewardSource, RLRun
from rayrm.rl.shaping import Shaping
from rayrm.rl.trl import AsyncTRLReward
from rayrm.serve.client import RewardClient
from rayrm.serve.registry import PublishedModel, publish
from rayrm.serve.scorer import RewardModel
from rayrm.serve_settings import ServeConfig
from rayrm.train.records import read_records
from tests.served import SAME, replica_pids, served
from tests.tiny import save_tiny, tiny_llama_config, tiny_tokenizer

COLOURS = ("red", "blue", "green", "old")
SHORT: dict[str, Any] = {
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
}
"""A step is one prompt a worker."""
TWO = ClusterConfig(num_workers=2, resources_per_worker={"CPU": 0.5})
NAME = f"rl-{os.getpid()}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config()).float().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[PublishedModel]:
    """Two of one model; the first is current."""
    root = tmp_path_factory.mktemp("reward")
    found = [publish(save_tiny(root / str(n), seed=n), root / "registry", "chat") for n in (1, 0)]
    return found[::-1]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("prompts")
    files = {
        "train": [f"the {word} cat?" for word in COLOURS],
        "heldout": ["the old dog?", "a red cat?", "old?"],
    }
    for name, questions in files.items():
        rows = [{"prompt": [{"role": "user", "content": question}], "kind": name} for question in questions]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(root / f"{name}.jsonl") for name in files}


@pytest.fixture(scope="module")
def running(ray_cluster: None, versions: list[PublishedModel]) -> Iterator[RewardClient]:
    with served(versions[0], NAME) as client:
        yield client


def a_run(
    policy: str, prompts: dict[str, str], source: RewardSource, output_dir: Path, **parts: Any
) -> RLRun:
    trainer = {**SHORT, "output_dir": str(output_dir), "max_steps": 2, **parts.pop("trainer", {})}
    algorithm = parts.pop("algorithm", "grpo")
    given = PromptsConfig(**prompts) if isinstance(prompts, dict) else prompts
    return RLRun(PolicyConfig(name=policy), given, source, algorithm, trainer, **parts)


def samples_of(output_dir: Path) -> list[dict[str, Any]]:
    files = sorted(output_dir.glob("samples-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_a_run_serves_its_reward_trains_two_workers_and_leaves_nothing(
    ray_cluster: None,
    policy: str,
    prompts: dict[str, str],
    versions: list[PublishedModel],
    tmp_path: Path,
    algorithm: str,
) -> None:
    out = tmp_path / "run"
    name = f"{NAME}-{algorithm}"
    run = a_run(
        policy,
        prompts,
        RewardSource(model=str(versions[0].path)),
        out,
        algorithm=algorithm,
        cluster=TWO,
        serve=ServeConfig(name=name, num_cpus=0.2),
        trainer={"beta": 0.1},
    )
    summary = train_policy(run)
    assert name not in serve.status().applications
    assert [record["step"] for record in summary.records] == [1, 2]
    samples = samples_of(out)
    assert len(samples) == 2 * 2 * 2
    for record in summary.records:
        assert record["versions"] == [versions[0].version]
        mine = [sample["reward"] for sample in samples if sample["step"] == record["step"]]
        assert record["reward"] == pytest.approx(np.mean(mine), abs=1e-5)
        assert record["chat/score_mean"] == pytest.approx(np.mean(mine), abs=1e-5)
        assert record["chat/score_std"] == pytest.approx(np.std(mine), abs=1e-4)
        assert np.isfinite(record["kl"])
    check_scores(samples, versions)
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    check_heldout(out, versions[0], summary)
    with pytest.raises(RunDirectoryError, match="finished run"):
        train_policy(run)


def check_scores(samples: list[dict[str, Any]], versions: list[PublishedModel]) -> None:
    """Each sample's score is that of the version it names, in this process."""
    for version in versions:
        mine = [sample for sample in samples if sample["version"] == version.version]
        if mine:
            texts = [[sample[key] for sample in mine] for key in ("prompt", "completion")]
            scores = RewardModel.from_pretrained(version.path).score(*texts)
            assert scores == pytest.approx([sample["score"] for sample in mine], abs=SAME)
    known = {version.version for version in versions}
    assert {sample["version"] for sample in samples} <= known


def check_heldout(out: Path, version: PublishedModel, summary: RLSummary) -> None:
    heldout = json.loads((out / "heldout.json").read_text())
    assert [prompt[0]["content"] for prompt in heldout["prompts"]] == ["the old dog?", "a red cat?", "old?"]
    model = RewardModel.from_pretrained(version.path)
    for when in ("before", "after"):
        assert [len(row) for row in heldout[when]] == [2, 2, 2]
        for prompt, rewards, texts in zip(
            heldout["prompts"], heldout[when], heldout[f"samples_{when}"], strict=True
        ):
            answers = [[{"role": "assistant", "content": text}] for text in texts]
            assert model.score([prompt] * 2, answers) == pytest.approx(rewards, abs=SAME)
    assert summary.gain is not None
    difference = np.mean(heldout["after"]) - np.mean(heldout["before"])
    assert summary.gain.gain == pytest.approx(difference)
    assert summary.gain.low <= difference <= summary.gain.high


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def wait_for_step(output_dir: Path, step: int, thread: threading.Thread) -> None:
    deadline = time.monotonic() + 300
    while thread.is_alive() and time.monotonic() < deadline:
        if any(record["step"] >= step for record in read_records(output_dir)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.ray
@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_replica_and_a_roll_cost_no_reward(
    running: RewardClient,
    policy: str,
    prompts: dict[str, str],
    versions: list[PublishedModel],
    tmp_path: Path,
    asynchronous: bool,
) -> None:
    first = running.status()["models"]["chat"]
    target = next(version for version in versions if version.version != first)
    source = RewardSource(service=NAME, use="chat", asynchronous=asynchronous)
    run = a_run(policy, prompts, source, tmp_path / "run", cluster=TWO, trainer={"max_steps": 40})
    thread, outcome = in_thread(lambda: train_policy(run))
    wait_for_step(tmp_path / "run", 2, thread)
    (pid,) = replica_pids(NAME)
    os.kill(pid, signal.SIGKILL)
    wait_for_step(tmp_path / "run", 6, thread)
    rolled = running.roll(target.path)
    assert rolled.version == target.version
    thread.join(timeout=300)
    (summary,) = outcome
    assert isinstance(summary, RLSummary), summary
    assert [record["step"] for record in summary.records] == list(range(1, 41))
    assert all(record["versions"] for record in summary.records)
    assert summary.records[0]["versions"] == [first]
    assert summary.records[-1]["versions"] == [target.version]
    assert replica_pids(NAME) != [pid]
    assert all(np.isfinite(record["reward"]) for record in summary.records)
    samples = samples_of(tmp_path / "run")
    assert len(samples) == 40 * 2 * 2
    check_scores(samples, versions)
    # The first version scored what was answered before; the gain is of one.
    check_heldout(tmp_path / "run", target, summary)
    assert json.loads((tmp_path / "run" / "heldout.json").read_text())["version"] == target.version


@pytest.mark.ray
def test_rewards_of_two_workers_are_normalized_by_one_stream(
    running: RewardClient, policy: str, prompts: dict[str, str], tmp_path: Path
) -> None:
    source = RewardSource(service=NAME, use="chat")
    run = a_run(
        policy,
        prompts,
        source,
        tmp_path / "run",
        cluster=TWO,
        shaping=Shaping(normalize=True),
        trainer={"max_steps": 4},
    )
    train_policy(run)
    samples = samples_of(tmp_path / "run")
    seen: list[float] = []
    for step in range(1, 5):
        mine = [sample for sample in samples if sample["step"] == step]
        assert len(mine) == 4
        seen += [sample["score"] for sample in mine]
        for sample in mine:
            whole = (sample["score"] - np.mean(seen)) / np.std(seen)
            assert sample["reward"] == pytest.approx(whole, abs=1e-6)


@pytest.mark.ray
def test_a_reward_that_fails_on_one_rank_is_the_error_that_is_told(
    running: RewardClient, policy: str, prompts: dict[str, str], tmp_path: Path
) -> None:
    """Of a held-out prompt and of one to train on; the other rank waits for statistics, and is let go."""
    long = json.dumps({"prompt": [{"role": "user", "content": "red " * 700}]}) + "\n"
    for name in ("train", "heldout"):
        rows = Path(prompts[name]).read_text().splitlines(keepends=True)[:1]
        file = tmp_path / f"{name}.jsonl"
        file.write_text(rows[0] + long)
        run = a_run(
            policy,
            {**prompts, name: str(file)},
            RewardSource(service=NAME, use="chat"),
            tmp_path / f"run-{name}",
            cluster=TWO,
            shaping=Shaping(normalize=True),
        )
        with pytest.raises(ScoreError, match="truncation"):
            train_policy(run)


@pytest.mark.ray
def test_several_rewards_with_adapters_and_a_gold_reward(
    ray_cluster: None,
    policy: str,
    prompts: dict[str, str],
    versions: list[PublishedModel],
    tmp_path: Path,
) -> None:
    first, second = (str(version.path) for version in versions)
    source = RewardSource(
        model={"good": first, "bad": second, "gold": first}, weights={"good": 1.0, "bad": -0.5}, gold="gold"
    )
    run = a_run(
        policy,
        PromptsConfig(**prompts, max_train=2, max_heldout=2, samples_per_prompt=4),
        source,
        tmp_path / "run",
        serve=ServeConfig(name=f"{NAME}-several", num_cpus=0.2),
        shaping=Shaping(clip=0.2),
    )
    summary = train_policy(dataclasses.replace(run, policy=PolicyConfig(name=policy, lora=LoraConfig(r=2))))
    samples = samples_of(tmp_path / "run")
    assert len(samples) == 2 * 2
    texts = [[sample[key] for sample in samples] for key in ("prompt", "completion")]
    good, bad = (np.array(RewardModel.from_pretrained(place).score(*texts)) for place in (first, second))
    total = np.clip(good, -0.2, 0.2) - 0.5 * np.clip(bad, -0.2, 0.2)
    assert [sample["reward"] for sample in samples] == pytest.approx(total.tolist(), abs=SAME)
    assert [sample["score"] for sample in samples] == pytest.approx((good - 0.5 * bad).tolist(), abs=SAME)
    for step, record in enumerate(summary.records):
        mine = slice(2 * step, 2 * step + 2)
        assert record["good+bad/gold_mean"] == pytest.approx(good[mine].mean(), abs=SAME)
        assert record["reward"] == pytest.approx(total[mine].mean(), abs=SAME)
        assert record["versions"] == sorted(version.version for version in versions)
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert summary.gain is not None
    assert summary.gain.num_samples == 2 * 4


@pytest.mark.ray
def test_what_is_wrong_is_told_before_or_as_it_happens(
    running: RewardClient, policy: str, prompts: dict[str, str], tmp_path: Path
) -> None:
    source = RewardSource(service=NAME, use="chat")
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "the cat"}\n')
    with pytest.raises(ScoreError, match=r"plain strings .* given to a model trained on messages"):
        train_policy(a_run(policy, {"train": str(plain)}, source, tmp_path / "a"))
    with pytest.raises(RewardUnavailableError, match="'nowhere'"):
        train_policy(a_run(policy, prompts, RewardSource(service="nowhere"), tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"a service .* runs on this cluster"):
        train_policy(
            a_run(
                policy,
                prompts,
                RewardSource(model=policy),
                tmp_path / "c",
                serve=ServeConfig(name=NAME, num_cpus=0.2),
            )
        )
    with pytest.raises(ConfigError, match=r"no field of GRPOConfig. Did you mean `learning_rate`"):
        train_policy(a_run(policy, prompts, source, tmp_path / "d", trainer={"learning_rat": 1.0}))
    with pytest.raises(ConfigError, match=r"`rl.num_generations` \(3\) must divide"):
        train_policy(a_run(policy, prompts, source, tmp_path / "e", trainer={"num_generations": 3}))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "the cat"}\n{"question": "?"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: `prompt` \(None\)"):
        read_prompts(str(bad))
    for left in ("a", "b", "c", "d", "e"):
        assert not (tmp_path / left / "metrics.jsonl").exists()


@pytest.mark.ray
def test_more_than_the_cluster_has_is_refused_before_the_service_starts(
    ray_cluster: None,
    policy: str,
    prompts: dict[str, str],
    versions: list[PublishedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rayrm.rl.launch._ROOM_WAIT_S", 1.0)
    many = ClusterConfig(num_workers=2, resources_per_worker={"CPU": 8})
    run = a_run(
        policy,
        prompts,
        RewardSource(model=str(versions[0].path)),
        tmp_path / "run",
        cluster=many,
        serve=ServeConfig(name=f"{NAME}-many"),
    )
    with pytest.raises(ClusterError, match="do not fit together"):
        train_policy(run)
    assert f"{NAME}-many" not in serve.status().applications


@pytest.mark.ray
def test_the_example_runs_with_a_service_by_name(running: RewardClient, policy: str) -> None:
    log = grpo_actor.main(["--policy", policy, "--reward", NAME, "--steps", "1"])
    assert len(log) == 1
    assert NAME in serve.status().applications


@pytest.mark.ray
def test_trls_asynchronous_trainer_scores_a_group_while_others_are_generated(
    running: RewardClient, versions: list[PublishedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call of TRL's `AsyncGRPOTrainer`, which generates on meanwhile; vLLM alone is not there."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.async_grpo.async_rollout_worker import (
        RolloutGroup,
        TrainingSequence,
        _AsyncRolloutLoop,
    )

    reward = AsyncTRLReward(RewardClient(NAME, model="chat"), shaping=Shaping(clip=0.3))
    loop = _AsyncRolloutLoop.__new__(_AsyncRolloutLoop)
    loop.reward_funcs = [pickle.loads(pickle.dumps(reward))]  # it goes to a process of its own
    loop.reward_func_names = [reward.__name__]
    loop._env_reward_types = []
    asked = [[{"role": "user", "content": "the red cat?"}]] * 2
    answers = [[{"role": "assistant", "content": text}] for text in ("old dog", "blue")]

    def group() -> RolloutGroup:
        rows = [[TrainingSequence([1, 2], [0, 1], [0.0, 0.0], "a")]] * 2
        return RolloutGroup(
            asked, {}, answers, [[3, 4], [5]], rows, [0, 0], [0, 0], 0, 0, [None] * 2, [None] * 2
        )

    async def score() -> list[Any]:
        return await asyncio.gather(*(loop._score_group(group()) for _ in range(4)))

    now = next(one for one in versions if one.version == running.status()["models"]["chat"])
    scores = RewardModel.from_pretrained(now.path).score(asked, answers)
    for samples in asyncio.run(score()):
        got = [sample.metrics["reward"] for sample in samples]
        assert got == pytest.approx(np.clip(scores, -0.3, 0.3), abs=SAME)


def cut_off(command: list[str], reached: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Start a command and send a signal as soon as it has come so far; its exit status and what it said."""
    assert not reached()
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said: list[str] = []
        reading = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
        reading.start()
        try:
            deadline = time.monotonic() + 300
            while not reached():
                assert process.poll() is None, said[-30:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            if number is signal.SIGTERM:
                os.kill(process.pid, number)
                process.wait(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reading.join(timeout=30)
    return process.returncode, "".join(said)


@pytest.mark.ray
def test_a_run_that_is_cut_off_again_and_again_is_the_run_that_was_not(
    policy: str, prompts: dict[str, str], versions: list[PublishedModel], tmp_path: Path
) -> None:
    """Killed while it trains, told to leave while it trains, killed when only its end was not yet written."""
    out = tmp_path / "run"
    words = [
        f"policy.name={policy}",
        f"prompts.train={prompts['train']}",
        f"prompts.heldout={prompts['heldout']}",
        f"reward.model={versions[0].path}",
        f"output_dir={out}",
        "max_steps=30",
        "save_strategy=steps",
        "save_steps=5",
        "shaping.normalize=true",
        "serve.num_cpus=0.2",
        *(f"{name}={json.dumps(value)}" for name, value in SHORT.items()),
    ]
    command = [sys.executable, "-m", "rayrm.cli", "rl", *words]
    cut_off(command, lambda: (out / "checkpoint-5").exists(), signal.SIGKILL)
    assert read_records(out)[-1]["step"] < 30
    status, said = cut_off(command, lambda: (out / "checkpoint-10").exists(), signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, said[-3000:]
    assert "rayrm: ended by SIGTERM" in said
    assert "Traceback" not in said
    assert not (out / "service.json").exists()
    cut_off(command, lambda: (out / "heldout.json").exists(), signal.SIGKILL)
    assert not (out / "finished.json").exists()
    kept = json.loads((out / "heldout.json").read_text())
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [record["step"] for record in read_records(out)] == list(range(1, 31))
    measured = json.loads((out / "heldout.json").read_text())
    assert measured["before"] == kept["before"]
    assert np.allclose(measured["after"], kept["after"], atol=1e-4)
    # Normalized by what the earlier processes saw too: the scores of each step, once.
    seen: list[float] = []
    latest: dict[int, list[dict[str, Any]]] = {}
    for sample in samples_of(out):
        latest.setdefault(sample["step"], []).append(sample)
    for step in range(1, 31):
        mine = latest[step][-2:]
        seen += [sample["score"] for sample in mine]
        for sample in mine:
            assert sample["reward"] == pytest.approx(
                (sample["score"] - np.mean(seen)) / np.std(seen), abs=1e-6
            )
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert "finished run" in again.stderr
    assert "report:" not in again.stdout
