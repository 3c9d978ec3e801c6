"""rayrm: reward models for RLHF, trained on preference pairs and served, on Ray.

The public names are loaded on first use, so that `import rayrm` costs milliseconds and needs neither torch
nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrm.config import DataConfig, RewardConfig, SourceConfig
    from rayrm.serve.client import RewardClient
    from rayrm.serve.deployment import deploy
    from rayrm.serve.registry import PublishedModel, publish
    from rayrm.serve.request import ScoreResult
    from rayrm.serve.scorer import RewardModel
    from rayrm.train.trainer import RewardTrainer

__version__ = "0.1.0"
__all__ = [
    "DataConfig",
    "PublishedModel",
    "RewardClient",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "ScoreResult",
    "SourceConfig",
    "deploy",
    "publish",
]

_HOME = {
    "DataConfig": "rayrm.config",
    "PublishedModel": "rayrm.serve.registry",
    "RewardClient": "rayrm.serve.client",
    "RewardConfig": "rayrm.config",
    "RewardModel": "rayrm.serve.scorer",
    "RewardTrainer": "rayrm.train.trainer",
    "ScoreResult": "rayrm.serve.request",
    "SourceConfig": "rayrm.config",
    "deploy": "rayrm.serve.deployment",
    "publish": "rayrm.serve.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rayrm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
