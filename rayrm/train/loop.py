"""The training loop: take the step's share, train_step, log?, evaluate?, save?

It knows no Ray and no file: what it logs, evaluates and saves goes through the callables of `Events`. Metrics
are averaged over the logging interval; steps that are done but not logged travel with the checkpoint, so that
a resumed run logs the very numbers an uninterrupted one logs.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.data.order import Cursor
from rayrm.data.packing import PackedBatch
from rayrm.metrics.step import IntervalMean, StepMetrics
from rayrm.objective import Objective
from rayrm.train.checkpoint import TrainState
from rayrm.train.engine import Engine
from rayrm.train.soundness import SeenStep, Soundness
from rayrm.train.step import StepTotals, computed_tokens, train_step

Record = dict[str, float]


@dataclass(frozen=True, slots=True)
class RankStep:
    """One rank's share of a step. `num_rows` and `num_tokens` are the whole step's, over all ranks.

    `padded`: the model pads each micro-batch to its longest row. `row_names`: of each micro-batch its rows'
    names, "" for a dummy. `pack_alone`: the row at a place of a micro-batch by itself. `epoch`: the progress
    after the step, None where nothing tells. `parts`: how many ranks compute each micro-batch together.
    """

    microbatches: Sequence[PackedBatch]
    num_rows: int
    num_tokens: int
    after: Cursor
    row_names: Sequence[Sequence[str]]
    pack_alone: Callable[[int, int], PackedBatch]
    padded: bool = False
    epoch: float | None = 0.0
    parts: int = 1

    @property
    def term_names(self) -> list[str]:
        """Whose each term of this rank's loss is."""
        return [self.row_names[place][row] for place, row in self._term_rows()]

    def alone(self, term: int) -> PackedBatch:
        """The row of this rank's i-th term by itself."""
        return self.pack_alone(*self._term_rows()[term])

    def _term_rows(self) -> list[tuple[int, int]]:
        batches = enumerate(self.microbatches)
        return [(place, row) for place, batch in batches for row in batch.term_rows]

    @property
    def num_tokens_computed(self) -> int:
        """What goes through this rank's model, dummies and padding included."""
        return sum(computed_tokens(b, padded=self.padded, parts=self.parts) for b in self.microbatches)


@dataclass(slots=True)
class Due:
    """What is to be done after a step, in this order."""

    log: bool = False
    evaluate: bool = False
    save: bool = False

    def __bool__(self) -> bool:
        return self.log or self.evaluate or self.save


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a run of `num_steps` logs, evaluates and saves; 0 steps: at the end of each epoch, None: never.

    Nobody knows how many steps an epoch of a stream has: there events go by steps.
    """

    num_steps: int
    steps_per_epoch: int | None
    log_every: int | None
    evaluate_every: int | None
    save_every: int | None
    log_first: bool = False
    evaluates_from: float = 0
    """Steps, or epochs where evaluations go by epochs."""

    @classmethod
    def of(cls, config: RewardConfig, steps_per_epoch: int | None) -> Schedule:
        num_steps = config.max_steps
        if num_steps < 1:
            assert steps_per_epoch is not None  # the trainer asks for `max_steps` of a stream
            num_steps = math.ceil(config.num_train_epochs * steps_per_epoch)

        def every(strategy: str, interval: int) -> int | None:
            return {"no": None, "best": None, "epoch": 0}.get(strategy, interval)

        return cls(
            num_steps,
            steps_per_epoch,
            log_every=every(config.logging_strategy, config.interval("logging", num_steps)),
            evaluate_every=every(config.eval_strategy, config.interval("eval", num_steps)),
            save_every=every(config.save_strategy, config.interval("save", num_steps)),
            log_first=config.logging_first_step,
            evaluates_from=config.eval_delay,
        )

    def epoch_after(self, cursor: Cursor) -> float:
        """The progress after the step at `cursor` of a stream of unknown length, as transformers counts it:
        an epoch is taken to have all of the run's steps."""
        return cursor.epoch + (cursor.step + 1) / self.num_steps

    def logs(self, step: int) -> bool:
        return self._due(self.log_every, step) or (self.log_first and step == 1)

    def evaluates(self, step: int) -> bool:
        epoch = self.evaluate_every == 0 and self.steps_per_epoch
        if (step / epoch if epoch else step) < self.evaluates_from:
            return False
        return self._due(self.evaluate_every, step) or self._ends(self.evaluate_every, step)

    def saves(self, step: int) -> bool:
        return self._due(self.save_every, step) or self._ends(self.save_every, step)

    def due(self, step: int, *, at_epoch: bool | None = None) -> Due:
        """What a step asks for; `at_epoch`: only what goes by epochs, or only what does not."""

        def of(every: int | None, is_due: bool) -> bool:
            return is_due and (at_epoch is None or at_epoch == (every == 0))

        first = self.log_first and step == 1 and not at_epoch
        return Due(
            of(self.log_every, self.logs(step)) or first,
            of(self.evaluate_every, self.evaluates(step)),
            of(self.save_every, self.saves(step)),
        )

    def _ends(self, every: int | None, step: int) -> bool:
        # As transformers: a run that evaluates or saves by steps also does so after its last.
        return every is not None and step == self.num_steps

    def _due(self, every: int | None, step: int) -> bool:
        if every is None or step == 0:
            return False
        if every == 0:
            assert self.steps_per_epoch is not None
            return step % self.steps_per_epoch == 0 or step == self.num_steps
        return step % every == 0


