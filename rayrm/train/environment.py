"""What the environment in which a run is started says to its ranks, and that of a sweep to its trials.

Processes of a cluster have the environment in which their node joined it. So the process that starts a run
tells them its own: of trackers, object stores and the hub, what their libraries read when they are called.
What is read when a library is imported (HF_HOME, HF_HUB_OFFLINE) is too late then: that is the node's own, or
Ray's `runtime_env`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from rayrm.config import RewardConfig
from rayrm.data.remote import s3_environment
from rayrm.train.storage import storage_environment
from rayrm.train.trackers import tracker_environment

_HUB = ("HF_TOKEN", "HF_ENDPOINT")
# One without the others is another account's, or none's.
_TOGETHER = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def environment_of(config: RewardConfig) -> dict[str, str]:
    """What this process's environment says of what a run with these settings calls."""
    return {
        **{name: os.environ[name] for name in _HUB if name in os.environ},
        **dict(s3_environment()),
        **storage_environment(config),
        **tracker_environment(config.report_to),
    }


def adopt(environment: Mapping[str, str]) -> None:
    """Set what this process's own environment does not say."""
    own = any(name in os.environ for name in _TOGETHER)
    for name, value in environment.items():
        if not (own and name in _TOGETHER):
            os.environ.setdefault(name, value)
