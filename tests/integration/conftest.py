"""Published tiny models, and a service of one of them, for the tests that call it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rayrm.serve.caller import Caller
from rayrm.serve.client import RewardClient
from rayrm.serve.registry import PublishedModel, publish

# The handle and the process compute the same float32 numbers in other batches.
from tests.served import free_port, served
from tests.tiny import save_tiny, tiny_rows, write_rows


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    root = tmp_path_factory.mktemp("serve")
    return publish(save_tiny(root / "first", chat=False), root / "registry", "reward")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    root = tmp_path_factory.mktemp("serve-other")
    return publish(save_tiny(root / "second", seed=1, chat=False), root / "registry", "reward")


@pytest.fixture(scope="session")
def second(published: PublishedModel, tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    """Another version of the first model, not the current one."""
    registry = published.path.parent.parent
    model = save_tiny(tmp_path_factory.mktemp("serve-second"), seed=2, chat=False)
    return publish(model, registry, published.name, make_current=False)


@pytest.fixture(scope="module")
def client(ray_cluster: None, published: PublishedModel) -> Iterator[RewardClient]:
    # A name of this test run alone: replicas are found, and killed, by it.
    with served(published, f"test-reward-{os.getpid()}", num_replicas=2) as running:
        yield running


@dataclass(frozen=True)
class ChatService:
    """A service of a model trained on messages, by handle and by HTTP; `path` is the model's directory."""

    client: RewardClient
    url: str
    path: Path


@pytest.fixture(scope="module")
def chat_service(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatService]:
    root = tmp_path_factory.mktemp("serve-chat")
    model = publish(save_tiny(root / "model", seed=3), root / "registry", "chat")
    port = free_port()
    with served(model, f"chat-{os.getpid()}", http_port=port) as running:
        yield ChatService(running, f"http://127.0.0.1:{port}", model.path)


@pytest.fixture
def requests_sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each request of this process to a service took along, as they are sent."""
    sent: list[int] = []
    send = Caller._send

    def counted(caller: Caller, calls: list[Any]) -> None:
        sent.append(len(calls))
        send(caller, calls)

    monkeypatch.setattr(Caller, "_send", counted)
    return sent


@pytest.fixture
def sweep_words(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a tiny run, with relative paths: trials have current directories of their own."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(24, conversational=True))
    for name, seed in (("near", 5), ("far", 6)):
        write_rows(tmp_path / f"{name}.jsonl", tiny_rows(16, seed=seed, conversational=True))
    return [
        "model.name=base",
        "data.train=pairs.jsonl",
        'data.eval={near="near.jsonl", far="far.jsonl"}',
        "output_dir=sweep",
        "bf16=false",
        "max_steps=8",
        "per_device_train_batch_size=4",
        "gradient_checkpointing=false",
        "save_strategy=no",
        "sweep.mode=min",
    ]