@dataclass(frozen=True, slots=True)
class Events:
    """What happens around the steps. Every rank calls each; what only rank 0 does, it decides itself.

    `trained` is told a step's number, this rank's share of it, and whether its update was left out.
    `leaves`: whether the run is to save and leave after the step it has done.
    `begins` is told where training stands before a step, and whether an epoch, or this process, begins
    with it.
    `due`: what a step asks for, in place of the schedule; it is told whether the step ends an epoch.
    `evaluate`: whether this step's checkpoint is wanted for what it found.
    `stops`: whether training ends with the step it has done.
    """

    progress: Callable[[int], None]
    log: Callable[[Record], None]
    evaluate: Callable[[TrainState], bool]
    save: Callable[[TrainState], None]
    trained: Callable[[int, RankStep, bool], None] = lambda step, share, skipped: None
    leaves: Callable[[], bool] = lambda: False
    begins: Callable[[TrainState, bool], None] = lambda state, begins_epoch: None
    due: Callable[[TrainState, bool], Iterable[Due]] | None = None
    stops: Callable[[], bool] = lambda: False


@dataclass(slots=True)
class Interval:
    """The steps since the last log: as each rank counted them, and as all ranks together."""

    local: list[StepTotals] = field(default_factory=list)
    local_tokens: list[int] = field(default_factory=list)
    reduced: list[list[float]] = field(default_factory=list)

    def add(self, totals: StepTotals, num_tokens_computed: int) -> None:
        self.local.append(totals)
        self.local_tokens.append(num_tokens_computed)

    def __bool__(self) -> bool:
        """Whether there are steps that were not logged."""
        return bool(self.local or self.reduced)

    def reduce(self) -> list[list[float]]:
        """Add up over ranks what is still local: one row of 12 numbers per step. The only host sync."""
        if self.local:
            sums = torch.stack([totals.sums for totals in self.local])
            tokens = torch.tensor(self.local_tokens, dtype=sums.dtype, device=sums.device)
            sums = torch.cat([tokens[:, None], sums], dim=1)
            extremes = torch.stack([totals.extremes for totals in self.local])
            norms = torch.stack([totals.grad_norm for totals in self.local]).double()
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(sums)
                dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
            self.reduced += torch.cat([sums, extremes, norms[:, None]], dim=1).tolist()
            self.local, self.local_tokens = [], []
        return self.reduced

    def add_to(self, state: TrainState) -> None:
        """Count the interval's losses and computed tokens into `state`."""
        for tokens, loss, *_ in self.reduce():
            state.num_tokens_computed += int(tokens)
            state.loss_sum += loss

    def take(self) -> Record:
        """The interval's means by TRL's names, with the last step's grad_norm; starts the next interval."""
        mean = IntervalMean()
        # A step that was left out has the weight of no row.
        rows = [row for row in self.reduce() if row[5] > 0]
        for row in rows:
            _, loss, won, margin, reward, weight, decided, error, rated, low, minus_high, _ = row
            step = StepMetrics(
                pairs=weight,
                loss=loss * weight,
                correct=won,
                margin=margin,
                reward=2 * reward,
                min_reward=low,
                max_reward=-minus_high,
                decided=decided,
                squared_error=error,
                rated=rated,
            )
            mean.add(step.means())
        self.reduced = []
        return {**mean.take(), "grad_norm": rows[-1][-1]} if rows else {}


