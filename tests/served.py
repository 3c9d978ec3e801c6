"""A reward service of tiny models for tests: deployed, asked, and its processes."""

from __future__ import annotations

import json
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from rayrm.serve.caller import Caller
from rayrm.serve.client import RewardClient
from rayrm.serve.deployment import Model, deploy
from tests.tiny import WORDS

# The handle and the process compute the same float32 numbers in other batches.

SAME = 1e-4
LIGHT = {"num_cpus": 0.2}


@contextmanager
def served(model: Model | dict[str, Model], name: str, **fields: Any) -> Iterator[RewardClient]:
    try:
        yield deploy(model, name, **{**LIGHT, **fields})
    finally:
        serve.delete(name)


@contextmanager
def sent_together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many calls each request of this process carried, while it lasts."""
    sizes: list[int] = []
    send = Caller._send

    def counted(caller: Caller, calls: list[Any]) -> None:
        sizes.append(len(calls))
        send(caller, calls)

    with monkeypatch.context() as patch:
        patch.setattr(Caller, "_send", counted)
        yield sizes


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
