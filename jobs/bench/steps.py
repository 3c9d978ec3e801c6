"""The two optimizer steps that benchmarks compare: ours, and TRL's."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import Stopwatch, device_of
from transformers import PreTrainedModel, TrainerCallback

from rayrm import RewardConfig
from rayrm.data.blocks import index_of, table_of_rows
from rayrm.data.packing import PackedBatch, pack_rows
from rayrm.data.planning import plan_step
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenize import TokenizedRow
from rayrm.model.attention import AttentionPath
from rayrm.model.attention_path import choose_path
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import choose_layout
from rayrm.train.build import ModelSource, build_model
from rayrm.train.engine import TorchEngine
from rayrm.train.evaluation import DEFAULT_TOKEN_BUDGET
from rayrm.train.optimizer import make_optimizer, make_scheduler
from rayrm.train.step import train_step

LEARNING_RATE = 1e-5


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One optimizer step: how long it took, its loss, and its gradient norm before clipping."""

    seconds: float
    loss: float
    grad_norm: float


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """What a step can be told."""
    parser.add_argument("--batch", type=int, default=8, help="pairs in one optimizer step")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on in all (default: off)")
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_TOKEN_BUDGET, help="a micro-batch's budget")


def in_steps(rows: Sequence[TokenizedRow], batch: int) -> list[Sequence[TokenizedRow]]:
    """The rows of each step, in order."""
    return [rows[begin : begin + batch] for begin in range(0, len(rows), batch)]


def settings_of(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What both trainers are told, in TRL's words."""
    return {
        "per_device_train_batch_size": arguments.batch,
        "max_length": arguments.max_length,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "bf16": arguments.dtype == "bf16",
        "use_cpu": device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
    }


class OurStep:
    """rayrm's step, made of what its workers call: plan, pack, train_step.

    Around it they keep freed memory (`keep_freed_memory`); here the caller does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        arguments: argparse.Namespace,
        *,
        share: bool,
        path: AttentionPath | None = None,
    ) -> None:
        self._device = device_of(arguments)
        self._arguments = arguments
        self._config = RewardConfig(**settings_of(arguments, self._device))
        self._model = build_model(ModelSource(model), self._config, tokenizer)
        self._layout = choose_layout(self._model, share_prefix=share, longest=arguments.max_length)
        if self._layout.name != ("shared" if share else "packed"):
            raise SystemExit(f"{type(model).__name__} is {self._layout.name}: {self._layout.reason}")
        autocast = torch.bfloat16 if arguments.dtype == "bf16" else None
        self.path = path or choose_path(self._model, self._device, autocast).name
        self._share = share
        self._pad_token_id = tokenizer.pad_token_id
        self._initial = {name: value.clone() for name, value in self._model.state_dict().items()}

    def index(self, rows: Sequence[TokenizedRow]) -> RowIndex:
        """What tokenization leaves for the plan."""
        return index_of(table_of_rows(rows)).rows

    def prepare(self, rows: Sequence[TokenizedRow], index: RowIndex) -> list[PackedBatch]:
        """A step's rows as micro-batches."""
        costs = index.costs(share=self._share)
        (plan,) = plan_step(costs, num_ranks=1, max_tokens=self._arguments.max_tokens)
        return [
            pack_rows(
                [rows[place] for place in microbatch.rows],
                self._pad_token_id,
                share=self._share,
                weights=microbatch.weights,
            )
            for microbatch in plan
        ]

    def distinct_tokens(self, rows: Sequence[TokenizedRow]) -> int:
        """Of a step, had it one micro-batch."""
        return pack_rows(rows, self._pad_token_id, share=self._share).num_tokens

    def run(self, steps: Sequence[Sequence[TokenizedRow]]) -> list[TimedStep]:
        """All steps. Between runs the model computes as transformers wrote it, for the baseline's sake."""
        model = self._model.to(self._device)
        model.load_state_dict(self._initial)
        scorer = PackedScorer(model, self._layout, path=self.path)
        optimizer = make_optimizer(scorer, self._config)
        engine = TorchEngine(
            scorer,
            optimizer,
            make_scheduler(optimizer, self._config, len(steps)),
            device=self._device,
            world_size=1,
            max_grad_norm=self._config.max_grad_norm,
            precision=self._arguments.dtype,
        )
        engine.train(True)
        watch, timed = Stopwatch(self._device), []
        indexed = [(rows, self.index(rows)) for rows in steps]
        for rows, index in indexed:
            watch.start()
            totals = train_step(engine, self.prepare(rows, index), len(rows))
            seconds = watch.stop()
            timed.append(TimedStep(seconds, float(totals.sums[0]), float(totals.grad_norm)))
        engine.release()
        scorer.release().cpu()
        return timed


class _StepClock(TrainerCallback):
    """Times each of TRL's steps, and reads what it logs of it."""

    def __init__(self, device: torch.device) -> None:
        self._watch = Stopwatch(device)
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._watch.start()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._watch.stop())


class TrlStep:
    """TRL's RewardTrainer on tokenized rows: its own collator, loss, clipping and loop."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        arguments: argparse.Namespace,
        rows: Sequence[TokenizedRow],
    ) -> None:
        from datasets import Dataset

        self._model, self._tokenizer, self._arguments = model, tokenizer, arguments
        self._device = device_of(arguments)
        self._initial = {name: value.clone() for name, value in model.state_dict().items()}
        self._dataset = Dataset.from_dict(
            {
                "chosen_ids": [row.sequences[0].tolist() for row in rows],
                "rejected_ids": [row.sequences[1].tolist() for row in rows],
            }
        )

    def run(self) -> list[TimedStep]:
        import trl

        self._model.load_state_dict(self._initial)
        clock = _StepClock(self._device)
        with tempfile.TemporaryDirectory() as output_dir:
            trainer = trl.RewardTrainer(
                model=self._model,
                args=trl.RewardConfig(
                    output_dir,
                    train_sampling_strategy="sequential",
                    logging_steps=1,
                    disable_tqdm=True,
                    **settings_of(self._arguments, self._device),
                ),
                train_dataset=self._dataset,
                processing_class=self._tokenizer,
                callbacks=[clock],
            )
            trainer.remove_callback(_printer())
            trainer.train()
        self._model.cpu()
        logged = [record for record in trainer.state.log_history if "grad_norm" in record]
        return [
            TimedStep(seconds, record["loss"], float(record["grad_norm"]))
            for seconds, record in zip(clock.seconds, logged, strict=True)
        ]


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback
