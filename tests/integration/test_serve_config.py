"""The service deployed by Serve's own tools from a config file, behind Serve's proxy, on a Ray of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrm.errors import ConfigError, PublishError
from rayrm.serve.deployment import app
from rayrm.serve.registry import PublishedModel
from rayrm.serve.scorer import RewardModel
from tests.served import SAME, free_port, post, replica_pids, texts

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "of-a-test"
# `serve run` as its command line is, on a Ray that the test knows the address of.
SERVE_RUN = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False)
print(ray.get_runtime_context().gcs_address, flush=True)
from ray.serve.scripts import cli
cli(["run", sys.argv[1]])
"""


def config(place: str, name: str, model: Path, host: str, port: int) -> dict[str, Any]:
    """The config in jobs/ with a name, a model and an address of the test, for few CPUs."""
    found = yaml.safe_load((ROOT / "jobs" / place).read_text())
    config = yaml.safe_load(found["spec"]["serveConfigV2"]) if "spec" in found else found
    config["http_options"] = {"host": host, "port": port}
    [application] = config["applications"]
    application |= {"name": name, "args": {**application["args"], "model": str(model)}}
    for deployment in application["deployments"]:
        deployment["num_replicas"] = 1
        if deployment["name"] == "RewardReplica":
            deployment["ray_actor_options"]["num_cpus"] = 0.5
    return dict(config)


@contextmanager
def serve_run(
    home: Path, config: dict[str, Any], token: str | None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address of its Ray."""
    (home / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment |= {} if token is None else {"RAYRM_HTTP_TOKEN": token}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE_RUN, str(home / "serve.yaml")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_ready(url: str, process: subprocess.Popen[str], log: Path) -> None:
    request = urllib.request.Request(f"{url}/ready", headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError:  # refused, reset, or no answer in time: it is not ready
            time.sleep(0.2)
    pytest.fail(f"the service is not ready:\n{log.read_text()[-5000:]}")


def rayrm(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rayrm.cli", *words], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_serve_config_serves_rolls_and_comes_back(
    published: PublishedModel, second: PublishedModel, tmp_path: Path
) -> None:
    name, port = f"test-config-{os.getpid()}", free_port()
    url = f"http://127.0.0.1:{port}"
    prompts, completions = texts(8)
    body = {"prompts": prompts, "completions": completions}
    settings = config("kuberay/rayservice.yaml", name, published.path, "127.0.0.1", port)
    with serve_run(tmp_path, settings, TOKEN) as (process, address):
        wait_until_ready(url, process, tmp_path / "log")
        assert post(f"{url}/v1/score", body)[0] == 401
        for version in (published, second):
            status, answer = post(f"{url}/v1/score", body, TOKEN)
            assert (status, answer["version"]) == (200, version.version)
            right = RewardModel.from_pretrained(version.path).score(prompts, completions)
            assert answer["scores"] == pytest.approx(right, abs=SAME)
            if version is published:
                rayrm("roll", name, "--to", second.version, "--address", address)
        # What the service rolled to is what a replica serves that starts afterwards.
        [before] = [pid for pid in replica_pids(name) if "RewardReplica" in title(pid)]
        os.kill(before, signal.SIGKILL)
        status, answer = post(f"{url}/v1/score", body, TOKEN)
        assert (status, answer["version"]) == (200, second.version)
        shown = json.loads(rayrm("status", name, "--address", address))
        assert set(shown["models"].values()) == {second.version}


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.slow
def test_a_proxy_that_others_reach_needs_a_token(published: PublishedModel, tmp_path: Path) -> None:
    settings = config("serve.yaml", f"test-open-{os.getpid()}", published.path, "0.0.0.0", free_port())
    refusal, deadline = "answers callers from other machines, and no token is set", time.monotonic() + 400
    with serve_run(tmp_path, settings, None):
        while refusal not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "mine"}, r"Set `applications\.name` there"),
        ({"http_port": 80}, r"Set `http_options\.port` there"),
        ({"model": None}, r"`args\.model` \(None\) must be"),
        ({"num_replica": 2}, "Did you mean `num_replicas`"),
        ({"http": "yes"}, r"`args\.http` \('yes'\) must be true or false"),
        (
            {"autoscaling": {"min_replicas": 1, "max_replica": 3}},
            r"`autoscaling\.max_replica` .*`max_replicas`",
        ),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 1}}, r"`autoscaling` .*max_replicas \(1\) must"),
        ({"autoscaling": {"min_replicas": "x"}}, r"`min_replicas` \('x'\): should be"),
        ({"autoscaling": {"policy": {"policy_function": "no.such"}}}, "`autoscaling` .*No module named 'no'"),
        ({"ray_actor_options": {"resorces": {"a": 1}}}, r"`ray_actor_options\.resorces` .*`resources`"),
        ({"ray_actor_options": {"resources": {"a": -1}}}, "`ray_actor_options` .*cannot be negative"),
        ({"placement_group_bundles": []}, "`placement_group_bundles` .*non-empty"),
        ({"placement_group_bundles": [{"CPU": 0.5}]}, "`placement_group_bundles` .*only has 0.5 `CPU`"),
    ],
)
def test_bad_arguments_of_a_serve_config_are_refused(
    change: dict[str, Any], message: str, published: PublishedModel
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        app({"model": str(published.path), **change})
    assert "\n" not in str(refused.value)


def test_a_serve_config_names_a_model_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="nowhere"):
        app({"model": str(tmp_path / "nowhere")})
