"""The reward service as an RL framework's adapter finds it: by argument, else by environment variable.

Frameworks start the processes that call a reward; what they let their users say differs. Whatever they pass
on goes before `RAYRM_REWARD` (the service's name) and `RAYRM_REWARD_MODEL` (which of its models).
"""

from __future__ import annotations

import functools
import os
from typing import Any

from rayrm.serve.client import RewardClient


def reward_service(name: str | None = None, model: str | None = None, **settings: Any) -> RewardClient:
    """One `RewardClient` for each process and settings; `settings` are `RewardClient`'s own.

    Raises ConfigError for a setting that `RewardClient` refuses.
    """
    return _client(
        name or os.environ.get("RAYRM_REWARD") or "reward",
        model or os.environ.get("RAYRM_REWARD_MODEL") or None,
        **settings,
    )


@functools.cache
def _client(name: str, model: str | None, **settings: Any) -> RewardClient:
    return RewardClient(name, model=model, **settings)
