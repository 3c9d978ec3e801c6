"""The reward service on a real cluster: the same scores, no lost request, errors that say what to type."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
from ray import serve

import rayrm.serve
from rayrm import cli
from rayrm.config import ServeConfig
from rayrm.errors import (
    ClusterError,
    ConfigError,
    OverloadedError,
    PublishError,
    RewardUnavailableError,
    RollError,
    ScoreError,
)
from rayrm.serve.client import RewardClient
from rayrm.serve.deployment import Model, deploy
from rayrm.serve.registry import PublishedModel, open_published, publish, set_current
from rayrm.serve.scorer import RewardModel
from rayrm.serve_settings import Ensemble
from tests.tiny import WORDS, save_tiny

# The handle and the process compute the same float32 numbers in other batches.
SAME = 1e-4
LIGHT = {"num_cpus": 0.2}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    root = tmp_path_factory.mktemp("serve")
    return publish(save_tiny(root / "first", chat=False), root / "registry", "reward")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    root = tmp_path_factory.mktemp("serve-other")
    return publish(save_tiny(root / "second", seed=1, chat=False), root / "registry", "reward")


@contextmanager
def served(model: Model | dict[str, Model], name: str, **fields: Any) -> Iterator[RewardClient]:
    try:
        yield deploy(model, name, **{**LIGHT, **fields})
    finally:
        serve.delete(name)


@pytest.fixture(scope="module")
def client(ray_cluster: None, published: PublishedModel) -> Iterator[RewardClient]:
    # A name of this test run alone: replicas are found, and killed, by it.
    with served(published, f"test-reward-{os.getpid()}", num_replicas=2) as running:
        yield running


@pytest.fixture(scope="module")
def second(published: PublishedModel, tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    """Another version of the first model, not the current one."""
    registry = published.path.parent.parent
    model = save_tiny(tmp_path_factory.mktemp("serve-second"), seed=2, chat=False)
    return publish(model, registry, published.name, make_current=False)


def writable_copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, body: Any, token: str | None = None) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def texts(count: int, salt: str = "") -> tuple[list[str], list[str]]:
    prompts = [f"{salt} what is the {WORDS[n // 4 % len(WORDS)]}?" for n in range(count)]
    return prompts, [" " + " ".join(WORDS[n % 7 : n % 7 + 1 + n % 11]) for n in range(count)]


def replica_pids(name: str) -> list[int]:
    """The processes of an application's replicas; Ray writes the application's name into their titles."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if title.startswith(f"ray::ServeReplica:{name}:"):
                found.append(int(entry.name))
    return found


@pytest.mark.ray
def test_the_handle_gives_the_scores_of_the_process(client: RewardClient, published: PublishedModel) -> None:
    prompts, completions = texts(40)
    expected = RewardModel.from_pretrained(published.path).score(prompts, completions)
    answer = client.score(prompts, completions)
    assert answer.scores == pytest.approx(expected, abs=SAME)
    assert answer.version == published.version
    assert client(prompts=prompts, completions=completions, completion_ids=[[1]] * 40, label=["x"] * 40) == (
        pytest.approx(expected, abs=SAME)
    )
    assert all(type(score) is float for score in answer.scores)
    assert client([], []) == []


@pytest.mark.ray
def test_unequal_requests_at_once_each_get_their_own_scores(
    client: RewardClient, published: PublishedModel
) -> None:
    counts = [1, 64, 3, 17, 1, 40, 2, 8]
    requests = [texts(count, salt=f"{n} red") for n, count in enumerate(counts)]

    async def all_at_once() -> list[list[float]]:
        answers = await asyncio.gather(*(client.score_async(*request) for request in requests))
        return [answer.scores for answer in answers]

    model = RewardModel.from_pretrained(published.path)
    for scores, request in zip(asyncio.run(all_at_once()), requests, strict=True):
        assert scores == pytest.approx(model.score(*request), abs=SAME)


