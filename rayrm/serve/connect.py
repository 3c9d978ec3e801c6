"""[RAY] Which Ray cluster a command talks to: the one that is named, that runs here, or a new one."""

from __future__ import annotations

import os
import socket

import ray

from rayrm.errors import ClusterError


def connect(address: str | None = None, *, start: bool = True) -> bool:
    """Connect this process to Ray; True when that started a new cluster here, for the process's own life.

    The cluster is `address`, else RAY_ADDRESS, else one that runs on this machine, else a new one; not
    that with `start=False`: who calls a service must not start an empty cluster.
    """
    if ray.is_initialized():
        return False
    wanted = address or os.environ.get("RAY_ADDRESS")
    try:
        if wanted is not None:
            _check_reachable(wanted)
        ray.init(address=wanted or "auto", log_to_driver=False)
    except OSError as error:  # ConnectionError is one
        if wanted is not None:
            raise ClusterError(
                f"no Ray cluster lets us in at {wanted!r}: {error}. Start one with `ray start --head`, or "
                "leave the address (and RAY_ADDRESS) out to start one in this process."
            ) from error
        if not start:
            raise ClusterError(
                f"no Ray cluster runs here that lets us in: {error}. Start the service with `rayrm serve "
                "MODEL`, or give its cluster's address (`--address`, or RAY_ADDRESS)."
            ) from error
        ray.init(include_dashboard=False, log_to_driver=False)
        return True
    return wanted == "local"


def _check_reachable(address: str) -> None:
    """Raise OSError when nothing listens at `host:port`: Ray itself would try for some eight minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()
