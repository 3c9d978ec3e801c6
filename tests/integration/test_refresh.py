"""Refresh beside a service that is called: a judge changes what is served, or a gate keeps it, and kills cost
nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file, save_file

from rayrm.config import DataConfig, ModelConfig, RewardConfig
from rayrm.errors import ConfigError, RunDirectoryError, ScoreError
from rayrm.rl.refresh import Outcome, read_outcomes, refresh
from rayrm.rl.refresh_gate import measure, refusal
from rayrm.rl.refresh_pairs import read_taken
from rayrm.rl.refresh_settings import read_refresh
from rayrm.runfile import Run, read_run
from rayrm.serve.client import RewardClient
from rayrm.serve.registry import PublishedModel, open_published, publish, set_current
from rayrm.serve.saved import read_json
from rayrm.train.launch import train_run
from rayrm.train.records import read_progress, read_records
from tests.served import served, writable_copy
from tests.tiny import save_tiny, tiny_rows, write_rows

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
TRAIN = [
    "reward.bf16=false",
    "reward.use_cpu=true",
    "reward.learning_rate=5e-3",
    "reward.max_steps=60",
    "reward.logging_steps=1",
    "reward.disable_tqdm=true",
]
JUDGE = """
from pathlib import Path
import time

HOME = Path(__file__).parent

def judge(prompt, completions):
    while (HOME / "hold").exists() and len((HOME / "judged.txt").read_text().splitlines()) >= 3:
        time.sleep(0.05)
    with (HOME / "judged.txt").open("a") as out:
        out.write(prompt + "\\n")
    liked = (HOME / "liked.txt").read_text()
    return [float(text.endswith(liked)) for text in completions]
"""


@pytest.fixture(scope="module")
def thankful(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    """A published model that prefers what ends with "thanks" to what ends with "never"."""
    root = tmp_path_factory.mktemp("refresh")
    save_tiny(root / "base", chat=False)
    write_rows(root / "pairs.jsonl", tiny_rows(64))
    reward = RewardConfig(
        str(root / "run"), bf16=False, use_cpu=True, learning_rate=5e-3, max_steps=24, disable_tqdm=True
    )
    train_run(Run(ModelConfig(str(root / "base")), DataConfig(str(root / "pairs.jsonl")), reward))
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny_rows(12, seed=60)]
    probe, chat = write_rows(root / "probe.jsonl", texts), write_rows(root / "chat.jsonl", texts)
    return publish(root / "run", root / "registry", "reward", probe=probe, calibrate={"chat": chat})


@dataclass
class Refreshing:
    """A refresh's files, in a directory of its own."""

    home: Path
    service: str
    model: PublishedModel
    step: int = 0
    prompts: set[str] = field(default_factory=set)

    @property
    def samples(self) -> Path:
        return self.home / "samples.jsonl"

    def words(self, *more: str) -> list[str]:
        return [
            f"service={self.service}",
            f"registry={self.model.path.parent.parent}",
            f"samples={self.samples}",
            f"judge={self.home / 'judge.py'}:judge",
            f"output_dir={self.home / 'refresh'}",
            f"data.eval={self.home / 'heldout.jsonl'}",
            "min_pairs=24",
            "max_rounds=1",
            "poll_s=0.2",
            "min_probe_agreement=0",
            *TRAIN,
            *more,
        ]

    def likes(self, liked: str) -> None:
        (self.home / "liked.txt").write_text(liked)

    def sample(self, num_prompts: int) -> None:
        """One step of a policy: two completions of each prompt, one of each ending."""
        self.step += 1
        rows = tiny_rows(num_prompts, seed=100 + self.step)
        with self.samples.open("a") as out:
            for row in rows:
                self.prompts.add(row["prompt"])
                for side in ("chosen", "rejected"):
                    line = {"step": self.step, "prompt": row["prompt"], "completion": row[side], "score": 0.0}
                    out.write(json.dumps(line) + "\n")

    def holds_out(self, liked: str) -> None:
        rows = tiny_rows(40, seed=9)
        for row in rows if liked == "never" else []:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        write_rows(self.home / "heldout.jsonl", rows)

    def run(self, *more: str) -> list[Outcome]:
        return refresh(read_refresh(None, self.words(*more)))

    def judged(self) -> list[str]:
        return (self.home / "judged.txt").read_text().splitlines()


@pytest.fixture
def refreshing(thankful: PublishedModel, tmp_path: Path) -> Iterator[Refreshing]:
    name = f"refresh-{os.getpid()}"
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "judged.txt").touch()
    with served(thankful, name):
        yield Refreshing(tmp_path, name, thankful)
    set_current(thankful.path.parent.parent, "reward", thankful.version)


