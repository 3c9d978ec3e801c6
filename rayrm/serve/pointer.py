"""[RAY] Which version of each model a service serves: a record in Ray's own store, beside the application.

It lives as long as the application (Serve keeps what it has to restore in the same store): a replica that
starts, or starts again, reads it, whoever made the last roll and wherever that process is now.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.experimental import internal_kv

from rayrm.serve.request import ModelPlace

_NAMESPACE = b"rayrm"
_LOCKED_S = 5.0


@dataclass(frozen=True, slots=True)
class Pointer:
    """`current`: the place of each model's version. `before`: what a roll replaced, for the way back.

    `last_roll`: of each model the version, when (seconds since 1970), and the error where it was refused.
    """

    current: dict[str, ModelPlace]
    before: dict[str, ModelPlace] = field(default_factory=dict)
    last_roll: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rolled(self, name: str, place: ModelPlace, at: float) -> Pointer:
        """After a roll of `name` to `place`; two to one version at once have one way back."""
        before = self.before if self.current[name] == place else {**self.before, name: self.current[name]}
        return Pointer(
            {**self.current, name: place},
            before,
            {**self.last_roll, name: {"version": place.version, "at": at, "error": None}},
        )

    def refused(self, name: str, version: str, at: float, error: str) -> Pointer:
        """After a roll that changed nothing."""
        roll = {"version": version, "at": at, "error": error}
        return dataclasses.replace(self, last_roll={**self.last_roll, name: roll})


def first_pointer(key: str, places: Mapping[str, ModelPlace]) -> Pointer:
    """The record; of a deployment that starts for the first time there is none, and it is `places` then."""
    text = _as_text(Pointer(dict(places)))
    # Of replicas that start together one writes, the others read what it wrote.
    internal_kv._internal_kv_put(key.encode(), text, overwrite=False, namespace=_NAMESPACE)
    return read_pointer(key) or Pointer(dict(places))


def change_pointer(key: str, change: Callable[[Pointer], Pointer]) -> None:
    """Replace the record by what `change` makes of it; rolls at the same time change it one after the other.

    Nothing happens where there is none: the application was removed.
    """
    lock, mine = f"{key}/lock".encode(), secrets.token_bytes(8)
    holder, since = b"", time.monotonic()
    while internal_kv._internal_kv_put(lock, mine, overwrite=False, namespace=_NAMESPACE):
        seen = internal_kv._internal_kv_get(lock, namespace=_NAMESPACE) or b""
        if seen != holder:
            holder, since = seen, time.monotonic()
        elif time.monotonic() - since > _LOCKED_S:
            # Whoever has it is gone: it is held for one reading and one writing.
            internal_kv._internal_kv_del(lock, namespace=_NAMESPACE)
        time.sleep(0.01)
    try:
        if (pointer := read_pointer(key)) is not None:
            text = _as_text(change(pointer))
            internal_kv._internal_kv_put(key.encode(), text, overwrite=True, namespace=_NAMESPACE)
    finally:
        if internal_kv._internal_kv_get(lock, namespace=_NAMESPACE) == mine:
            internal_kv._internal_kv_del(lock, namespace=_NAMESPACE)


def read_pointer(key: str) -> Pointer | None:
    """None where the application was removed, or replaced by another of its name."""
    found = internal_kv._internal_kv_get(key.encode(), namespace=_NAMESPACE)
    if found is None:
        return None
    fields = json.loads(found)
    places = {
        name: {model: ModelPlace(**place) for model, place in fields[name].items()}
        for name in ("current", "before")
    }
    return Pointer(places["current"], places["before"], fields["last_roll"])


def drop_pointers(application: str, *, but: str | None = None) -> None:
    """Forget those of an application that is gone, or was deployed anew under the key `but`."""
    prefix = key_of(application, "").encode()
    for key in internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE):
        if key.decode() != but:
            internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def _as_text(pointer: Pointer) -> bytes:
    return json.dumps(dataclasses.asdict(pointer)).encode()


def key_of(application: str, deployed: str) -> str:
    """Each deployment has its own: replicas of the one before, which leave, don't follow it."""
    return f"serving/{application}/{deployed}"
