"""[RAY] Rolling a running service to another version, and back, without losing a request.

What the acts of a roll are, and what a replica does that missed one, is told in `replica.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from rayrm.errors import PublishError, RayrmError, RollError
from rayrm.serve.pointer import Pointer, change_pointer, read_pointer
from rayrm.serve.registry import MANIFEST, open_published, set_current
from rayrm.serve.request import ModelPlace

_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class RollResult:
    """`version` serves in the place of `before` on `num_replicas` replicas. `seconds`: loading included."""

    model: str
    version: str
    before: str
    num_replicas: int
    seconds: float


def roll(
    handle: Any, application: str, version: str | Path | None, model: str | None, wait_s: float
) -> RollResult:
    """Let every replica serve `version` of `model`; returns when they do.

    Args:
        version: published beside the one that serves, or a published model's directory; None: the one before
            the latest roll.
        model: its name in the service; None: the only one.

    Raises:
        PublishError: no such version, or its files are damaged.
        RollError: a replica refused it. Nothing has changed, and `status` says why.
    """
    began = time.monotonic()
    statuses = _statuses(handle, application, wait_s)
    key = statuses[0]["key"]
    pointer = read_pointer(key)
    if pointer is None:
        raise RollError(f"the service {application!r} is being removed. Deploy the version instead.")
    name = _name_of(model, pointer)
    old = pointer.current[name]
    try:
        place = _place_of(version, name, pointer)
    except PublishError as error:
        _note_refusal(key, name, str(version), str(error))
        raise
    if place != old:
        if refusals := _stage(handle, application, name, place, began + wait_s):
            _broadcast(handle, "unstage", name, place)
            _note_refusal(key, name, place.version, refusals[0])
            raise RollError(
                f"{application!r} refused version {place.version} of {name!r}: {refusals[0]} "
                f"{old.version} serves on."
            )
        change_pointer(key, lambda now: now.rolled(name, place, time.time()))
    # From here on the roll has happened: what remains is to see it on every replica.
    while True:
        _broadcast(handle, "follow")
        statuses = _statuses(handle, application, max(began + wait_s - time.monotonic(), 1.0))
        if all(status["models"][name] == place.version for status in statuses):
            break
        now = read_pointer(key)
        if now is None or now.current[name] != place:
            _broadcast(handle, "unstage", name, place)
            raise RollError(
                f"{application!r} rolled to version {place.version} of {name!r}, and was "
                f"{'removed' if now is None else f'rolled to {now.current[name].version}'} by somebody else "
                "meanwhile. Look at `client.status()`."
            )
        if time.monotonic() > began + wait_s:
            raise RollError(
                f"{application!r} rolls to version {place.version} of {name!r}, and after {wait_s:g} s not "
                "every replica serves it: they go on trying. Look at `client.status()`."
                + "".join(f" One says: {said}" for status in statuses for said in status["refused"].values())
            )
        time.sleep(_PAUSE_S)
    if (Path(place.path) / MANIFEST).is_file():
        # What is deployed anew, after the whole cluster went, is what served last.
        home = Path(place.path).parent
        set_current(home.parent, home.name, place.version)
    return RollResult(name, place.version, old.version, len(statuses), time.monotonic() - began)


def _note_refusal(key: str, name: str, version: str, error: str) -> None:
    change_pointer(key, lambda now: now.refused(name, version, time.time(), error))


def service_status(handle: Any, application: str, wait_s: float) -> dict[str, Any]:
    """What is served, by the pointer and by each replica."""
    statuses = _statuses(handle, application, wait_s)
    pointer = read_pointer(statuses[0]["key"])
    shown = [{name: value for name, value in status.items() if name != "key"} for status in statuses]
    return {
        "name": application,
        "models": {} if pointer is None else {name: p.version for name, p in pointer.current.items()},
        "places": {} if pointer is None else {name: p.path for name, p in pointer.current.items()},
        "before": {} if pointer is None else {name: p.version for name, p in pointer.before.items()},
        "last_roll": {} if pointer is None else pointer.last_roll,
        "ensembles": statuses[0]["ensembles"],
        "replicas": shown,
    }


def _statuses(handle: Any, application: str, wait_s: float) -> list[dict[str, Any]]:
    """Of every replica that answers; waits for one."""
    deadline = time.monotonic() + wait_s
    while True:
        found = _broadcast(handle, "status", timeout_s=wait_s)
        answers = [answer for answer in found if isinstance(answer, Mapping)]
        if answers:
            return [dict(answer) for answer in answers]
        _wait_for_replicas(application, deadline)


def _stage(handle: Any, application: str, name: str, place: ModelPlace, deadline: float) -> list[str]:
    """Why replicas refuse the version; empty: those that live have it, at least one. One that died follows
    when it is back."""
    while True:
        found = _broadcast(handle, "stage", name, place, timeout_s=max(deadline - time.monotonic(), 1.0))
        living = [answer for answer in found if not isinstance(answer, RayActorError)]
        if living:
            return [_said(answer) for answer in living if isinstance(answer, Exception)]
        _wait_for_replicas(application, deadline)


def _broadcast(handle: Any, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
    """What each replica answers, or raised; empty while there is none."""
    try:
        answers: list[Any] = handle.broadcast(method, *arguments).results(
            return_exceptions=True, timeout_s=timeout_s
        )
    except DeploymentUnavailableError:
        return []
    return answers


def _wait_for_replicas(application: str, deadline: float) -> None:
    if application not in serve.status().applications:
        raise RollError(f"no application {application!r} runs on this cluster: it was removed.")
    if time.monotonic() > deadline:
        raise RollError(f"no replica of {application!r} answers. Look at `serve status`.")
    time.sleep(_PAUSE_S)


def _said(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return str(cause) if isinstance(cause, RayrmError) else f"{type(cause).__name__}: {cause}"


def _name_of(model: str | None, pointer: Pointer) -> str:
    if model is None and len(pointer.current) == 1:
        return next(iter(pointer.current))
    if model not in pointer.current:
        said = "no model is named" if model is None else f"`model` ({model!r}) is none of them"
        raise RollError(
            f"{said}: the service has {', '.join(pointer.current)}. Pass one (`model=`, on the command line "
            "`--model`)."
        )
    return str(model)


def _place_of(version: str | Path | None, name: str, pointer: Pointer) -> ModelPlace:
    """The version's directory, whose files are compared with their checksums here already."""
    if version is None:
        if name not in pointer.before:
            raise RollError(f"{name!r} was not rolled since it was deployed: there is no version before it.")
        return pointer.before[name]
    if not str(version).strip():
        raise PublishError(f"`version` ({str(version)!r}) is empty. Pass a version, or its directory.")
    old = Path(pointer.current[name].path)
    if not Path(version).is_dir() and not (old / MANIFEST).is_file():
        raise PublishError(
            f"version ({str(version)!r}) is not a directory, and the model that serves ({str(old)!r}) was "
            "not published, so it has no versions beside it. Publish with `rayrm publish`, and pass the "
            "version's directory."
        )
    if Path(version).is_dir():
        published = open_published(Path(version))
    else:
        published = open_published(old.parent, version=str(version))
    home = published.path.resolve().parent
    if (old / MANIFEST).is_file() and home.name != old.resolve().parent.name:
        raise PublishError(
            f"version ({str(version)!r}) is published as {home.name!r}, and the model that serves as "
            f"{old.resolve().parent.name!r}: a later deployment of that would not find it. Publish it with "
            f"`--name {old.resolve().parent.name}`."
        )
    return ModelPlace(str(published.path.resolve()), published.version)
