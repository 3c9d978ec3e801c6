"""transformers' callbacks around a run: rank 0 calls them, at the events of TRL's trainer, and in its order.

What they decide (log, evaluate, save, stop) all ranks follow: rank 0 tells them once after each call that may
have decided something, and so an error of a callback ends all ranks. There is no `on_substep_end` (a step has
as many micro-batches as memory asks for) and no `on_prediction_step`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError, RayrmError
from rayrm.train.checkpoint import TrainState
from rayrm.train.engine import Engine
from rayrm.train.loop import Due, Record, Schedule
from rayrm.train.rank import Hosts, Rank
from rayrm.train.trainer_state import stand, trainer_state

logger = logging.getLogger("rayrm.train")
_NO_EVENT = {
    "on_substep_end": "a step's micro-batches are as many as memory asks for",
    "on_prediction_step": "evaluation goes by tokens, in micro-batches of no fixed size",
}
_LOG, _EVALUATE, _SAVE, _STOP, _FAILED = 1, 2, 4, 8, 16


def check_callbacks(callbacks: Sequence[TrainerCallback | type[TrainerCallback]]) -> list[TrainerCallback]:
    """The callbacks; classes are called. Raises ConfigError for what is none, or needs other events."""
    made = [one() if isinstance(one, type) else one for one in callbacks]
    for one in made:
        if not isinstance(one, TrainerCallback):
            raise ConfigError(
                f"`callbacks` has a {type(one).__name__}. Pass `transformers.TrainerCallback`s: classes or "
                "objects."
            )
        for event, why in _NO_EVENT.items():
            if getattr(type(one), event) is not getattr(TrainerCallback, event):
                raise ConfigError(
                    f"`callbacks`: {type(one).__name__} has an `{event}`, which would never be called: {why}."
                    " Use `on_step_end`, `on_log` or `on_evaluate`."
                )
    return made


class CallbackArgs:
    """A run's `RewardConfig`, and what callbacks read of transformers' arguments beside its fields."""

    def __init__(self, config: RewardConfig, rank: Rank) -> None:
        self._config = config
        self.world_size = rank.count
        self.process_index = self.local_process_index = rank.index
        self.should_save = self.should_log = rank.index == 0
        self.device = rank.device
        self.n_gpu = int(rank.device.type == "cuda")
        self.train_batch_size = config.per_device_train_batch_size
        self.eval_batch_size = config.per_device_eval_batch_size

    def to_dict(self) -> dict[str, Any]:
        """The settings; a token of the hub is masked, as with transformers."""
        fields = dataclasses.asdict(self._config)
        hidden = {
            key: f"<{key.upper()}>" for key, value in fields.items() if key.endswith("_token") and value
        }
        return fields | hidden

    def to_sanitized_dict(self) -> dict[str, Any]:
        """The settings, with what is no number, text or truth value as text."""
        plain = (bool, int, float, str, type(None))
        fields = self.to_dict()
        return {key: value if isinstance(value, plain) else str(value) for key, value in fields.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return getattr(self._config, name)
        except AttributeError:
            raise AttributeError(
                f"`args.{name}`: callbacks are given a `rayrm.RewardConfig`, which has no such setting."
            ) from None


def call_all(
    callbacks: Sequence[TrainerCallback], event: str, args: CallbackArgs, state: TrainerState, **given: Any
) -> None:
    """An event outside of training, where nothing is to be decided."""
    for one in callbacks:
        getattr(one, event)(args, state, TrainerControl(), **given)


class UserCallbacks:
    """The callbacks of a run, on rank 0; on every other rank what rank 0 says that they decided."""

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        config: RewardConfig,
        schedule: Schedule,
        rank: Rank,
        hosts: Hosts,
        output_dir: Path,
    ) -> None:
        self._callbacks = list(callbacks)
        self._output_dir = output_dir
        self._calls = rank.index == 0
        self._several = rank.count > 1
        self._hosts = hosts
        self._config, self._schedule = config, schedule
        self._args = CallbackArgs(config, rank)
        self._control = TrainerControl()
        self._failure: Exception | None = None
        self._handler: CallbackHandler | None = None
        self._due = Due()
        self.stopped = False
        self.state = TrainerState(
            is_world_process_zero=rank.index == 0, is_local_process_zero=rank.index == 0
        )

    def begin(
        self,
        state: TrainState,
        records: Sequence[Record],
        model: torch.nn.Module,
        tokenizer: Any,
        engine: Engine,
    ) -> None:
        """Training begins, or goes on after the step where `state` stands."""
        if self._calls:
            self._handler = CallbackHandler(
                [DefaultFlowCallback, *self._callbacks], model, tokenizer, engine.optimizer, engine.scheduler
            )
            self._handler.remove_callback(DefaultFlowCallback)  # missed where absent; the schedule is ours
            self._restore(state.callbacks)
            self.state = trainer_state(state, records, self._config, self._schedule, self._output_dir)
            if _overrides(self._callbacks, "on_pre_optimizer_step"):
                engine.optimizer.register_step_pre_hook(lambda *_: self._call("on_pre_optimizer_step"))
            if _overrides(self._callbacks, "on_optimizer_step"):
                engine.optimizer.register_step_post_hook(lambda *_: self._call("on_optimizer_step"))
        self._call("on_train_begin")
        self._tell()

    def step_begins(self, state: TrainState, begins_epoch: bool) -> None:
        self._stand(state)
        if begins_epoch:
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def due(self, state: TrainState, ends_epoch: bool) -> Iterator[Due]:
        """What is to be done after a step: as the schedule says, unless a callback says otherwise."""
        self._stand(state)
        yield self._decided("on_step_end", self._schedule.due(state.step, at_epoch=False))
        if ends_epoch or self.stopped:
            yield self._decided("on_epoch_end", self._schedule.due(state.step, at_epoch=True))

    def logged(self, record: Record) -> None:
        if self._calls:
            self.state.log_history.append(dict(record))
            self._call("on_log", logs={key: value for key, value in record.items() if key != "step"})
        self._tell()

    def evaluated(self, metrics: Record) -> None:
        """One set was; a callback may ask that this step is saved."""
        self._call("on_evaluate", metrics={key: value for key, value in metrics.items() if key != "step"})
        flags = self._tell()
        self._due.save = bool(flags & _SAVE)

    @property
    def reads_checkpoints(self) -> bool:
        """Whether a callback is told of each checkpoint, which is then on disk."""
        return _overrides(self._callbacks, "on_save")

    def saved(self, state: TrainState) -> None:
        self._stand(state)
        self._call("on_save")
        self._tell()

    def stops(self) -> bool:
        self._tell()
        return self.stopped

    def ended(self, state: TrainState) -> None:
        self._stand(state)
        self._call("on_train_end")
        self._tell()

    def exported(self) -> dict[str, Any]:
        """What those that keep a state have in it, by class; travels with checkpoints."""
        return {
            type(one).__name__: one.state()["attributes"]
            for one in self._callbacks
            if self._calls and isinstance(one, ExportableState)
        }

    def _restore(self, kept: Mapping[str, Any]) -> None:
        for one in self._callbacks:
            for name, value in kept.get(type(one).__name__, {}).items():
                setattr(one, name, value)

    def _stand(self, state: TrainState) -> None:
        stand(self.state, state, self._output_dir)

    def _decided(self, event: str, due: Due) -> Due:
        control = self._control
        control.should_log, control.should_evaluate, control.should_save = due.log, due.evaluate, due.save
        self._call(event)
        flags = self._tell()
        self._due = Due(bool(flags & _LOG), bool(flags & _EVALUATE), bool(flags & _SAVE))
        return self._due

    def _call(self, event: str, **kwargs: Any) -> None:
        if self._handler is None or self._failure is not None:
            return
        try:
            call = getattr(self._handler, event)
            self._control = call(self._args, self.state, self._control, **kwargs)
        except Exception as error:
            if not self._several:
                raise
            self._failure = error  # told to the other ranks where they listen next

    def _tell(self) -> int:
        """What stands now, on every rank."""
        control = self._control
        flags = sum(
            bit
            for bit, is_set in (
                (_LOG, control.should_log),
                (_EVALUATE, control.should_evaluate),
                (_SAVE, control.should_save),
                (_STOP, control.should_training_stop),
                (_FAILED, self._failure is not None),
            )
            if is_set
        )
        flags = self._hosts.from_first(flags)
        if flags & _FAILED:
            failure = self._failure
            told = self._hosts.joined([] if failure is None else [f"{type(failure).__name__}: {failure}"])
            raise failure or RayrmError(f"a callback failed on rank 0: {told[0]}")
        if self._calls and control.should_epoch_stop:
            raise ConfigError(
                "a callback asks for the end of the epoch (`should_epoch_stop`), and epochs are whole here. "
                "Set `should_training_stop` instead."
            )
        self.stopped = self.stopped or bool(flags & _STOP)
        return flags


def _overrides(callbacks: Iterable[TrainerCallback], event: str) -> bool:
    return any(getattr(type(one), event) is not getattr(TrainerCallback, event) for one in callbacks)
