"""What one rank does from start to end: build, restore, loop, save. Knows torch and files, not Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import set_seed

from rayrm.data.quarantine import QUARANTINE, drop_skipped, write_skipped
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.deepspeed_rules import resolved_stage
from rayrm.errors import CheckpointError, ConfigError, writing
from rayrm.model.adapters import needs_frozen
from rayrm.objective import Objective
from rayrm.train.allocator import give_freed_memory_back, keep_freed_memory
from rayrm.train.attributes import gate_record, settle_attributes
from rayrm.train.callbacks import UserCallbacks
from rayrm.train.checkpoint import (
    TrainState,
    checkpoints,
    drop_partial,
    read_state,
    restore_rng,
    step_of,
)
from rayrm.train.checkpoint_writer import CheckpointWriter, Snapshot
from rayrm.train.environment import adopt
from rayrm.train.evaluation import is_better, note_checkpoint, note_metric
from rayrm.train.export import save_trained
from rayrm.train.holding import only_writer
from rayrm.train.host_memory import HostMemory
from rayrm.train.hub import HubRepository
from rayrm.train.job import TrainJob
from rayrm.train.leg import keeping_settings
from rayrm.train.loop import Events, RankStep, Record, Schedule, run_loop
from rayrm.train.model_card import complete_card
from rayrm.train.nvme import nvme_folders
from rayrm.train.peak_memory import held_bytes
from rayrm.train.preemption import Notice
from rayrm.train.rank import Hosts, Rank
from rayrm.train.rank_evaluation import Evaluated, evaluated_sets, histograms_of, keep_evaluation
from rayrm.train.rank_model import build_rank_model
from rayrm.train.rank_steps import Packer
from rayrm.train.records import RunLog, read_records, replace_text
from rayrm.train.row_log import RowLog
from rayrm.train.sharded_export import ShardExport
from rayrm.train.soundness import Soundness, shown
from rayrm.train.storage import storage_of
from rayrm.train.train_data import train_steps
from rayrm.train.trainer_state import TRAINER_STATE, state_json, trainer_state

logger = logging.getLogger("rayrm.train")


def train_rank(job: TrainJob, report: Callable[[Record], None]) -> torch.nn.Module:
    """Run `job` on this rank to its end; returns the trained model (sharded under ZeRO-3 of several ranks).

    `report` is called on every rank with each evaluation's metrics and at the end.
    """
    adopt(job.environment)
    with contextlib.ExitStack() as around:
        if job.config.zero_stage is not None or job.config.deepspeed is not None:
            from rayrm.train.zero import process_group

            around.enter_context(process_group())
        rank, hosts = Rank.here(use_cpu=job.config.use_cpu), Hosts()
        # Before anything of the directory is read or written; around whatever writes there.
        around.enter_context(only_writer(job.output_dir, rank.index, hosts))
        around.enter_context(nvme_folders(job.config, rank, hosts))
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
        self.config, self.objective = job.config, Objective.of(job.config)
        self._step = 0
        self._measured: tuple[int, float | None] = (0, None)
        self.begins_from, self.state = self._standing()
        self.source = train_steps(job.train_set, self.config, rank.count)
        if rank.index == 0:
            drop_skipped(job.output_dir / QUARANTINE, self.state.step)
            drop_partial(job.output_dir)
            self.source.read_ahead(self.state.cursor)  # while the model is built
        set_seed(self.config.seed)
        self.schedule = Schedule.of(self.config, self.source.steps_per_epoch)
        self.model = build_rank_model(job, rank, hosts, self.schedule.num_steps, around)
        self.engine = self.model.engine
        give_freed_memory_back(rank.device)  # building takes several times what steps take
        if resolved_stage(self.config) != 3:  # there weights come and go, and kept memory would hold them all
            around.enter_context(keep_freed_memory(rank.device))
        # Weights are gathered by all ranks together, and one may find the base's files where another cannot.
        self.saves_frozen = bool(hosts.from_first(int(needs_frozen(self.model.module.model))))
        self.notice = Notice(job.output_dir, hosts, looks=rank.index == 0)
        self._last_step = None if job.leg is None else job.leg.last_step(self.schedule)
        part = self.model.module.part
        names_rows = self.config.log_rows and (part is None or part.counts)
        self.row_log = RowLog(job.output_dir, rank.index, rank.count, active=names_rows)
        self.storage = storage_of(self.config, job.output_dir, job.environment) if rank.index == 0 else None
        pushes = self.config.push_to_hub and self.config.hub_strategy == "every_save" and rank.index == 0
        self.hub = HubRepository(self.config, job.output_dir) if pushes else None
        self.writer = CheckpointWriter(
            job.output_dir,
            rank.index,
            rank.count,
            self.config.save_total_limit,
            whole=self._keep_whole,
            hosts=hosts,
        )
        told, schedule = job.callbacks, self.schedule
        self.callbacks = (
            UserCallbacks(told, self.config, schedule, rank, hosts, job.output_dir) if told else None
        )
        rows_per_step = self.config.train_batch_rows(rank.count)
        self.log = RunLog(
            job.output_dir,
            self.config,
            active=rank.index == 0,
            rows_per_step=rows_per_step,
        )

    def _say(self, message: str) -> None:
        if self.rank.index == 0:
            logger.info("%s", message)

    def _keep_whole(self, checkpoint: Path) -> None:
        self._say(f"saved {checkpoint}")
        if self.storage is not None:
            self.storage.keep(checkpoint, self.config.save_total_limit)
        if self.hub is not None:
            self.hub.push_beside(checkpoint)

    def train(self) -> torch.nn.Module:
        state = self._restore()
        name, left = self.config.run_name or self.job.output_dir.name, self.schedule.num_steps - state.step
        self._say(f"run {name}: {left} steps on {self.rank.count} worker(s), in {self.job.output_dir}")
        parts = self.config.sequence_parallel_size
        packer = Packer(
            self.model.layout.name,
            self.rank.index // parts,
            self.rank.count // parts,
            self.model.max_tokens,
            self.model.attention_weight,
            self.model.pad_token_id,
            name_of=self.job.train_set.name_of,
            objective=self.objective,
            parts=parts,
        )
        steps = packer.ahead(self.source.steps(state.cursor))
        told = self.callbacks
        events = Events(
            self._progress, self._log_steps, self._evaluate, self._save, self._trained, self._leaves
        )
        if told is not None:
            model = self.model.module.model
            records = read_records(self.job.output_dir) if self.rank.index == 0 else []
            told.begin(state, records, model, self.job.tokenizer, self.engine)
            events = dataclasses.replace(events, begins=told.step_begins, due=told.due, stops=told.stops)
        with contextlib.ExitStack() as closing:
            if self.hub is not None:
                closing.enter_context(contextlib.closing(self.hub))
            for opened in (self.log, self.row_log, steps, self.writer):
                closing.enter_context(contextlib.closing(opened))
            if self.config.eval_on_start and state.step == 0:
                self.engine.train(False)
                self._evaluate(state)
            self._progress(state.step)
            # This run's own last checkpoint; from another's it goes on.
            resumed = self.begins_from is not None and self.begins_from.parent == self.job.output_dir
            ended = resumed and told is not None and told.had_stopped(state)
            state = self._loop(steps, state, events, last=state.step if ended else self.schedule.num_steps)
            self.writer.wait()
            if ended or state.step == self.schedule.num_steps or (told is not None and told.stopped):
                self._finish(state)
            elif self.rank.index == 0:
                self.log.leave(state.step, self.schedule.num_steps)
        self.rank.barrier()
        return self.model.module.model

    def _loop(self, steps: Iterator[RankStep], state: TrainState, events: Events, last: int) -> TrainState:
        schedule = dataclasses.replace(self.schedule, num_steps=last)
        soundness = Soundness(
            self.engine,
            skips=self.config.nonfinite_loss == "skip",
            hosts=self.hosts,
            on_skip=self._keep_skipped,
            before_stop=self.writer.wait,  # the last sound checkpoint is kept
        )
        return run_loop(
            self.engine, steps, schedule, state, events, objective=self.objective, soundness=soundness
        )

    def _finish(self, state: TrainState) -> None:
        if self.config.load_best_model_at_end and state.best_checkpoint:
            self.engine.load(self.job.output_dir / state.best_checkpoint / "engine")
            metric = state.best_checkpoint_metric
            self._say(f"the best model is {state.best_checkpoint} (metric {metric:.4f})")
        elif self.config.load_best_model_at_end:
            self._say("no checkpoint was evaluated (`load_best_model_at_end`): the model is the last step's")
        self._write_model()
        if self.rank.index == 0:
            rows = self.job.train_set
            complete_card(
                self.job.output_dir,
                base_model=self.job.source.name,
                report=rows.report if isinstance(rows, TokenizedSet) else None,
                max_length=self.config.max_length,
            )
        self._report({"step": state.step, "train_loss": state.train_loss})
        self.rank.barrier()
        summary = self.log.summarize(state)
        if self.rank.index == 0:
            file = self.job.output_dir / TRAINER_STATE
            with writing(file):
                replace_text(file, self._trainer_state(state))
        self.log.finish(state, self.schedule.num_steps)
        if self.storage is not None:
            self.storage.keep_result()
        if self.callbacks is not None:
            self.callbacks.logged(summary)
            self.callbacks.ended(state)

    def _trainer_state(self, state: TrainState) -> str:
        """transformers' record of where the run stands, of all that is logged."""
        records = read_records(self.job.output_dir)
        return state_json(trainer_state(state, records, self.config, self.schedule, self.job.output_dir))

    def _standing(self) -> tuple[Path | None, TrainState]:
        """The checkpoint that the run goes on from, if any, and where training stands."""
        found = checkpoints(self.job.output_dir)
        # One rank decides: of what an attempt before has done last, a shared disk may not tell all at once.
        newest = self.hosts.from_first(step_of(found[-1]) if found else -1)
        source = self.job.resume if newest < 0 else self.job.output_dir / f"checkpoint-{newest}"
        state = TrainState() if source is None else read_state(source)
        if source is not None and source.parent != self.job.output_dir:
            # The best checkpoint so far is the other directory's.
            state.best_checkpoint = state.best_checkpoint_metric = None
        state.num_workers = self.rank.count
        return source, state

    def _restore(self) -> TrainState:
        """Of what the directory says of later steps nothing stays: they are done again."""
        state, source = self.state, self.begins_from
        state.max_tokens = self.model.max_tokens
        self.log.begin(state.step)
        self.row_log.begin(state.step)
        if source is not None:
            with contextlib.nullcontext() if self.job.leg is None else keeping_settings(self.engine):
                self.engine.load(source / "engine")
            restore_rng(source, self.rank.index)
            self._say(f"resuming after step {state.step} from {source}")
        return state

    def _keep_skipped(self, step: int, rows: list[str]) -> None:
        if self.rank.index == 0:
            write_skipped(self.job.output_dir / QUARANTINE, step, rows)
            why = f"the loss of {shown(rows)}" if rows else "the gradient norm"
            logger.warning("step %d was left out: %s is not finite", step, why)

    def _leaves(self) -> bool:
        if self._step == self._last_step:
            self.notice.leave_now()
        return self.notice.to_leave()

    def _trained(self, step: int, share: RankStep, skipped: bool) -> None:
        self._step = step
        rows = [name for names in share.row_names for name in names if name]
        self.row_log.write(step, share.after, rows, skipped=skipped)

    def _progress(self, step: int) -> None:
        self.writer.poll()
        if self.rank.index == 0:
            self.log.progress(step, self.schedule.num_steps, held_bytes(self.rank.device))

    def _log_steps(self, record: Record) -> None:
        self._log(record | gate_record(self.model.module))

    def _log(self, record: Record) -> None:
        self.log.write(record)
        if self.callbacks is not None:
            self.callbacks.logged(record)

    def _evaluate(self, state: TrainState) -> bool:
        """Evaluate every set, and note how good the model is. Whether this step is to be saved for it."""
        if not self.job.eval_sets and not self.schedule.evaluates(state.step):
            raise ConfigError(
                "a callback asks for an evaluation (`should_evaluate`), and there is no `eval_dataset`. "
                "Pass one."
            )
        found: Record = {}
        sets: dict[str, Evaluated] = {}
        evaluated = evaluated_sets(self.job, self.engine, self.model, self.rank, self.objective, state)
        for name, one in evaluated:
            sets[name] = one
            found |= one.record
            self._log(one.record)
            self._report(one.record)
            if self.callbacks is not None:
                self.callbacks.evaluated(one.record)
        value = note_metric(state, found, self.config)
        if self.rank.index == 0 and sets:
            keep_evaluation(self.job, sets, self.objective, state, value)
            for name, one in sets.items():
                self.log.histograms(state.step, histograms_of(name, one))
        self._measured = (state.step, value)
        if value is None or self.config.save_strategy != "best" or state.step == 0:
            return False
        return is_better(value, state.best_checkpoint_metric, self.config)

    def _save(self, state: TrainState) -> None:
        self.log.sync()
        self.row_log.sync()
        place = self.job.output_dir / f"checkpoint-{state.step}"

        def take(host: HostMemory) -> Snapshot:
            engine = self.engine.state(host)
            export, model = self.model.export, self.model.module.model
            attributes = settle_attributes(self.model.module)
            if isinstance(export, ShardExport):
                part = export.take(model, host, attributes, place)
                return Snapshot(engine, part, export.join if self.rank.index == 0 else None)
            gathered = self.engine.model_state(frozen=self.saves_frozen)
            if export is None:
                return Snapshot(engine)
            return Snapshot(engine, export.take(model, gathered, host, attributes, place))

        measured_at, value = self._measured
        note_checkpoint(state, value if measured_at == state.step else None, self.config)
        if self.callbacks is not None:
            state.callbacks = self.callbacks.exported()
        files = {}
        if self.rank.index == 0:
            files[TRAINER_STATE] = self._trainer_state(state).encode()
        self.writer.save(state, take, files)
        if self.callbacks is not None:
            if self.callbacks.reads_checkpoints:
                self.writer.wait()
            self.callbacks.saved(state)

    def _write_model(self) -> None:
        """Rank 0, or each its part, saves the model; where one cannot, all ranks end."""
        export, model = self.model.export, self.model.module.model
        attributes = settle_attributes(self.model.module)
        if isinstance(export, ShardExport):
            export.save_trained(model, self.job.output_dir, self.hosts, attributes)
            return
        merges = self.config.merge_on_save
        gathered = self.engine.model_state(frozen=merges or self.saves_frozen)
        problems = []
        if export is not None:
            if merges:
                model, gathered = export.merged(model, gathered), None
            try:
                save_trained(
                    model,
                    self.job.tokenizer,
                    self.job.output_dir,
                    text_form=self.job.text_form,
                    gathered=gathered,
                    attributes=attributes,
                    objective=self.objective.settings,
                )
            except CheckpointError as error:
                problems.append(str(error))
        if told := self.hosts.joined(problems):
            raise CheckpointError(told[0])
