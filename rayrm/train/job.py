"""One training run as every rank is told it: the trainer makes it on the driver, each rank carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rayrm.config import RewardConfig
from rayrm.data.stream_steps import StreamedSteps
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.model.saving import TextForm
from rayrm.train.build import ModelSource
from rayrm.train.leg import Leg
from rayrm.train.optimizer import Optimizers, OptimizerSpec
from rayrm.train.user_metrics import UserMetrics


@dataclass(frozen=True, slots=True, repr=False)
class TrainJob:
    """A run; it must pickle, and has no words: Ray Train tells its dashboard what a job is as a string, and
    this one holds tokens and keys. `resume` is the checkpoint to begin from, if any.

    `train_set` is a whole set, whose steps each rank derives, or the steps of a stream.

    `max_tokens` is the token budget of a micro-batch; None: the ranks choose one at the start. `built`
    is the model where training runs in the process that built it: it is updated in place.
    """

    config: RewardConfig
    source: ModelSource
    tokenizer: Any
    text_form: TextForm
    train_set: TokenizedSet | StreamedSteps
    eval_sets: dict[str, TokenizedSet]
    output_dir: Path
    max_tokens: int | None
    resume: Path | None = None
    built: torch.nn.Module | None = None
    optimizer: OptimizerSpec | None = None
    optimizers: Optimizers | None = None
    metrics: UserMetrics | None = None
    callbacks: tuple[TrainerCallback, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """What the driver's environment says to the ranks, see `environment.py`."""
    leg: Leg | None = None
    """Of a trial of population based training: the part of its run that this job is."""
