"""Runs of one tiny training job in many forms, in this process or on several gloo ranks.

A `Variant` says how to train; `run_variants` trains each into a directory of its own and `outcome_of` reads
back what it left: losses and gradient norms of every step, and the saved weights. All variants of one rank
count share one spawn: importing torch and deepspeed costs seconds in each process.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from peft import (
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    RoadConfig,
    VeraConfig,
)

from rayrm.config import RewardConfig
from rayrm.data.preference import parse_row
from rayrm.data.tokenize import TokenizedRow, tokenize_rows
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import RayrmError
from rayrm.model.layout import choose_layout
from rayrm.train.build import ModelSource
from rayrm.train.checkpoint import checkpoints
from rayrm.train.job import TrainJob
from rayrm.train.worker import train_rank
from tests.tiny import saved_weights, tiny_model, tiny_rows, tiny_tokenizer

PAIRS_PER_STEP = 8
NUM_STEPS = 20
# 13 steps an epoch, of which the last has 4 pairs: the denominator is not always the same.
NUM_PAIRS = 100
PLENTY = 100_000
CENTER = 0.01
# One step of plain gradient descent, so large that what was before is lost beside the gradient.
HUGE = 1000.0
ONE_HUGE_STEP: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": HUGE,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
    "shuffle": False,
}
# float32 sums in another order: about 1e-7 of their size, and as much again for the weights' last digits.
TOLERANCE = 1e-4
# By default DeepSpeed keeps parameters below 100,000 elements whole on every rank: all of a tiny model's.
GATHERED: dict[str, Any] = {
    "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
}
# Adapters' configurations by name; PEFT writes into one when it is used, so each is made anew.
SOME = ["q_proj", "down_proj"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear"),
    "dora": lambda: LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", use_dora=True),
    "rslora": lambda: LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", use_rslora=True),
    "pissa": lambda: LoraConfig(task_type="SEQ_CLS", r=4, target_modules=SOME, init_lora_weights="pissa"),
    "ia3": lambda: IA3Config(task_type="SEQ_CLS"),
    "loha": lambda: LoHaConfig(task_type="SEQ_CLS", r=4, target_modules=SOME),
    "lokr": lambda: LoKrConfig(task_type="SEQ_CLS", r=4, target_modules=SOME),
    "oft": lambda: OFTConfig(task_type="SEQ_CLS", oft_block_size=8, target_modules=SOME),
    "vera": lambda: VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "o_proj"]),
    "hra": lambda: HRAConfig(task_type="SEQ_CLS", r=4, target_modules=SOME),
    "norms": lambda: LNTuningConfig(task_type="SEQ_CLS"),
    "fourier": lambda: FourierFTConfig(task_type="SEQ_CLS", n_frequency=20, target_modules=["q_proj"]),
    "miss": lambda: MissConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]),
    "road": lambda: RoadConfig(task_type="SEQ_CLS", group_size=8, target_modules=["q_proj"]),
}


@dataclass(frozen=True)
class Variant:
    """One way to train the same pairs in the same order. `settings` go into the `RewardConfig`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    padded: bool = False
    # None: chosen from memory.
    max_tokens: int | None = PLENTY
    num_ranks: int = 1
    gradients_times: float = 1.0
    # Train an adapter and the head, with the base frozen.
    lora: bool = False
    # Load the model of this directory, instead of the one in memory.
    loaded: Path | None = None
    # Which of `ADAPTERS`.
    tuner: str = "lora"
    # Stop in the middle of this step, then train again in the same directory.
    stop_in: int | None = None
    # A token whose embedding is NaN: so is the loss of each row that has it.
    poison: int | None = None
    # Training ends with a RayrmError that says this.
    fails: str | None = None
    # Where it stopped, it is left: another variant goes on in a copy of its directory.
    left: bool = False
    # The rows are the evaluation set too.
    evaluates: bool = False


class Stopped(Exception):
    """Raised by `StoppingSet`."""


class StoppingSet:
    """A set of pairs whose `stop_in`-th fetch raises: that of step `stop_in`, on every rank."""

    def __init__(self, whole: TokenizedSet, stop_in: int) -> None:
        self._whole = whole
        self._left = stop_in
        self.num_rows = whole.num_rows
        self.index = whole.index
        self.sample, self.parts = whole, whole.parts

    def fetch(self, rows: npt.ArrayLike) -> list[TokenizedRow]:
        self._left -= 1
        if self._left <= 0:
            raise Stopped
        return self._whole.fetch(rows)

    def name_of(self, row: TokenizedRow) -> str:
        return self._whole.name_of(row)