@dataclass
class Called:
    """What callers of the service saw, in order."""

    versions: list[str] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)


@contextmanager
def called(service: str) -> Iterator[Called]:
    """A caller that asks for scores without a pause within the block."""
    client, seen, stop = RewardClient(service), Called(), threading.Event()
    rows = tiny_rows(4, seed=3)

    def call() -> None:
        while not stop.is_set():
            try:
                answer = client.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
            except Exception as error:  # whatever it is, the test fails on it
                seen.failures.append(error)
                return
            seen.versions.append(answer.version)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield seen
    finally:
        stop.set()
        caller.join()


def agreement(service: str, liked: str) -> float:
    """How often the service prefers, of two completions of a fresh prompt, the one that ends so."""
    rows = tiny_rows(40, seed=77)
    client = RewardClient(service)
    good, bad = (
        client([row["prompt"] for row in rows], [row[side] for row in rows])
        for side in ("chosen", "rejected")
    )
    share = sum(first > second for first, second in zip(good, bad, strict=True)) / len(rows)
    return share if liked == "thanks" else 1 - share


def until(met: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not met():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_service_comes_to_agree_with_the_judge_while_it_is_called(refreshing: Refreshing) -> None:
    refreshing.likes("never")
    refreshing.holds_out("never")
    assert agreement(refreshing.service, "never") < 0.2
    ended = threading.Event()

    def policy() -> None:
        while not ended.is_set():
            refreshing.sample(4)
            ended.wait(0.3)

    sampler = threading.Thread(target=policy)
    with called(refreshing.service) as seen:
        sampler.start()
        try:
            (outcome,) = refreshing.run("cluster.num_workers=1")
        finally:
            ended.set()
            sampler.join()
    assert outcome.accepted, outcome.reason
    assert outcome.num_steps == 60
    assert outcome.after is not None
    assert outcome.after.accuracy > 0.85 > 0.2 > outcome.before.accuracy
    assert seen.failures == []
    order = [version for version, _ in groupby(seen.versions)]
    assert order == [refreshing.model.version, outcome.version]
    assert agreement(refreshing.service, "never") > 0.85
    assert RewardClient(refreshing.service).status()["models"] == {"reward": outcome.version}
    assert open_published(refreshing.model.path.parent).version == outcome.version
    (line,) = (refreshing.home / "refresh" / "rounds.jsonl").read_text().splitlines()
    assert json.loads(line)["version"] == outcome.version
    # Typed again, the rounds that were asked for are there, and nothing happens.
    num_judged = len(refreshing.judged())
    assert refreshing.run("cluster.num_workers=1") == [outcome]
    assert len(refreshing.judged()) == num_judged
    # Texts of its user's that a version was published with are those of the next one.
    home = refreshing.model.path.parent
    probes = [read_json(home / str(version) / "manifest.json") for version in order]
    assert probes[0]["probe"]["inputs"] == probes[1]["probe"]["inputs"]
    assert "distribution" in probes[1]
    # And its answers bring a calibration by the same texts, of its own scores of them.
    stored = [manifest["calibration"]["chat"] for manifest in probes]
    assert stored[0]["sha256"] == stored[1]["sha256"]
    answer = RewardClient(refreshing.service).score(["a"], ["b"])
    assert answer.calibration == {"chat": (stored[1]["mean"], stored[1]["std"])}
    assert abs(stored[1]["mean"] - stored[0]["mean"]) > 1e-3

    # Killed when the roll had happened and nothing said so: the round ends as it did.
    ended_as = refreshing.home / "refresh" / "round-1" / "outcome.json"
    ended_as.unlink()
    (again,) = refreshing.run()
    assert replace(again, ended_at=outcome.ended_at) == outcome
    # Had somebody rolled back meanwhile, that stands.
    client = RewardClient(refreshing.service)
    client.rollback()
    ended_as.unlink()
    (undone,) = refreshing.run()
    assert not undone.accepted
    assert f"rolled back to {refreshing.model.version}" in str(undone.reason)
    assert client.status()["models"] == {"reward": refreshing.model.version}
    # And had somebody rolled to another version, that would serve on.
    third = publish(
        save_tiny(refreshing.home / "third", seed=5, chat=False), home.parent, "reward", make_current=False
    )
    client.roll(third.version)
    ended_as.unlink()
    (superseded,) = refreshing.run()
    assert not superseded.accepted
    assert f"was rolled to {third.version} meanwhile" in str(superseded.reason)
    assert client.status()["models"] == {"reward": third.version}
    assert len(refreshing.judged()) == num_judged


def test_a_refused_round_leaves_the_service_and_hands_its_pairs_on(refreshing: Refreshing) -> None:
    refreshing.holds_out("thanks")
    refreshing.likes("never")
    refreshing.sample(24)
    (refused,) = refreshing.run("data.max_eval_pairs=30")
    assert refused.before.num_rows == 30
    assert not refused.accepted
    assert "below that of" in str(refused.reason)
    assert "`allowed_drop` is 0.01" in str(refused.reason)
    status = RewardClient(refreshing.service).status()
    assert status["models"] == {"reward": refreshing.model.version}
    assert status["last_roll"] == {}
    assert agreement(refreshing.service, "thanks") > 0.8
    assert read_outcomes(refreshing.home / "refresh") == [refused]

    refreshing.likes("thanks")
    refreshing.sample(30)
    write_rows(refreshing.home / "original.jsonl", tiny_rows(80, seed=50))
    replay = [f"data.replay={refreshing.home / 'original.jsonl'}", "data.replay_share=0.4"]
    _, second = refreshing.run("max_rounds=2", "min_probe_agreement=1", "allowed_drop=1", "lora.r=4", *replay)
    assert (refreshing.home / "refresh" / "round-2" / "model" / "adapter_config.json").exists()
    assert (second.num_rows, second.num_carried, second.num_replayed) == (30, 24, 36)
    trained = read_run(refreshing.home / "refresh" / "round-2" / "model" / "run.toml")
    assert [source.name for source in trained.data.train] == [
        "round-1 pairs",
        "round-2 pairs",
        "round-2 replay",
    ]  # type: ignore[union-attr]
    # The other bound of the gate: no model that was trained on orders every pair of texts as before.
    assert "pairs of probe texts" in str(second.reason)
    assert second.base == refreshing.model.version


def test_a_round_that_breaks_a_rule_of_the_gate_is_refused_by_it(refreshing: Refreshing) -> None:
    """Though it loses no accuracy: it was trained as the held-out pairs and the judge would have it."""
    refreshing.holds_out("thanks")
    refreshing.likes("thanks")
    refreshing.sample(24)
    gate = refreshing.home / "gate.toml"
    gate.write_text(
        f'[sets.chat]\ndata = "{refreshing.home / "heldout.jsonl"}"\nmax_ece = 0.0\nmin_accuracy = 0.5\n'
    )
    (refused,) = refreshing.run(f"gate={gate}", "allowed_drop=1")
    assert not refused.accepted
    assert "1 of 2 rules are broken" in str(refused.reason)
    assert "chat: ece is" in str(refused.reason)
    assert RewardClient(refreshing.service).status()["models"] == {"reward": refreshing.model.version}


def test_rows_that_cannot_be_trained_on_end_a_round_and_not_the_refresh(refreshing: Refreshing) -> None:
    refreshing.holds_out("thanks")
    refreshing.likes("never")
    refreshing.sample(24)
    (refused,) = refreshing.run("reward.max_length=1")
    assert not refused.accepted
    assert "nothing can be trained on: all 24 rows" in str(refused.reason)
    assert (refused.version, refused.num_steps, refused.after) == (None, 0, None)
    assert refused.before.num_rows == 40
    # The next round takes these rows along, and some that are refused do not stop it.
    refreshing.sample(24)
    _, second = refreshing.run("max_rounds=2", "allowed_drop=1", "reward.max_steps=2")
    assert second.num_carried == 24
    assert second.accepted, second.reason
    run = read_run(refreshing.home / "refresh" / "round-2" / "model" / "run.toml")
    assert run.reward.max_bad_row_fraction == 1.0


def test_a_job_that_is_killed_judges_and_trains_each_sample_once(refreshing: Refreshing) -> None:
    refreshing.likes("never")
    refreshing.holds_out("never")
    refreshing.sample(24)
    (refreshing.home / "hold").touch()
    more = ["reward.max_steps=200", "reward.save_steps=5"]
    command = [sys.executable, str(ROOT / "jobs" / "refresh.py"), *refreshing.words(*more)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    round_dir = refreshing.home / "refresh" / "round-1"

    def begun() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def killed(process: subprocess.Popen[str], when: Callable[[], bool]) -> None:
        until(when, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    killed(begun(), lambda: len(refreshing.judged()) == 3)
    (refreshing.home / "hold").unlink()
    refreshing.sample(5)  # of the next round
    killed(begun(), lambda: read_progress(round_dir / "model").get("step", 0) >= 12)
    ends = begun()
    said, _ = ends.communicate(timeout=300)
    assert ends.returncode == 0, said
    assert "going on" in said or "resum" in said, said
    (outcome,) = read_outcomes(refreshing.home / "refresh")
    assert outcome.accepted, outcome.reason
    assert f"serves {outcome.version}" in said
    assert RewardClient(refreshing.service).status()["models"] == {"reward": outcome.version}

    rows = [json.loads(line) for line in (round_dir / "pairs.jsonl").read_text().splitlines()]
    assert outcome.num_rows == len(rows) == 24
    assert sorted(refreshing.judged()) == sorted(row["prompt"] for row in rows)
    assert len(set(refreshing.judged())) == 24
    steps = [record["step"] for record in read_records(round_dir / "model") if "loss" in record]
    assert steps == list(range(1, 201))
    # The next round begins where this one's samples end.
    taken = read_taken(round_dir, 0)
    assert taken is not None
    end = taken.cursor[str(refreshing.samples)].offset
    left = [json.loads(line)["prompt"] for line in refreshing.samples.read_bytes()[end:].splitlines()]
    assert set(left) | {row["prompt"] for row in rows} == refreshing.prompts
    assert len(left) == 10


def test_what_cannot_be_refreshed_is_refused_with_what_to_type(refreshing: Refreshing) -> None:
    refreshing.likes("never")
    refreshing.holds_out("never")
    refreshing.sample(24)
    (refreshing.home / "judge.py").write_text("def judge(prompt, completions):\n    return [1.0]\n")
    with pytest.raises(ScoreError, match=r"returned 1 numbers for 2 completions"):
        refreshing.run()
    with pytest.raises(RunDirectoryError, match=r"holds another refresh: `samples` is "):
        refreshing.run("samples=elsewhere/*.jsonl")
    elsewhere: list[Any] = ["output_dir=" + str(refreshing.home / "other")]
    with pytest.raises(ConfigError, match=r"`model` \('rewards'\) names none of the models .*: reward"):
        refreshing.run("model=rewards", *elsewhere)
    with pytest.raises(ConfigError, match=r"has no such version. Type the registry that it was deployed"):
        refreshing.run(
            f"registry={refreshing.home / 'registry'}", "output_dir=" + str(refreshing.home / "third")
        )
    copy = refreshing.home / "copy"
    shutil.copytree(refreshing.model.path.parent.parent, copy)
    with pytest.raises(ConfigError, match=r"is a copy: .* Type `refresh.registry="):
        refreshing.run(f"registry={copy}", "output_dir=" + str(refreshing.home / "fourth"))
    assert RewardClient(refreshing.service).status()["models"] == {"reward": refreshing.model.version}


def test_both_models_are_measured_and_one_that_is_broken_is_told(
    thankful: PublishedModel, tmp_path: Path
) -> None:
    heldout = [str(write_rows(tmp_path / "heldout.jsonl", tiny_rows(20, seed=9)))]
    same = measure(thankful, thankful.path, heldout, None)
    assert same.before == same.after
    assert same.before.num_rows == 20
    assert same.probe_agreement == 1.0
    turned, broken = (writable_copy(thankful.path, tmp_path / name) for name in ("turned", "broken"))
    for directory, factor in ((turned, -1.0), (broken, float("nan"))):
        (directory / "manifest.json").unlink()
        weights = load_file(directory / "model.safetensors")
        weights["score.weight"] *= factor
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    found = measure(thankful, turned, heldout, None)
    assert found.probe_agreement == 0.0
    assert found.after is not None
    assert found.after.accuracy == pytest.approx(1 - found.before.accuracy)
    nothing = measure(thankful, broken, heldout, None)
    assert nothing.after is None
    reason = refusal(nothing, thankful.version, allowed_drop=1.0, min_probe_agreement=0.0)
    assert "its scores are broken: input 0 of 12 got the score nan" in str(reason)


def test_a_model_that_was_trained_on_ties_is_measured_on_the_same_comparisons(
    thankful: PublishedModel, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = []
    for row in tiny_rows(10, seed=9):
        texts = [row["chosen"], row["rejected"]]
        # Of the first two the model has one right. The third has one comparison more where ties count.
        for completions, ranks in ((texts, [0, 1]), (texts, [1, 0]), ([*texts, f"{texts[0]} ."], [0, 1, 0])):
            rows.append({"prompt": row["prompt"], "completions": completions, "ranks": ranks})
    heldout = [str(write_rows(tmp_path / "heldout.jsonl", rows))]
    same = writable_copy(thankful.path, tmp_path / "same")
    (same / "manifest.json").unlink()
    facts = json.loads((same / "rayrm.json").read_text())
    (same / "rayrm.json").write_text(json.dumps({**facts, "objective": {"tie_model": "rao-kupper"}}))
    found = measure(thankful, same, heldout, None)
    assert found.after == found.before
