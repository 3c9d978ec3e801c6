"""Versions of a served model: rolled to, refused, several at once, and by whom they are followed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray import serve

from rayrm import cli
from rayrm.errors import (
    ConfigError,
    PublishError,
    RewardUnavailableError,
    RollError,
    ScoreError,
)
from rayrm.serve.client import RewardClient
from rayrm.serve.deployment import deploy
from rayrm.serve.registry import PublishedModel, open_published, publish, set_current
from rayrm.serve.scorer import RewardModel
from rayrm.serve_settings import Ensemble

# The handle and the process compute the same float32 numbers in other batches.
from tests.served import SAME, free_port, post, replica_pids, served, texts, writable_copy
from tests.tiny import save_tiny


@pytest.mark.ray
def test_a_roll_is_followed_by_replicas_that_start_later(
    ray_cluster: None, published: PublishedModel, second: PublishedModel
) -> None:
    with served(published, "rolled") as reward:
        expected = {
            model.version: RewardModel.from_pretrained(model.path).score(*texts(4))
            for model in (published, second)
        }
        rolled = reward.roll(second.version)
        assert (rolled.version, rolled.before) == (second.version, published.version)
        assert reward.roll(second.version).before == second.version  # nothing to do
        answer = reward.score(*texts(4))
        assert answer.version == second.version
        assert answer.scores == pytest.approx(expected[second.version], abs=SAME)
        assert open_published(published.path.parent).version == second.version
        (pid,) = replica_pids("rolled")
        os.kill(pid, signal.SIGKILL)
        assert reward.score(*texts(4)).version == second.version
        (other,) = replica_pids("rolled")
        assert other != pid
        os.kill(other, signal.SIGKILL)
        # Whoever asks while no replica is up waits for one.
        assert reward.status()["models"] == {published.name: second.version}
        os.kill(replica_pids("rolled")[0], signal.SIGKILL)
        assert reward.rollback().version == published.version
        assert reward.score(*texts(4)).version == published.version
        with pytest.raises(PublishError, match=r"no published model at .*Published versions there: "):
            reward.roll("absent")
    set_current(published.path.parent.parent, published.name, published.version)


@pytest.mark.ray
def test_a_version_that_is_damaged_or_scores_otherwise_is_refused_and_the_old_one_serves_on(
    ray_cluster: None, published: PublishedModel, second: PublishedModel
) -> None:
    home = published.path.parent
    elsewhere = publish(second.path, home.parent, "elsewhere").path
    damaged, otherwise = (writable_copy(second.path, home / name) for name in ("damaged", "otherwise"))
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-3] ^= 0xFF
    (damaged / "model.safetensors").write_bytes(content)
    manifest = json.loads((otherwise / "manifest.json").read_text())
    manifest["probe"]["scores"][3] += 0.01
    manifest["version"] = "otherwise"
    (otherwise / "manifest.json").write_text(json.dumps(manifest))
    try:
        with served(published, "refusing", num_replicas=2) as reward:
            with pytest.raises(PublishError, match=r"model\.safetensors' differs from its checksum"):
                reward.roll(damaged)
            assert "checksum" in reward.status()["last_roll"][published.name]["error"]
            with pytest.raises(PublishError, match=r"is published as 'elsewhere', and the model that serves"):
                reward.roll(elsewhere)
            with pytest.raises(ConfigError, match=r"`version` \(None\)"):
                reward.roll(None)  # type: ignore[arg-type]
            with pytest.raises(RollError, match=f"refused version otherwise.*{published.version} serves on"):
                reward.roll("otherwise")
            status = reward.status()
            assert status["models"] == {published.name: published.version}
            assert status["last_roll"][published.name]["version"] == "otherwise"
            assert "probe" in status["last_roll"][published.name]["error"]
            assert [replica["staged"] for replica in status["replicas"]] == [[], []]
            assert reward.score(*texts(4)).version == published.version
    finally:
        for copy in (damaged, otherwise):
            shutil.rmtree(copy)
    assert open_published(home).version == published.version


@pytest.mark.ray
def test_several_models_and_an_ensemble_under_one_name(
    ray_cluster: None, published: PublishedModel, other: PublishedModel
) -> None:
    ensembles = {"worst": Ensemble(members=["one", "two"], reduce="min")}
    port = free_port()
    with served({"one": published, "two": other}, "several", ensembles=ensembles, http_port=port):
        scores = [RewardModel.from_pretrained(model.path).score(*texts(6)) for model in (published, other)]
        for name, expected in (("one", scores[0]), ("two", scores[1])):
            assert RewardClient("several", model=name)(*texts(6)) == pytest.approx(expected, abs=SAME)
        worst = RewardClient("several", model="worst").score(*texts(6))
        assert worst.scores == pytest.approx([min(pair) for pair in zip(*scores, strict=True)], abs=SAME)
        assert worst.version == f"{published.version}.{other.version}"
        url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
            listed = {entry["id"]: entry for entry in json.load(answer)["data"]}
        assert listed["worst"]["version"] == worst.version
        assert listed["worst"]["members"] == ["one", "two"]
        # A version as it is listed, in a URL; and verl's body, which names a path that the service has not.
        text = "".join(part[0] for part in texts(6))
        verls = {"model": "/models/reward", "input": text, "use_activation": False}
        assert post(f"{url}/classify", verls)[0] == 404
        code, found = post(f"{url}/classify?model=worst&version={worst.version}", verls)
        assert (code, found["data"][0]["probs"]) == (200, pytest.approx(worst.scores[:1], abs=SAME))
        assert len(worst.spread or []) == 6
        with pytest.raises(ScoreError, match="the service has one, two, worst"):
            RewardClient("several")(*texts(1))
    with pytest.raises(ConfigError, match="member 'thre', and the service's models are one, two"):
        deploy({"one": published, "two": other}, "x", ensembles={"e": {"members": ["one", "thre"]}})


@pytest.mark.ray
def test_a_replica_that_autoscaling_adds_serves_the_version_that_was_rolled_to(
    ray_cluster: None, published: PublishedModel, second: PublishedModel
) -> None:
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 0.2,
        "metrics_interval_s": 0.2, "look_back_period_s": 1,
    }  # fmt: skip
    try:
        with served(published, "scaled", autoscaling=scaling, max_tokens_per_batch=64) as reward:
            reward.roll(second.version)
            stop, versions = threading.Event(), set()

            def call() -> None:
                patient = RewardClient("scaled", coalesce=False)
                while not stop.is_set():
                    versions.add(patient.score(*texts(40)).version)

            callers = [threading.Thread(target=call) for _ in range(8)]
            for caller in callers:
                caller.start()
            try:
                deadline = time.monotonic() + 90
                while len(reward.status()["replicas"]) < 2 and time.monotonic() < deadline:
                    time.sleep(0.2)
                replicas = reward.status()["replicas"]
            finally:
                stop.set()
                for caller in callers:
                    caller.join()
        assert [replica["models"][published.name] for replica in replicas] == [second.version] * 2
        assert versions == {second.version}
    finally:
        set_current(published.path.parent.parent, published.name, published.version)


@pytest.mark.ray
def test_the_commands_publish_roll_back_and_tell_the_status(
    ray_cluster: None, published: PublishedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = str(tmp_path / "registry")
    first = publish(published.path, registry, "told")
    with served(first, "told"):
        checkpoint = str(save_tiny(tmp_path / "next", seed=4, chat=False))
        assert (
            cli.main(["publish", checkpoint, "--registry", registry, "--name", "told", "--roll", "told"]) == 0
        )
        said = capsys.readouterr().out
        assert "told serves told" in said
        assert f"before: {first.version} (rayrm roll told --back --model told)" in said
        assert cli.main(["status", "told"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["before"] == {"told": first.version}
        assert status["models"]["told"] == open_published(Path(registry) / "told").version != first.version
        assert cli.main(["roll", "told", "--back"]) == 0
        assert f"serves told {first.version}" in capsys.readouterr().out
        assert cli.main(["roll", "told", "--to", "nothing"]) == 2
        assert "Published versions there" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            cli.main(["roll", "told"])


@pytest.mark.ray
def test_rolls_of_two_models_at_once_both_happen(
    ray_cluster: None, published: PublishedModel, second: PublishedModel, tmp_path: Path
) -> None:
    """Each is staged for longer than the other takes: neither may write what it read before."""
    other = publish(save_tiny(tmp_path / "a", seed=4, chat=False), tmp_path / "registry", "safe")
    newer = publish(
        save_tiny(tmp_path / "b", seed=5, chat=False), tmp_path / "registry", "safe", make_current=False
    )
    with served({"helpful": published, "safe": other}, "twice") as reward:
        back = {"helpful": published.version, "safe": other.version}
        for wanted in ({"helpful": second.version, "safe": newer.version}, back) * 2:
            with ThreadPoolExecutor(2) as threads:
                rolls = [threads.submit(reward.roll, one, model=name) for name, one in wanted.items()]
                assert [roll.result().version for roll in rolls] == list(wanted.values())
            status = reward.status()
            assert status["models"] == wanted
            assert [replica["models"] for replica in status["replicas"]] == [wanted]
    set_current(published.path.parent.parent, published.name, published.version)


@pytest.mark.ray
def test_who_calls_a_service_that_is_being_removed_is_told(
    ray_cluster: None, published: PublishedModel
) -> None:
    with served(published, "going", max_tokens_per_batch=256) as reward, ThreadPoolExecutor(2) as threads:
        threads.submit(reward.score, *texts(3000))
        removed = threads.submit(serve.delete, "going")
        late = RewardClient("going", deadline_s=500)
        calls = iter(lambda: late.score(*texts(1)), None)
        with pytest.raises(RewardUnavailableError, match="no application 'going' runs"):
            deque(calls, maxlen=0)
        removed.result()
