"""`compute_metrics`, called as transformers' Trainer calls it, on all scores of a set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize

from rayrm.config import RewardConfig
from rayrm.data.labels import UNRANKED
from rayrm.data.row_index import RowIndex
from rayrm.errors import ConfigError
from rayrm.train.evaluation import Scores

logger = logging.getLogger("rayrm.train")


@dataclass(frozen=True, slots=True)
class UserMetrics:
    """The user's own metrics of an evaluation set of pairs; every rank computes them, as with transformers.

    Args:
        compute: `EvalPrediction` -> metrics by name. Its `predictions` are TRL's, float32 `[2R, 1]`: batch by
            batch the chosen scores and then the rejected ones. Its `label_ids` are `()`: there are none.
            (TRL 1.16 drops half the scores of a last batch that is short; here all are given.)
        preprocess: `preprocess_logits_for_metrics`, on each batch's `[2n, 1]`.
        batch_rows: rows of a batch (`per_device_eval_batch_size`).
    """

    compute: Callable[[EvalPrediction], Mapping[str, Any]]
    preprocess: Callable[[torch.Tensor, Any], torch.Tensor] | None
    batch_rows: int

    def of(self, scores: Scores, index: RowIndex) -> dict[str, float]:
        """Raises ConfigError for rows that are no pairs, and for what is no table of numbers."""
        if (index.num_completions != 2).any() or (index.ranks == UNRANKED).any():
            raise ConfigError(
                "`compute_metrics` is given a chosen and a rejected score of each row, as in TRL, and the "
                "evaluation set has rankings or scored completions. Leave them out, or use `predict` instead."
            )
        found = self.compute(EvalPrediction(predictions=self.predictions(scores), label_ids=()))
        plain = denumpify_detensorize(dict(found)) if isinstance(found, Mapping) else {"": found}
        for name, value in plain.items():
            if not isinstance(name, str) or not name or not isinstance(value, int | float):
                raise ConfigError(
                    f"`compute_metrics` gave {name!r}: {value!r}. It must return a dict of numbers by name, "
                    'such as {"p10_margin": 0.3}.'
                )
        return {name: float(value) for name, value in plain.items()}

    def predictions(self, scores: Scores) -> npt.NDArray[Any]:
        """All batches' scores, as they went through `preprocess`."""
        pairs = torch.from_numpy(scores.reshape(-1, 2)).float()
        blocks = [batch.T.reshape(-1, 1) for batch in torch.split(pairs, self.batch_rows)]
        if self.preprocess is not None:
            blocks = [self.preprocess(block, ()) for block in blocks]
        return np.concatenate([block.numpy() for block in blocks])


def user_metrics(compute: Any, preprocess: Any, config: RewardConfig) -> UserMetrics | None:
    """What the trainer was given; None without `compute_metrics`."""
    if compute is not None:
        return UserMetrics(compute, preprocess, config.per_device_eval_batch_size)
    if preprocess is not None:
        logger.warning("`preprocess_logits_for_metrics` is for `compute_metrics`, which is not given: unused")
    return None


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics under `prefix` ("eval_"), which a name that has it already keeps."""
    return {name if name.startswith(prefix) else f"{prefix}{name}": value for name, value in metrics.items()}
