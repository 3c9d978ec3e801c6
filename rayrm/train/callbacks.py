"""transformers' callbacks around a run: rank 0 calls them, at the events of TRL's trainer, and in its order.

What they decide (log, evaluate, save, stop) all ranks follow: rank 0 tells them once after each call that may
have decided something, and so an error of a callback ends all ranks. There is no `on_substep_end` (a step has
as many micro-batches as memory asks for) and no `on_prediction_step`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError, RayrmError
from rayrm.runfile import without_secrets
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
        """The settings; a token of the hub is masked, as with transformers, and in no table."""
        fields = {
            key: without_secrets(value) if isinstance(value, dict) else value
            for key, value in dataclasses.asdict(self._config).items()
        }
        hidden = {
            key: f"<{key.upper()}>" for key, value in fields.items() if key.endswith("_token") and value
        }
        return fields | hidden

    def to_sanitized_dict(self) -> dict[str, Any]:
        """The settings, with what is no number, text or truth value as text."""
        plain = (bool, int, float, str, type(None))
        fields = self.to_dict()
        return {key: value if isinstance(value, plain) else str(value) for key, value in fields.items()}

    def to_json_string(self) -> str:
        """The settings as JSON text."""
        return json.dumps(self.to_dict(), indent=2, default=str)

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
    absent = dict.fromkeys(("optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"))
    for one in callbacks:
        getattr(one, event)(args, state, TrainerControl(), **absent, **given)


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
            engine.around_update = self._around_update
        self._call("on_train_begin")
        self._tell()

    @staticmethod
    def had_stopped(state: TrainState) -> bool:
        """Whether training had ended, by a callback or by itself, at the checkpoint of `state`."""
        kept = state.callbacks.get(TrainerControl.__name__, {})
        return bool(kept.get("args", {}).get("should_training_stop"))

    def step_begins(self, state: TrainState, begins_epoch: bool) -> None:
        self._stand(state)
        if begins_epoch:
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def due(self, state: TrainState, ends_epoch: bool) -> Iterator[Due]:
        """What is to be done after a step: as the schedule says, unless a callback says otherwise.

        What callbacks make of it while it is done changes the one that was given.
        """
        self._stand(state)
        if state.step == self._schedule.num_steps:
            self._control.should_training_stop = True  # which callbacks read
        yield self._decided("on_step_end", self._schedule.due(state.step, at_epoch=False))
        if ends_epoch or self.stopped:
            self._stand(state)
            yield self._decided("on_epoch_end", self._schedule.due(state.step, at_epoch=True))

    def logged(self, record: Record) -> None:
        if self._calls:
            self.state.log_history.append(dict(record))
            self._call("on_log", logs={key: value for key, value in record.items() if key != "step"})
        self._tell()

    def evaluated(self, metrics: Record) -> None:
        """One set was."""
        self._call("on_evaluate", metrics={key: value for key, value in metrics.items() if key != "step"})
        self._tell()

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
        """The states of those that keep one, and of the flags, as transformers keeps them in checkpoints."""
        if not self._calls:
            return {}
        keep = [one for one in (*self._callbacks, self._control) if isinstance(one, ExportableState)]
        kept = dict(TrainerState(stateful_callbacks=keep).stateful_callbacks)
        for name, states in kept.items():
            try:
                json.dumps(states)
            except TypeError as error:
                raise ConfigError(
                    f"`callbacks`: what {name}.state() gives cannot be kept in a checkpoint: {error}. Give "
                    "numbers, texts, and lists and dicts of them."
                ) from error
        return kept

    def _restore(self, kept: Mapping[str, Any]) -> None:
        """Give each callback what one of its class had; what it was made with is the run's own."""
        left = {name: list(states if isinstance(states, list) else [states]) for name, states in kept.items()}
        left.pop(TrainerControl.__name__, None)
        for one in self._callbacks:
            states = left.get(type(one).__name__)
            if states and isinstance(one, ExportableState):
                for name, value in states.pop(0).get("attributes", {}).items():
                    setattr(one, name, value)
        if missed := sorted(name for name, states in left.items() if states):
            logger.warning(
                "the checkpoint has the state of callbacks that are not here: %s", ", ".join(missed)
            )

    def _stand(self, state: TrainState) -> None:
        stand(self.state, state, self._output_dir)

    def _decided(self, event: str, due: Due) -> Due:
        """What the schedule asks for, and callbacks have asked for since the step began or do now."""
        control = self._control
        control.should_log = control.should_log or due.log
        control.should_evaluate = control.should_evaluate or due.evaluate
        control.should_save = control.should_save or due.save
        self._call(event)
        self._due = Due()
        self._tell()
        return self._due

    @contextlib.contextmanager
    def _around_update(self) -> Iterator[None]:
        self._call("on_pre_optimizer_step")
        yield
        self._call("on_optimizer_step")

    def _call(self, event: str, **kwargs: Any) -> None:
        if self._handler is None or self._failure is not None:
            return
        try:
            call = getattr(self._handler, event)
            self._control = call(self._args, self.state, self._control, **kwargs)
            if self._control.should_epoch_stop:
                raise ConfigError(
                    "a callback asks for the end of the epoch (`should_epoch_stop`), and epochs are whole "
                    "here. Set `should_training_stop` instead."
                )
        except Exception as error:
            if not self._several:
                raise
            self._failure = error  # told to the other ranks where they listen next

    def _tell(self) -> None:
        """Bring every rank to what callbacks have decided: what is due, and whether training stops."""
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
        due = self._due
        due.log, due.evaluate, due.save = bool(flags & _LOG), bool(flags & _EVALUATE), bool(flags & _SAVE)
        self.stopped = bool(flags & _STOP)


def _overrides(callbacks: Iterable[TrainerCallback], event: str) -> bool:
    return any(getattr(type(one), event) is not getattr(TrainerCallback, event) for one in callbacks)