def run_loop(
    engine: Engine,
    steps: Iterator[RankStep],
    schedule: Schedule,
    state: TrainState,
    events: Events,
    *,
    objective: Objective | None = None,
    soundness: Soundness | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> TrainState:
    """Train from where `state` stands to the schedule's end, or to where the run is to leave.

    `objective`: what is minimized (None: the usual one), as the steps were packed for it.
    `now` tells the time in seconds.
    """
    interval = Interval(reduced=list(state.interval))
    soundness = soundness or Soundness(engine)
    clock = _Clock(now)
    due = events.due or (lambda state, ends_epoch: [schedule.due(state.step)])
    is_first = True
    engine.train(True)
    while state.step < schedule.num_steps:
        events.begins(state, is_first or state.cursor.step == 0)
        is_first = False
        clock.wait()
        step = next(steps)
        clock.resume(step)
        learning_rate = engine.learning_rate()
        totals = train_step(
            engine,
            step.microbatches,
            step.num_rows,
            objective=objective,
            spoils=soundness.skips,
        )
        state.step += 1
        seen = SeenStep(state.step, totals.nonfinite, step.term_names, step.num_rows)
        if skipped := soundness.was_skipped(seen, totals, step.alone):
            state.skipped_steps += 1
            totals = StepTotals.none(engine.device)
        interval.add(totals, step.num_tokens_computed)
        state.epoch = schedule.epoch_after(state.cursor) if step.epoch is None else step.epoch
        state.cursor = step.after
        state.num_tokens += step.num_tokens
        events.trained(state.step, step, skipped)
        events.progress(state.step)
        leaves = state.step < schedule.num_steps and events.leaves()
        saved = False
        for asked in due(state, state.cursor.step == 0 or state.step == schedule.num_steps):
            if asked:
                soundness.check(interval.reduce(), state.step)
            if asked.log and interval:
                events.log(_record(state, interval, soundness, learning_rate, clock))
            if asked.evaluate:
                engine.train(False)
                with clock.stopped():
                    wanted = events.evaluate(state)
                engine.train(True)
                asked.save = asked.save or wanted
            if asked.save:
                _save(state, interval, events, clock)
                saved = True
        if leaves:
            soundness.check(interval.reduce(), state.step)
            if not saved:
                _save(state, interval, events, clock)
            return state
        if events.stops():
            break
    soundness.check(interval.reduce(), state.step)
    interval.add_to(state)
    return state


def _record(
    state: TrainState, interval: Interval, soundness: Soundness, learning_rate: float, clock: _Clock
) -> Record:
    """What the log says of the interval, which ends here."""
    interval.add_to(state)
    num_skipped = sum(row[5] == 0 for row in interval.reduced)
    return {
        "step": state.step,
        **interval.take(),
        **({"skipped_steps": num_skipped} if soundness.skips else {}),
        "learning_rate": learning_rate,
        "num_tokens": state.num_tokens,
        "num_tokens_computed": state.num_tokens_computed,
        "epoch": state.epoch,
        **clock.take(),
    }


def _save(state: TrainState, interval: Interval, events: Events, clock: _Clock) -> None:
    state.interval = interval.reduce()
    with clock.stopped():
        events.save(state)


class _Clock:
    """Pairs and tokens per second of the interval's steps, and how long the loop waited for data."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._restart()

    def _restart(self) -> None:
        self._began = self._waiting_since = self._now()
        self._waited = 0.0
        self._rows = self._tokens = 0

    def wait(self) -> None:
        self._waiting_since = self._now()

    def resume(self, step: RankStep) -> None:
        self._waited += self._now() - self._waiting_since
        self._rows += step.num_rows
        self._tokens += step.num_tokens

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens in the block is no part of the steps."""
        since = self._now()
        yield
        self._began += self._now() - since

    def take(self) -> Record:
        elapsed = max(self._now() - self._began, 1e-9)
        speed = {
            "pairs_per_second": self._rows / elapsed,
            "tokens_per_second": self._tokens / elapsed,
            "data_wait_s": self._waited,
        }
        self._restart()
        return speed