@pytest.mark.ray
def test_a_bad_input_fails_its_own_request_only(client: RewardClient) -> None:
    async def good_and_bad() -> list[Any]:
        good = [client.score_async(*texts(8, salt=str(n))) for n in range(4)]
        bad = client.score_async(["fine", "cat " * 700], [" yes", " no"])
        return await asyncio.gather(*good, bad, return_exceptions=True)

    *answers, failure = asyncio.run(good_and_bad())
    assert all(len(answer.scores) == 8 for answer in answers)
    assert type(failure) is ScoreError
    assert "input 1 has" in str(failure)
    assert "limit is 512" in str(failure)
    assert len(client.score(["cat " * 700], [" no"], truncation="left").scores) == 1
    with pytest.raises(
        ScoreError, match="input 0 of 1: message lists given to a model trained on plain text"
    ):
        client([[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]])
    with pytest.raises(ScoreError, match="`prompts` has 1 entries and `completions` 2"):
        client(["a"], ["b", "c"])


@pytest.mark.ray
def test_a_pickled_client_works_in_actors_sync_and_async(
    client: RewardClient, published: PublishedModel
) -> None:
    expected = RewardModel.from_pretrained(published.path).score(*texts(6))

    @ray.remote(num_cpus=0.1)
    class Plain:
        def rewards(self, reward: RewardClient) -> list[float]:
            return reward(*texts(6))

    @ray.remote(num_cpus=0.1)
    class Asynchronous:
        async def rewards(self, reward: RewardClient) -> tuple[list[float], str]:
            answer = await reward.score_async(*texts(6))
            try:
                reward(*texts(6))
            except RewardUnavailableError as error:
                return answer.scores, str(error)
            return answer.scores, "no error"

    client(*texts(1))
    assert len(pickle.dumps(client)) < 1000
    assert ray.get(Plain.remote().rewards.remote(client)) == pytest.approx(expected, abs=SAME)
    scores, refusal = ray.get(Asynchronous.remote().rewards.remote(client))
    assert scores == pytest.approx(expected, abs=SAME)
    assert "await client.score_async" in refusal


@pytest.mark.ray
def test_an_absent_application_is_named_with_those_that_run(client: RewardClient) -> None:
    with pytest.raises(RewardUnavailableError, match=r"'nowhere'.*running: .*test-reward.*rayrm serve MODEL"):
        RewardClient("nowhere")(["a"], ["b"])


@pytest.mark.ray
def test_no_answer_before_the_deadline_is_an_error(client: RewardClient) -> None:
    hurried = RewardClient(client.name, deadline_s=0.0)
    with pytest.raises(RewardUnavailableError, match="no answer within 0 s"):
        hurried(*texts(200))
    assert len(client(*texts(2))) == 2


@pytest.mark.ray
def test_killed_replicas_cost_no_request(client: RewardClient, published: PublishedModel) -> None:
    """First one of two is killed under load, then all that run."""
    answers: list[list[float]] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def caller(number: int) -> None:
        reward = RewardClient(client.name)
        turn = 0
        while not stop.is_set():
            try:
                answers.append(reward(*texts(12, salt=f"{number} {turn % 3}")))
            except RewardUnavailableError as error:
                failures.append(error)
            turn += 1

    def wait_for_answers(count: int) -> None:
        wanted, limit = len(answers) + count, time.monotonic() + 100
        while len(answers) < wanted and time.monotonic() < limit:
            time.sleep(0.05)
        assert len(answers) >= wanted

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_for_answers(10)
        pids = replica_pids(client.name)
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        wait_for_answers(20)
        for pid in replica_pids(client.name):
            os.kill(pid, signal.SIGKILL)
        wait_for_answers(20)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not set(pids) & set(replica_pids(client.name))
    assert failures == []
    model = RewardModel.from_pretrained(published.path)
    known = [model.score(*texts(12, salt=f"{n} {t}")) for n in range(3) for t in range(3)]
    for scores in answers:
        assert any(scores == pytest.approx(right, abs=SAME) for right in known)


