"""What one rank does from start to end: build, restore, loop, save. Knows torch and files, not Ray.

`TrainJob` is produced by the trainer on the driver and consumed here, once per rank; it must pickle.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from rayrm.config import RewardConfig
from rayrm.data.packing import PackedBatch, pack_rows
from rayrm.data.planning import plan_step
from rayrm.data.quarantine import QUARANTINE, drop_skipped, write_skipped
from rayrm.data.steps import Step
from rayrm.data.stream_steps import StreamedSteps
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import CheckpointError, RayrmError
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.model.attention_path import choose_path
from rayrm.model.cost import attention_weight_of
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import choose_layout, unwrapped
from rayrm.model.reward_model import TextForm
from rayrm.train.allocator import keep_freed_memory
from rayrm.train.budget import Probe, decide_budget
from rayrm.train.build import ModelSource, build_model
from rayrm.train.build_engine import build_engine
from rayrm.train.checkpoint import (
    TrainState,
    checkpoints,
    drop_partial,
    read_state,
    restore_rng,
    step_of,
)
from rayrm.train.checkpoint_writer import CheckpointWriter, Snapshot
from rayrm.train.evaluation import RowSet, note_best, score_rows
from rayrm.train.export import ModelExport, save_trained
from rayrm.train.holding import only_writer
from rayrm.train.host_memory import HostMemory
from rayrm.train.loop import Events, RankStep, Record, Schedule, run_loop
from rayrm.train.optimizer import OptimizerSpec
from rayrm.train.positions import check_positions, check_rope
from rayrm.train.precision import autocast_dtype, resolve_precision
from rayrm.train.preemption import Notice
from rayrm.train.rank import Hosts, Rank
from rayrm.train.records import RunLog
from rayrm.train.row_log import RowLog
from rayrm.train.soundness import Soundness, shown
from rayrm.train.train_data import train_steps

logger = logging.getLogger("rayrm.train")
_STEPS_AHEAD = 2
_EVAL_ROWS = RewardConfig.per_device_eval_batch_size


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One training run, as every rank is told it. `resume` is the checkpoint to begin from, if any.

    `train_set` is a whole set, whose steps each rank derives, or the steps of a stream.

    `max_tokens` is the token budget of a micro-batch; None: the ranks choose one at the start. `built`
    is the model where training runs in the process that built it: it is updated in place.
    """

    config: RewardConfig
    source: ModelSource
    tokenizer: Any
    text_form: TextForm
    train_set: TokenizedSet | StreamedSteps
    eval_sets: dict[str, RowSet]
    output_dir: Path
    max_tokens: int | None
    resume: Path | None = None
    built: torch.nn.Module | None = None
    optimizer: OptimizerSpec | None = None


def train_rank(job: TrainJob, report: Callable[[Record], None]) -> torch.nn.Module:
    """Run `job` on this rank to its end; returns the trained model (sharded under ZeRO-3 of several ranks).

    `report` is called on every rank with each evaluation's metrics and at the end.
    """
    with contextlib.ExitStack() as around:
        if job.config.zero_stage is not None or job.config.deepspeed is not None:
            from rayrm.train.zero import process_group

            around.enter_context(process_group())
        rank, hosts = Rank.here(use_cpu=job.config.use_cpu), Hosts()
        # Before anything of the directory is read or written; around whatever writes there.
        around.enter_context(only_writer(job.output_dir, rank.index, hosts))
        around.enter_context(keep_freed_memory(rank.device))
        return _RankRun(job, rank, hosts, report, around).train()


