"""The reward service as an RL framework's adapter finds it, and what a log says of its answers.

Frameworks start the processes that call a reward; what they let their users say differs. Whatever they pass
on goes before `RAYRM_REWARD` (the service's name) and `RAYRM_REWARD_MODEL` (which of its models).
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from typing import Any

from rayrm.data.tokenize import TextInput
from rayrm.errors import RewardUnavailableError, VersionError
from rayrm.serve.client import RewardClient
from rayrm.serve.request import ScoreResult, Truncation

SCORED_AT_ONCE = 64


def reward_service(name: str | None = None, model: str | None = None, **settings: Any) -> RewardClient:
    """One `RewardClient` for each process and settings; `settings` are `RewardClient`'s own.

    Raises ConfigError for a setting that `RewardClient` refuses.
    """
    return _client(
        name or os.environ.get("RAYRM_REWARD") or "reward",
        model or os.environ.get("RAYRM_REWARD_MODEL") or None,
        **settings,
    )


def scores_by_one_version(
    client: RewardClient, inputs: Sequence[TextInput], *, truncation: Truncation | None = None
) -> tuple[list[float], str]:
    """The scores, and the version that gave them all: the one that serves first is asked for from then on.

    Many requests, so that how many texts there are has no part in whether one is answered in time. Where
    the service rolls between them its new version scores all again; RewardUnavailableError if it does so
    thrice.
    """
    asked = copy.copy(client)
    for _ in range(3):
        asked.pin_version = None
        scores: list[float] = []
        try:
            for start in range(0, len(inputs), SCORED_AT_ONCE):
                found = asked.score_inputs(inputs[start : start + SCORED_AT_ONCE], truncation=truncation)
                scores += found.scores
                asked.pin_version = found.version
            return scores, found.version
        except VersionError as error:
            told = error
    raise RewardUnavailableError(f"the service rolled thrice while it scored {len(inputs)} texts: {told}")


def figures_of(result: ScoreResult) -> dict[str, float]:
    """What a log says of an answer: its mean score, what it took, the version that gave it, any spread."""
    count = len(result.scores)
    found = {
        "score_mean": sum(result.scores) / count,
        "latency_s": result.timing.total_s,
        "retries": float(result.retries),
        "truncated": len(result.truncated) / count,
        f"version/{result.version}": 1.0,
    }
    return found if result.spread is None else {**found, "spread": sum(result.spread) / count}


@functools.cache
def _client(name: str, model: str | None, **settings: Any) -> RewardClient:
    return RewardClient(name, model=model, **settings)
