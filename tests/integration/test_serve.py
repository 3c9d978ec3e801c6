"""The reward service on a real cluster: the same scores, no lost request, errors that say what to type."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
from ray import serve

from rayrm.config import ServeConfig
from rayrm.errors import (
    ClusterError,
    ConfigError,
    PublishError,
    RayrmError,
    RewardUnavailableError,
    ScoreError,
)
from rayrm.serve.client import RewardClient
from rayrm.serve.deployment import app, deploy
from rayrm.serve.registry import PublishedModel, publish
from rayrm.serve.request import ScoreRequest
from rayrm.serve.scorer import RewardModel

# The handle and the process compute the same float32 numbers in other batches.
from tests.served import LIGHT, SAME, replica_pids, served, texts
from tests.tiny import save_tiny


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
    with pytest.raises(ScoreError, match=r"`completions\[1\]` \(None\) is NoneType"):
        client(["a", "a"], ["b", None])  # type: ignore[list-item]
    with pytest.raises(ScoreError, match="`sequences` is NoneType"):
        client.score_ids(None)  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="input 0 of 1: `tools` beside a string"):
        client.score(["a"], ["b"], tools=[{"name": "add"}])


@pytest.mark.ray
def test_what_breaks_one_call_breaks_none_that_travels_with_it(
    client: RewardClient, published: PublishedModel
) -> None:
    """Ids whose dtype pickles into another process and nothing there can take."""
    prompts, completions = texts(6)
    expected = RewardModel.from_pretrained(published.path).score(prompts, completions)

    async def together() -> list[Any]:
        odd = client.ask(ScoreRequest([object()]))  # type: ignore[list-item]
        good = [client.score_async([p], [c]) for p, c in zip(prompts, completions, strict=True)]
        return await asyncio.gather(odd, *good, return_exceptions=True)

    failure, *answers = asyncio.run(together())
    assert isinstance(failure, RayrmError)
    assert [answer.scores[0] for answer in answers] == pytest.approx(expected, abs=SAME)


@pytest.mark.ray
def test_two_clients_of_a_process_may_differ_in_which_replica_they_ask_first(client: RewardClient) -> None:
    expected = client(*texts(3))
    for deadline_s in (30, 60):
        local = RewardClient(client.name, prefer_local=True, deadline_s=deadline_s)
        assert local(*texts(3)) == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deadline_s": float("nan")}, r"`deadline_s` \(nan\)"),
        ({"deadline_s": -1}, r"`deadline_s` \(-1\)"),
        ({"deadline_s": None}, r"`deadline_s` \(None\)"),
        ({"deadline_s": "soon"}, r"`deadline_s` \('soon'\)"),
        ({"hedge_after_s": 0}, r"`hedge_after_s` \(0\)"),
        ({"name": ""}, r"`name` \(''\)"),
    ],
)
def test_a_client_says_which_of_its_settings_cannot_be_meant(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardClient(**fields)


@pytest.mark.ray
def test_a_call_that_is_given_up_leaves_no_trace_in_the_log(
    client: RewardClient, caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()  # what other tests left, such as tasks of a framework's that raised
    caplog.clear()
    with pytest.raises(RewardUnavailableError):
        RewardClient(client.name, deadline_s=0.001, coalesce=False).score(*texts(64))
    for _ in range(3):
        RewardClient(client.name, hedge_after_s=0.001, coalesce=False).score(*texts(64))
    client.score(*texts(1))
    gc.collect()
    assert "never retrieved" not in caplog.text


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
    hurried = RewardClient(client.name, deadline_s=0.001)
    with pytest.raises(RewardUnavailableError, match=r"no answer within 0\.001 s"):
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
    with pytest.raises(ConfigError, match=r"`autoscaling\.max_replica` .*Did you mean `max_replicas`"):
        deploy(tmp_path / "model", autoscaling={"max_replica": 2})
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
def test_a_serve_config_whose_http_nobody_would_answer_says_so(
    client: RewardClient, published: PublishedModel
) -> None:
    """`deploy` started Serve, without its proxy."""
    application = app({"model": str(published.path), **LIGHT})
    try:
        with pytest.raises(RuntimeError, match="failed"):
            serve.run(application, name="unanswered", route_prefix="/unanswered")
        deployments = serve.status().applications["unanswered"].deployments
        assert "Type `serve shutdown`" in deployments["HttpGateway"].message
    finally:
        serve.delete("unanswered")
    inside = app({"model": str(published.path), "http": False, **LIGHT})
    serve.run(inside, name="inside", route_prefix=None)
    try:
        assert RewardClient("inside").score(*texts(2)).version == published.version
    finally:
        serve.delete("inside")


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
        told = "".join(iter(process.stdout.readline, "stop with Ctrl-C\n"))
        assert "'forever'" in told.splitlines()[0]
        assert "types export RAY_AUTH_MODE=token first" in told
        assert RewardClient("forever").score(*texts(3)).version == published.version
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopping 'forever': requests in flight are answered first\nremoved 'forever'" in rest
    assert "forever" not in serve.status().applications
    assert client.score(*texts(3)).version == published.version


def test_the_client_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, rayrm.serve.client; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.ray
def test_a_process_that_is_given_an_address_shows_this_machine_s_token(
    ray_cluster: None, tmp_path: Path
) -> None:
    """Ray protects the tests' cluster by a token; a driver that has its address shows none by itself."""
    code = "import ray; from rayrm.serve.connect import connect; print(connect(start=False))"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    del environment["RAY_AUTH_MODE"]
    command = [sys.executable, "-c", code]
    joined = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert joined.stdout == "False\n", joined.stderr
    environment |= {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "no authentication token was found. Start" in refused.stderr
    assert "copy its head's ~/.ray/auth_token to this machine" in refused.stderr


def test_a_cluster_that_does_not_answer_is_named() -> None:
    """In a process of its own: this one may be connected already. Nothing listens on port 1."""
    code = "from rayrm.serve.connect import connect; connect()"
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ClusterError: no Ray cluster lets us in at '127.0.0.1:1'" in done.stderr
