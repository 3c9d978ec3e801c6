"""Who calls a reward service, and how: together, over HTTP, from anywhere; and what it exports."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
from ray import serve

import rayrm.serve
from rayrm.errors import (
    ConfigError,
    OverloadedError,
    ScoreError,
)
from rayrm.serve.client import RewardClient
from rayrm.serve.deployment import deploy
from rayrm.serve.registry import PublishedModel, publish
from rayrm.serve.scorer import RewardModel

# The handle and the process compute the same float32 numbers in other batches.
from tests.served import SAME, free_port, post, replica_pids, served, texts
from tests.tiny import save_tiny


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
def test_a_service_that_is_removed_answers_every_http_request(
    ray_cluster: None, published: PublishedModel
) -> None:
    """Those in flight get their scores or a 503, those that come a 503, and nobody a broken connection."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/score"
    with (
        served(published, "leaving", http_port=port, max_tokens_per_batch=64),
        ThreadPoolExecutor(4) as threads,
    ):
        large, small = (
            dict(zip(("prompts", "completions"), texts(count), strict=True)) for count in (4000, 2)
        )
        assert post(url, small)[0] == 200
        in_flight = [threads.submit(post, url, large) for _ in range(3)]
        time.sleep(1)  # they have come to the replica, which has seconds of work by them
        serve.delete("leaving", _blocking=False)
        status, refusal = post(url, small)
        deadline = time.monotonic() + 60
        while status == 200 and time.monotonic() < deadline:  # until the word has come
            time.sleep(0.1)
            status, refusal = post(url, small)
        assert (status, refusal["error"]["type"]) == (503, "unavailable")
        assert "is being stopped" in refusal["error"]["message"]
        assert [asked.result()[0] for asked in in_flight] == [200] * 3
        serve.delete("leaving")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


@pytest.mark.ray
def test_the_dashboard_draws_what_replicas_export(ray_cluster: None, tmp_path: Path) -> None:
    """Each metric of its queries is on a node's metrics port, after 1,024 scores and an error."""
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
