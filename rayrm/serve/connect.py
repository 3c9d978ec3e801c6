"""[RAY] Which Ray cluster a command talks to: the one that is named, that runs here, or a new one."""

from __future__ import annotations

import os
import re
import socket

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import AuthenticationError

from rayrm.errors import ClusterError

_TOKEN = (
    "If the cluster is there and asks for a token, copy its head's ~/.ray/auth_token to this machine and "
    "type export RAY_AUTH_MODE=token"
)


def connect(address: str | None = None, *, start: bool = True) -> bool:
    """Connect this process to Ray; True when that started a new cluster here, for the process's own life.

    The cluster is `address`, else RAY_ADDRESS, else one that runs on this machine, else a new one; not
    that with `start=False`: who calls a service must not start an empty cluster. A token of Ray's that this
    machine has (`ray start` makes one) is shown, unless RAY_AUTH_MODE says otherwise. Raises ClusterError.
    """
    if ray.is_initialized():
        return False
    wanted = address or os.environ.get("RAY_ADDRESS")
    try:
        if wanted is not None:
            _check_reachable(wanted)
            # With an address Ray shows no token by itself.
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ray.init(address=wanted or "auto", log_to_driver=False)
    except (OSError, AuthenticationError) as error:  # ConnectionError is an OSError
        said = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
        if wanted is not None:
            raise ClusterError(
                f"no Ray cluster lets us in at {wanted!r}: {said}. Start one with `ray start --head`, or "
                f"leave the address (and RAY_ADDRESS) out to start one in this process. {_TOKEN}."
            ) from error
        if not start:
            raise ClusterError(
                f"no Ray cluster runs here that lets us in: {said}. Start the service with `rayrm serve "
                f"MODEL`, or give its cluster's address (`--address`, or RAY_ADDRESS). {_TOKEN}."
            ) from error
        ray.init(include_dashboard=False, log_to_driver=False)
        return True
    return wanted == "local"


def shows_token() -> bool:
    """Whether this process joins clusters by Ray's token, and others must too."""
    return bool(is_token_auth_enabled())


def _check_reachable(address: str) -> None:
    """Raise OSError when nothing listens at `host:port`: Ray itself would try for some eight minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()