@dataclass(frozen=True)
class Outcome:
    """What a run left: `losses`, `norms` `[steps]` and the weights by name."""

    losses: npt.NDArray[np.float64]
    norms: npt.NDArray[np.float64]
    weights: dict[str, torch.Tensor]


def tokenized(count: int = NUM_PAIRS, **form: Any) -> list[TokenizedRow]:
    """Tiny pairs as token ids, with margins."""
    rows = [parse_row(row) for row in tiny_rows(count, seed=3, margin=True, **form)]
    pairs = tokenize_rows(tiny_tokenizer(), rows, 512)
    assert all(isinstance(pair, TokenizedRow) for pair in pairs)
    return [pair for pair in pairs if isinstance(pair, TokenizedRow)]


def job_of(variant: Variant, output_dir: Path, rows: Sequence[TokenizedRow]) -> TrainJob:
    """The variant as the job that a rank is given."""
    model = tiny_model(seed=1)
    if variant.padded:
        # Llama does not read this flag; the layout does, and takes the stock forward.
        model.config.attn_logit_softcapping = 50.0
        assert choose_layout(model).name == "padded"
    if variant.gradients_times != 1.0:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * variant.gradients_times)
    if variant.poison is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight[variant.poison] = torch.nan
    settings: dict[str, Any] = {
        "per_device_train_batch_size": PAIRS_PER_STEP // variant.num_ranks,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-3,
        "center_rewards_coefficient": CENTER,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        **variant.settings,
    }
    return TrainJob(
        config=RewardConfig(str(output_dir), **settings),
        source=ModelSource(
            model if variant.loaded is None else str(variant.loaded),
            ADAPTERS[variant.tuner]() if variant.lora else None,
        ),
        tokenizer=tiny_tokenizer(),
        text_form="standard",
        train_set=TokenizedSet.from_rows(rows),
        eval_sets={"": TokenizedSet.from_rows(rows)} if variant.evaluates else {},
        output_dir=output_dir,
        max_tokens=variant.max_tokens,
    )


def run_variants(variants: Sequence[Variant], root: Path, rows: Sequence[TokenizedRow] | None = None) -> None:
    """Train each variant into `root/<its name>`; variants of several ranks share one spawn per rank count.

    `rows`: what they train on, `tokenized()` unless given.
    """
    rows = tokenized() if rows is None else rows
    for variant in variants:
        if variant.num_ranks == 1:
            train(variant, root, rows)
    for num_ranks in sorted({v.num_ranks for v in variants} - {1}):
        chosen = [variant for variant in variants if variant.num_ranks == num_ranks]
        root.mkdir(parents=True, exist_ok=True)
        store = root / f"store-{num_ranks}"
        torch.multiprocessing.spawn(_rank_main, (num_ranks, store, chosen, root, rows), nprocs=num_ranks)


def train(variant: Variant, root: Path, rows: Sequence[TokenizedRow]) -> None:
    """Train on this rank, from the start to the end, stopping between where the variant says so."""
    directory = root / variant.name
    if variant.stop_in is not None:
        stopping = StoppingSet(TokenizedSet.from_rows(rows), variant.stop_in)
        with pytest.raises(Stopped):
            train_rank(replace(job_of(variant, directory, rows), train_set=stopping), lambda record: None)
        if dist.is_initialized():
            dist.barrier()  # rank 0 leaves when the checkpoint is whole, the others when their parts are
        assert checkpoints(directory)
    if variant.left:
        return
    with (
        contextlib.nullcontext() if variant.fails is None else pytest.raises(RayrmError, match=variant.fails)
    ):
        train_rank(job_of(variant, directory, rows), lambda record: None)


def _rank_main(
    rank: int,
    num_ranks: int,
    store: Path,
    variants: Sequence[Variant],
    root: Path,
    rows: Sequence[TokenizedRow],
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), num_ranks), rank=rank, world_size=num_ranks
    )
    try:
        for variant in variants:
            train(variant, root, rows)
    finally:
        dist.destroy_process_group()


def outcome_of(directory: Path) -> Outcome:
    """What a run left in its directory."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [record for line in lines if "loss" in (record := json.loads(line))]
    return Outcome(
        np.array([record["loss"] for record in records]),
        np.array([record["grad_norm"] for record in records]),
        saved_weights(directory),
    )