@pytest.mark.ray
def test_deploying_again_replaces_the_model_and_leaves_other_applications(
    client: RewardClient, published: PublishedModel, other: PublishedModel
) -> None:
    with served(published, "again") as reward:
        before = reward.score(*texts(4))
        assert before.version == published.version
        deploy(other, "again", **LIGHT)
        after = reward.score(*texts(4))
    assert after.version == other.version != published.version
    assert after.scores == pytest.approx(RewardModel.from_pretrained(other.path).score(*texts(4)), abs=SAME)
    assert after.scores != pytest.approx(before.scores, abs=SAME)
    assert client.score(*texts(4)).version == published.version


def test_a_bad_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Runs without a cluster: with one, `deploy` would have connected to it."""
    started = ray.is_initialized()
    with pytest.raises(PublishError, match="is not a directory"):
        deploy(tmp_path / "absent")
    broken = publish(save_tiny(tmp_path / "model"), tmp_path / "registry", "reward")
    weights = broken.path / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-7])
    for model in (broken, broken.path, tmp_path / "registry" / "reward"):
        with pytest.raises(PublishError, match=r"model\.safetensors' differs from its checksum"):
            deploy(model)
    with pytest.raises(ConfigError, match="num_replica"):
        deploy(tmp_path / "model", num_replica=2)
    assert ray.is_initialized() == started


@pytest.mark.ray
def test_more_replicas_than_the_cluster_has_room_for_are_refused(
    ray_cluster: None, published: PublishedModel
) -> None:
    with pytest.raises(
        ClusterError, match=r"3 replicas with `num_cpus` \(2\) need 6 CPUs, the cluster has 4"
    ):
        deploy(published, config=ServeConfig(name="big", num_replicas=3, num_cpus=2))
    with pytest.raises(ClusterError, match=r"'big' is not ready after 1 s"):
        deploy(published, "big", num_cpus=50, wait_s=1, check_resources=False)
    assert "big" not in serve.status().applications


@pytest.mark.ray
def test_a_model_that_loads_and_cannot_score_does_not_start(ray_cluster: None, tmp_path: Path) -> None:
    import torch

    from tests.tiny import tiny_model, tiny_tokenizer

    model = tiny_model()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RewardUnavailableError, match="'nan-model' could not start"):
        deploy(tmp_path, "nan-model", **LIGHT)
    assert "nan-model" not in serve.status().applications


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
        assert (pid,) != replica_pids("rolled")
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
    with served({"one": published, "two": other}, "several", ensembles=ensembles):
        scores = [RewardModel.from_pretrained(model.path).score(*texts(6)) for model in (published, other)]
        for name, expected in (("one", scores[0]), ("two", scores[1])):
            assert RewardClient("several", model=name)(*texts(6)) == pytest.approx(expected, abs=SAME)
        worst = RewardClient("several", model="worst").score(*texts(6))
        assert worst.scores == pytest.approx([min(pair) for pair in zip(*scores, strict=True)], abs=SAME)
        assert worst.version == f"{published.version}+{other.version}"
        assert len(worst.spread or []) == 6
        with pytest.raises(ScoreError, match="the service has one, two, worst"):
            RewardClient("several")(*texts(1))
    with pytest.raises(ConfigError, match="member 'thre', and the service's models are one, two"):
        deploy({"one": published, "two": other}, "x", ensembles={"e": {"members": ["one", "thre"]}})


@pytest.mark.ray
def test_calls_of_one_text_travel_together(client: RewardClient, published: PublishedModel) -> None:
    prompts, completions = texts(48)
    expected = RewardModel.from_pretrained(published.path).score(prompts, completions)
    failures: list[str] = []

    def one(number: int) -> float:
        if number == 7:
            try:
                client.score(["cat " * 700], [" no"])
            except ScoreError as error:
                failures.append(str(error))
        return client.score([prompts[number]], [completions[number]]).scores[0]

    with ThreadPoolExecutor(48) as threads:
        assert list(threads.map(one, range(48))) == pytest.approx(expected, abs=SAME)
    assert len(failures) == 1
    assert "input 0" in failures[0]


@pytest.mark.ray
def test_a_full_queue_refuses_at_once_or_is_waited_for(ray_cluster: None, published: PublishedModel) -> None:
    with served(published, "full", max_queued_requests=1, max_tokens_per_batch=64) as patient:
        hasty = RewardClient("full", retry_overload=False, coalesce=False)
        expected = RewardModel.from_pretrained(published.path).score(*texts(40))
        refused: list[OverloadedError] = []

        def one(number: int) -> list[float] | None:
            try:
                return (hasty if number % 2 else patient).score(*texts(40)).scores
            except OverloadedError as error:
                refused.append(error)
                return None

        with ThreadPoolExecutor(16) as threads:
            answers = [scores for scores in threads.map(one, range(16)) if scores is not None]
        assert len(answers) + len(refused) == 16
        assert len(answers) >= 8  # all that wait for room
        assert refused
        assert all(error.retry_after_s > 0 for error in refused)
        for scores in answers:
            assert scores == pytest.approx(expected, abs=SAME)


@pytest.mark.ray
def test_http_answers_for_the_same_replicas_and_asks_for_its_token(
    ray_cluster: None, published: PublishedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", "secret-of-the-test")
    with pytest.raises(ConfigError, match=r"`http_host` \('0\.0\.0\.0'\).*export RAYRM_HTTP_TOKEN="):
        deploy(published, "open", http_port=free_port(), http_host="0.0.0.0")
    port = free_port()
    with served(published, "wired", http_port=port, http_token_env="TEST_REWARD_TOKEN"):
        root = f"http://127.0.0.1:{port}"
        prompts, completions = texts(5)
        body = {"prompts": prompts, "completions": completions, "details": True}
        status, refusal = post(f"{root}/v1/score", body)
        assert status == 401
        assert "secret" not in json.dumps(refusal)
        status, answer = post(f"{root}/v1/score", body, token="secret-of-the-test")
        assert status == 200
        expected = RewardModel.from_pretrained(published.path).score(prompts, completions)
        assert answer["scores"] == pytest.approx(expected, abs=SAME)
        assert answer["version"] == published.version
        status, refusal = post(f"{root}/v1/score", {**body, "prompts": ["one"]}, token="secret-of-the-test")
        assert status == 422
        assert "go in pairs" in refusal["error"]["message"]


@pytest.mark.ray
def test_the_dashboard_draws_what_replicas_export(ray_cluster: None, tmp_path: Path) -> None:
    """Each metric of its queries is on a node's metrics port, after requests of each kind and 1,024 scores."""
    panels = json.loads((Path(rayrm.serve.__file__).parent / "grafana.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    wanted = {name for query in queries for name in re.findall(r"ray_rayrm_\w+", query)}
    assert len(queries) >= 12
    probe = tmp_path / "probe.jsonl"
    rows = [{"prompt": p, "completion": c} for p, c in zip(*texts(50), strict=True)]
    probe.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = publish(save_tiny(tmp_path / "model", chat=False), tmp_path / "registry", "watched", probe=probe)
    with served(model, "watched") as reward:
        for number in range(5):
            reward(*texts(256, salt=str(number)))
        with pytest.raises(ScoreError):
            reward(["cat " * 700], [" no"])
        port = ray.nodes()[0]["MetricsExportPort"]
        deadline = time.monotonic() + 60
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                exported = {re.split(r"[{ ]", line)[0] for line in answer.read().decode().splitlines()}
            if wanted <= exported or time.monotonic() > deadline:
                break
            time.sleep(1)
    assert sorted(wanted - exported) == []


@pytest.mark.ray
def test_a_second_replica_answers_for_one_that_hangs(ray_cluster: None, published: PublishedModel) -> None:
    """The first of two replicas is stopped: calls that wait for it are sent to the other as well."""
    with served(published, "hedged", num_replicas=2) as plain:
        expected = plain(*texts(3))
        reward = RewardClient("hedged", deadline_s=20, hedge_after_s=0.3, coalesce=False)
        assert reward(*texts(3)) == pytest.approx(expected, abs=SAME)
        stopped = replica_pids("hedged")[0]
        os.kill(stopped, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(8) as threads:
                answers = list(threads.map(lambda _: reward(*texts(3)), range(16)))
        finally:
            os.kill(stopped, signal.SIGCONT)
    for answer in answers:
        assert answer == pytest.approx(expected, abs=SAME)


@pytest.mark.ray
def test_train_workers_other_deployments_and_other_drivers_call_it(
    client: RewardClient, published: PublishedModel, tmp_path: Path
) -> None:
    expected = RewardModel.from_pretrained(published.path).score(*texts(5))

    def on_worker(config: dict[str, Any]) -> None:
        scores = config["reward"](*config["texts"])
        rank = ray.train.get_context().get_world_rank()
        (Path(config["out"]) / f"{rank}.json").write_text(json.dumps(scores))

    ray.train.torch.TorchTrainer(
        on_worker,
        train_loop_config={"reward": client, "texts": texts(5), "out": str(tmp_path)},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.2}),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "train")),
    ).fit()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, abs=SAME)

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    class Asks:
        def __init__(self, reward: RewardClient) -> None:
            self._reward = reward

        async def __call__(self, asked: tuple[list[str], list[str]]) -> list[float]:
            return (await self._reward.score_async(*asked)).scores

    asks = serve.run(Asks.bind(client), name="asks", route_prefix=None)
    assert asks.remote(texts(5)).result() == pytest.approx(expected, abs=SAME)
    serve.delete("asks")

    code = (
        "import sys, json, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
        "from rayrm import RewardClient\n"
        "print(json.dumps(RewardClient(sys.argv[2])(*json.loads(sys.argv[3]))))"
    )
    words = [ray.get_runtime_context().gcs_address, client.name, json.dumps(texts(5))]
    told = subprocess.check_output([sys.executable, "-c", code, *words], text=True)
    assert json.loads(told.splitlines()[-1]) == pytest.approx(expected, abs=SAME)


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
        assert f"before: {first.version} (rayrm roll told --back)" in said
        assert cli.main(["status", "told"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["before"] == {"told": first.version}
        assert status["models"]["told"] == open_published(Path(registry) / "told").version != first.version
        assert cli.main(["roll", "told", "--back"]) == 0
        assert f"serves told {first.version}" in capsys.readouterr().out
        assert cli.main(["roll", "told", "nothing"]) == 2
        assert "Published versions there" in capsys.readouterr().err
        assert cli.main(["roll", "told"]) == 2


@pytest.mark.ray
def test_serving_ends_with_its_signal_and_removes_its_application_alone(
    client: RewardClient, published: PublishedModel
) -> None:
    address = ray.get_runtime_context().gcs_address
    code = (
        "import sys; from rayrm.config import ServeConfig; from rayrm.serve.deployment import serve_forever; "
        "serve_forever(sys.argv[1], ServeConfig(name='forever', num_cpus=0.2), address=sys.argv[2])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(published.path), address], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        assert "'forever'" in first_line
        assert RewardClient("forever").score(*texts(3)).version == published.version
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "removed 'forever'" in rest
    assert "forever" not in serve.status().applications
    assert client.score(*texts(3)).version == published.version


def test_the_client_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, rayrm.serve.client; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_cluster_that_does_not_answer_is_named() -> None:
    """In a process of its own: this one may be connected already. Nothing listens on port 1."""
    code = "from rayrm.serve.connect import connect; connect()"
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ClusterError: no Ray cluster lets us in at '127.0.0.1:1'" in done.stderr
