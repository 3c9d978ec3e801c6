"""What `RewardTrainer` offers scripts around training: the hub, callbacks, metrics on screen and disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import log_metrics, save_metrics, save_state

from rayrm.config import RewardConfig
from rayrm.model.saving import FACTS
from rayrm.train.callbacks import check_callbacks
from rayrm.train.hub import HubRepository
from rayrm.train.script_words import MainProcess, check_subclass, is_unread, missing
from rayrm.train.workers import check_pickles


class ScriptCalls:
    """Methods of the trainer, which has the attributes named here."""

    args: RewardConfig
    state: TrainerState
    output_dir: Path
    num_workers: int
    accelerator = MainProcess()
    _callbacks: list[TrainerCallback]
    _hub: HubRepository
    _own: frozenset[str] = frozenset()
    """What this trainer has written into `output_dir` before a run of it began: no file of someone else."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The trainer is made of this class; what is made of the trainer is a user's.
        check_subclass(cls, next(kind for kind in reversed(cls.__mro__) if ScriptCalls in kind.__bases__))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        raise NotImplementedError

    def _call(self, event: str, **given: Any) -> None:
        raise NotImplementedError

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Upload the model to the hub: the commit, or without `blocking` a future of it.

        `card`: `dataset_name`, `tags`, `language`, `license` or `model_name` for the card's metadata.
        """
        self._call("on_push_begin")
        if not (self.output_dir / FACTS).exists():
            self.save_model(_internal_call=True)
        how: dict[str, Any] = {"token": token, "revision": revision, "private": private, "card": card}
        return self._hub.push(self.output_dir, commit_message, blocking=blocking, **how)

    @property
    def hub_model_id(self) -> str | None:
        """The repository on the hub; None before it is known there."""
        return self._hub.name

    def end(self) -> None:
        """At the end of a TRL script: nothing is left to close."""

    def is_world_process_zero(self) -> bool:
        """This process drives the run."""
        return True

    is_local_process_zero = is_world_process_zero
    log_metrics = log_metrics

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write `<split>_results.json` into `output_dir`, and `all_results.json` with those of all splits."""
        with self._writing(self.output_dir):
            save_metrics(self, split, metrics, combined)

    def save_state(self) -> None:
        """Write `state` into `output_dir`: trainer_state.json."""
        with self._writing(self.output_dir):
            save_state(self)

    @contextmanager
    def _writing(self, directory: Path) -> Iterator[None]:
        """Make the directory, and note what is new there, in case that a run begins in it afterwards."""
        directory.mkdir(parents=True, exist_ok=True)
        before = {path.name for path in directory.iterdir()}
        yield
        if directory.resolve() == self.output_dir.resolve():
            self._own |= {path.name for path in directory.iterdir()} - before

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """One more, for what follows."""
        added = check_callbacks([callback])
        if self.num_workers:
            check_pickles({"callback": added[0]})
        self._callbacks += added

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """Remove a callback, or the first of a class, and return it; None where there is none."""
        for one in self._callbacks:
            if one is callback or (isinstance(callback, type) and isinstance(one, callback)):
                self._callbacks.remove(one)
                return one
        return None

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Remove a callback, or the first of a class."""
        self.pop_callback(callback)

    if not TYPE_CHECKING:  # hidden from mypy, which would take every misspelt attribute for one

        def __setattr__(self, name: str, value: Any) -> None:
            if is_unread(type(self), name):
                raise AttributeError(f"nothing would read `{name}`: {missing(name)}")
            super().__setattr__(name, value)

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(missing(name))