class _RankRun:
    """The parts of a run that its steps share."""

    def __init__(
        self,
        job: TrainJob,
        rank: Rank,
        hosts: Hosts,
        report: Callable[[Record], None],
        around: contextlib.ExitStack,
    ) -> None:
        """`around` gives the model back as it was when it ends, also where the run raises."""
        self.job, self.rank, self.hosts, self._report = job, rank, hosts, report
        self.config = job.config
        self.begins_from, self.state = self._standing()
        self.source = train_steps(job.train_set, self.config, rank.count)
        if rank.index == 0:
            drop_skipped(job.output_dir / QUARANTINE, self.state.step)
            drop_partial(job.output_dir)
            self.source.read_ahead(self.state.cursor)  # while the model is built
        set_seed(self.config.seed)
        built = job.built if job.built is not None else build_model(job.source, job.config, job.tokenizer)
        model = built.to(rank.device)
        sets = [job.train_set.sample, *job.eval_sets.values()]
        longest = max(int(s.index.lengths.max()) for s in sets)
        check_positions(unwrapped(model), longest, self._say)
        check_rope(unwrapped(model), longest, self.config, rank.count)
        self.layout = choose_layout(model, share_prefix=self.config.share_prefix, longest=longest)
        self._say(str(self.layout))
        if self.config.per_device_eval_batch_size != _EVAL_ROWS:
            self._say(
                f"`per_device_eval_batch_size` ({self.config.per_device_eval_batch_size}) sets nothing here: "
                "evaluation goes by tokens (`max_tokens_per_microbatch`), and its metrics depend on neither"
            )
        precision = resolve_precision(self.config, rank.device)
        path = choose_path(model, rank.device, autocast_dtype(precision))
        if self.layout.name != "padded":
            self._say(str(path))
        self.attention_weight = attention_weight_of(model)
        multiple = self.config.pad_to_multiple_of
        self.export = ModelExport(model, job.tokenizer, job.text_form) if rank.index == 0 else None
        self.module = PackedScorer(
            model,
            self.layout,
            path=path.name,
            pad_to_multiple_of=multiple if isinstance(multiple, int) else None,
        )
        around.callback(self.module.release)
        self.pad_token_id = unwrapped(model).config.get_text_config().pad_token_id
        probe = Probe(self.module, precision, rank.device, self.pad_token_id)
        self.max_tokens = decide_budget(
            probe,
            job.train_set.sample,
            self.config,
            job.max_tokens,
            output_dir=job.output_dir,
            rank=rank.index,
            num_ranks=rank.count,
        )
        self.schedule = Schedule.of(self.config, self.source.steps_per_epoch)
        self.engine = build_engine(
            self.config, self.module, rank, precision, self.schedule.num_steps, job.optimizer
        )
        if rank.count == 1:
            around.callback(self.engine.release)
        self.notice = Notice(job.output_dir, hosts, looks=rank.index == 0)
        self.row_log = RowLog(job.output_dir, rank.index, rank.count, active=self.config.log_rows)
        self.writer = CheckpointWriter(
            job.output_dir,
            rank.index,
            rank.count,
            self.config.save_total_limit,
            whole=lambda path: self._say(f"saved {path}"),
            hosts=hosts,
        )
        self.log = RunLog(job.output_dir, self.config, active=rank.index == 0)

    def _say(self, message: str) -> None:
        if self.rank.index == 0:
            logger.info("%s", message)

    def train(self) -> torch.nn.Module:
        state = self._restore()
        steps = _ahead(self._steps(state))
        events = Events(
            self._progress, self._log, self._evaluate, self._save, self._trained, self.notice.to_leave
        )
        with contextlib.ExitStack() as closing:
            for opened in (self.log, self.row_log, steps, self.writer):
                closing.enter_context(contextlib.closing(opened))
            if self.config.eval_on_start and state.step == 0:
                self.engine.train(False)
                self._evaluate(state)
            self._progress(state.step)
            state = run_loop(
                self.engine,
                steps,
                self.schedule,
                state,
                events,
                center_rewards_coefficient=self.config.center_rewards_coefficient,
                soundness=Soundness(
                    self.engine,
                    skips=self.config.nonfinite_loss == "skip",
                    hosts=self.hosts,
                    on_skip=self._keep_skipped,
                ),
            )
            self.writer.wait()
            if state.step == self.schedule.num_steps:
                self._finish(state)
            elif self.rank.index == 0:
                self.log.leave(state.step, self.schedule.num_steps)
        self.rank.barrier()
        return self.module.model

    def _finish(self, state: TrainState) -> None:
        if self.config.load_best_model_at_end and state.best_checkpoint:
            self.engine.load(self.job.output_dir / state.best_checkpoint / "engine")
            self._say(f"the best model is {state.best_checkpoint} (metric {state.best_metric:.4f})")
        self._write_model()
        self._report({"step": state.step, "train_loss": state.train_loss})
        self.rank.barrier()
        if self.rank.index == 0:
            self.log.finish(state, self.schedule.num_steps)

    def _standing(self) -> tuple[Path | None, TrainState]:
        """The checkpoint that the run goes on from, if any, and where training stands."""
        found = checkpoints(self.job.output_dir)
        # One rank decides: of what an attempt before has done last, a shared disk may not tell all at once.
        newest = self.hosts.from_first(step_of(found[-1]) if found else -1)
        source = self.job.resume if newest < 0 else self.job.output_dir / f"checkpoint-{newest}"
        state = TrainState() if source is None else read_state(source)
        if source is not None and source.parent != self.job.output_dir:
            # The best checkpoint so far is the other directory's.
            state.best_metric = state.best_checkpoint = None
        state.num_workers = self.rank.count
        return source, state

    def _restore(self) -> TrainState:
        """Of what the directory says of later steps nothing stays: they are done again."""
        state, source = self.state, self.begins_from
        state.max_tokens = self.max_tokens
        self.log.begin(state.step)
        self.row_log.begin(state.step)
        if source is not None:
            self.engine.load(source / "engine")
            restore_rng(source, self.rank.index)
            self._say(f"resuming after step {state.step} from {source}")
        return state

    def _steps(self, state: TrainState) -> Iterator[RankStep]:
        for step in self.source.steps(state.cursor):
            yield self._prepare(step)

    def _prepare(self, step: Step) -> RankStep:
        """Plan the step over all ranks, fetch and pack this rank's share."""
        index = step.index
        shares, padded = self.layout.name == "shared", self.layout.name == "padded"
        costs = index.costs(share=shares, padded=padded)
        plan = plan_step(
            costs,
            num_ranks=self.rank.count,
            # A stream may hold longer rows than its beginning, such as rankings.
            max_tokens=max(self.max_tokens, int(costs.tokens.max())),
            attention_weight=self.attention_weight,
        )
        mine = plan[self.rank.index]
        fetched = [step.fetch(microbatch.rows) for microbatch in mine]

        def pack(rows: list[TokenizedRow], weights: Sequence[float] | None = None) -> PackedBatch:
            return pack_rows(rows, self.pad_token_id, share=shares, weights=weights)

        def names(rows: list[TokenizedRow], weights: Sequence[float]) -> list[str]:
            weighed = zip(rows, weights, strict=True)
            return [self.job.train_set.name_of(row) if weight else "" for row, weight in weighed]

        parts = [(rows, microbatch.weights) for rows, microbatch in zip(fetched, mine, strict=True)]
        return RankStep(
            [pack(*part) for part in parts],
            index.num_rows,
            int(index.lengths.sum()),
            step.after,
            row_names=[names(*part) for part in parts],
            pack_alone=lambda place, row: pack([fetched[place][row]]),
            padded=padded,
            epoch=step.epoch,
        )

    def _keep_skipped(self, step: int, rows: list[str]) -> None:
        if self.rank.index == 0:
            write_skipped(self.job.output_dir / QUARANTINE, step, rows)
            why = f"the loss of {shown(rows)}" if rows else "the gradient norm"
            logger.warning("step %d was left out: %s is not finite", step, why)

    def _trained(self, step: int, share: RankStep, skipped: bool) -> None:
        rows = [name for names in share.row_names for name in names if name]
        self.row_log.write(step, share.after, rows, skipped=skipped)

    def _progress(self, step: int) -> None:
        self.writer.poll()
        if self.rank.index == 0:
            self.log.progress(step, self.schedule.num_steps)

    def _log(self, record: Record) -> None:
        self.log.write(record)

    def _evaluate(self, state: TrainState) -> None:
        """Evaluate every set; note which checkpoint is the best."""
        found: Record = {}
        for name, rows in self.job.eval_sets.items():
            scores = score_rows(
                self.engine.scores,
                rows,
                layout=self.layout,
                path=self.module.path,
                pad_token_id=self.pad_token_id,
                max_tokens=self.max_tokens,
                attention_weight=self.attention_weight,
                device=self.rank.device,
            )
            if bad := int((~np.isfinite(scores)).sum()):
                raise RayrmError(
                    f"{bad} of {len(scores)} scores of the evaluation set are not finite after step "
                    f"{state.step}: `{name or 'eval'}` has rows that the model cannot score. Look for rows "
                    "unlike the others, or train in fp32 (`bf16=false`); the last checkpoint is intact."
                )
            metrics = evaluate_scores(scores, rows.index, center=self.config.center_rewards_coefficient)
            prefix = f"eval_{name}_" if name else "eval_"
            record = {f"{prefix}{key}": value for key, value in metrics.items()}
            record |= {"step": state.step, "epoch": state.epoch}
            found |= record
            self._log(record)
            self._report(record)
        # A better model that no checkpoint holds must not stand in the way of one that is kept.
        if self.schedule.saves(state.step):
            note_best(state, found, self.config)

    def _save(self, state: TrainState) -> None:
        self.log.sync()
        self.row_log.sync()

        def take(host: HostMemory) -> Snapshot:
            engine = self.engine.state(host)
            gathered = self.engine.model_state()
            if self.export is None:
                return Snapshot(engine)
            return Snapshot(engine, self.export.take(self.module.model, gathered, host))

        self.writer.save(state, take)

    def _write_model(self) -> None:
        """Rank 0 saves the model; where it cannot, all ranks end."""
        gathered = self.engine.model_state()
        problems = []
        if self.rank.index == 0:
            try:
                save_trained(
                    self.module.model,
                    self.job.tokenizer,
                    self.job.output_dir,
                    text_form=self.job.text_form,
                    gathered=gathered,
                )
            except CheckpointError as error:
                problems.append(str(error))
        if told := self.hosts.joined(problems):
            raise CheckpointError(told[0])


def _ahead(steps: Iterator[RankStep]) -> Generator[RankStep]:
    """The same steps, prepared by one thread a few steps before they are asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="rayrm-prepare") as thread:
        pending = [thread.submit(next, steps) for _ in range(_STEPS_AHEAD)]
        try:
            while True:
                ready = pending.pop(0).result()
                pending.append(thread.submit(next, steps))
                yield ready
        finally:
            for future in pending:
                future.cancel()
