"""What TRL's scripts ask of a trainer beside training: its rows, and the process that drives the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features
from transformers import Trainer

from rayrm.config import RewardConfig
from rayrm.data.labels import UNRANKED
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError

_LOOP = "use a callback (`callbacks`), or `rayrm.train.loop` for a loop of your own"
_OPTIMIZER = "pass `optimizers` or `optimizer_cls_and_kwargs`"
_SCHEDULE = "set `lr_scheduler_type`, or pass `optimizers`"
_ROWS = "rows are read by Ray Data and packed by the ranks; change the data before, or set `shuffle`"
_SCORES = "evaluation scores packed rows; use `compute_metrics`, `preprocess_logits_for_metrics` or `predict`"
_RECORDS = "metrics are in `state.log_history` and in metrics.jsonl of `output_dir`; callbacks have `on_log`"
_TO_CALLBACKS = "callbacks are given it (`on_train_begin` and later)"
_TO_CONSTRUCTOR = "it is an argument of the constructor"
_INSTEAD = {
    "compute_loss": "the loss is Bradley-Terry's on packed rows (`rayrm.model.loss`); RewardConfig has its "
    "objectives (`center_rewards_coefficient`, `label_smoothing`, `tie_model`, `ranking_loss`, "
    "`pointwise_loss`)",
    "training_step": f"a step is `rayrm.train.step.train_step`; {_LOOP}",
    "prediction_step": _SCORES,
    "evaluation_loop": _SCORES,
    "get_train_dataloader": f"the rows are `train_dataset`; {_ROWS}",
    "get_eval_dataloader": f"the rows are `eval_dataset`; {_ROWS}",
    "get_test_dataloader": _ROWS,
    "_get_train_sampler": _ROWS,
    "_prepare_dataset": _ROWS,
    "data_collator": _TO_CONSTRUCTOR,
    "compute_metrics": _TO_CONSTRUCTOR,
    "preprocess_logits_for_metrics": _TO_CONSTRUCTOR,
    "hyperparameter_search": "type `rayrm sweep`, or use Ray Tune",
    "create_optimizer": _OPTIMIZER,
    "create_optimizer_and_scheduler": _OPTIMIZER,
    "get_decay_parameter_names": _OPTIMIZER,
    "get_optimizer_cls_and_kwargs": _OPTIMIZER,
    "create_scheduler": _SCHEDULE,
    "create_model_card": "every saved model has its README.md",
    "_tag_names": "`push_to_hub` takes `tags`",
    "callback_handler": "use `add_callback`, `pop_callback` and `remove_callback`",
    "control": "callbacks are given it at every event",
    "optimizer": _TO_CALLBACKS,
    "lr_scheduler": _TO_CALLBACKS,
    "is_in_train": "callbacks are told of `on_train_begin` and `on_train_end`",
    "log": _RECORDS,
    "tokenizer": "it is `processing_class`",
    "_save_checkpoint": "ranks write checkpoints beside the steps; a callback's `on_save` is told of each",
    "_maybe_log_save_evaluate": _LOOP,
    "_inner_training_loop": _LOOP,
}
_THEIRS = frozenset(dir(Trainer)) | frozenset(_INSTEAD)
"""What transformers' trainer, and TRL's, has; what of it ours has not, nothing here reads or calls."""


def missing(name: str) -> str:
    """What stands here in place of an attribute that transformers' trainer has."""
    instead = _INSTEAD.get(name)
    return f"RewardTrainer has no `{name}`" + (f": {instead}." if instead else ".")


def is_unread(kind: type, name: str) -> bool:
    """Whether transformers' trainer reads or calls `name`, and that of class `kind` does not."""
    return name in _THEIRS and not hasattr(kind, name)


def check_subclass(kind: type, ours: type) -> None:
    """Raise ConfigError where a class made of our trainer overrides what only transformers' calls."""
    for base in kind.__mro__:
        for name in [] if base in ours.__mro__ else vars(base):
            if is_unread(ours, name):
                raise ConfigError(
                    f"class {kind.__name__}: its `{name}` would never be called. {missing(name)} Leave the "
                    "override out."
                )


def check_overrides(kind: type, ours: type, config: RewardConfig) -> None:
    """Raise ConfigError for overrides that transformers' trainer calls while it trains, where ours would."""
    while_training = {
        "evaluate": (
            config.eval_strategy != "no" or config.eval_on_start,
            "the ranks evaluate by themselves: use `compute_metrics` or a callback's `on_evaluate`, or set "
            '`eval_strategy="no"` and call it yourself',
        ),
        "save_model": (
            config.save_strategy != "no",
            "the ranks write checkpoints by themselves: use a callback's `on_save`, or set "
            '`save_strategy="no"` and call it yourself',
        ),
    }
    for name, (happens, instead) in while_training.items():
        if happens and getattr(kind, name) is not getattr(ours, name):
            raise ConfigError(f"{kind.__name__}.{name} would not be called during training, where {instead}.")


class MainProcess:
    """`trainer.accelerator` as scripts use it: this process is the only one, wherever the ranks are."""

    is_main_process = is_local_main_process = True
    num_processes = 1
    process_index = local_process_index = 0

    def print(self, *words: Any, **how: Any) -> None:
        """Print, once."""
        print(*words, **how)

    def wait_for_everyone(self) -> None:
        """Nobody is waited for: `train` returns when all ranks have ended."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"`trainer.accelerator.{name}`: rayrm trains without accelerate; of an accelerator there are "
            "`print`, `wait_for_everyone` and which process this is."
        )


class Rows(Sequence[dict[str, Any]]):
    """`trainer.train_dataset` and `eval_dataset`: rows as TRL's trainer tokenizes them, read when asked for.

    A pair has `chosen_ids` and `rejected_ids`, a ranking `completion_ids` and `ranks`, a scored row
    `completion_ids` and `scores`; where any row says them there are `margin`, `target` and `attributes`.
    They are indexed as a `datasets.Dataset`: a number gives a row, a column's name its values, a slice or
    several numbers the columns of those rows; what a row has not is None there.
    """

    def __init__(self, of: TokenizedSet) -> None:
        self.of = of

    @cached_property
    def column_names(self) -> list[str]:
        """Of all rows."""
        index = self.of.index
        first, second = index.first[:-1], index.first[1:] - 1
        is_pair = (index.num_completions == 2) & (index.ranks[first] == 0) & (index.ranks[second] == 1)
        is_rated = np.zeros(len(first), bool)
        is_rated[index.row_of[~np.isnan(index.ratings)]] = True
        is_ranked = ~is_pair & ~is_rated & (index.ranks[first] != UNRANKED)
        columns = {
            "chosen_ids": is_pair.any(),
            "rejected_ids": is_pair.any(),
            "completion_ids": not is_pair.all(),
            "scores": (is_rated & ~is_pair).any(),
            "ranks": is_ranked.any(),
            "attributes": index.attributes.shape[1] > 0,
            "margin": index.margins.any(),
            "target": (index.targets != 1).any(),
        }
        return [name for name, is_there in columns.items() if is_there]

    @property
    def features(self) -> Features:
        """The columns' types, as `datasets` tells them from the first row."""
        return Dataset.from_list([self[0]]).features

    @property
    def num_rows(self) -> int:
        return len(self)

    @property
    def num_columns(self) -> int:
        return len(self.column_names)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_columns

    def __len__(self) -> int:
        return self.of.num_rows

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, str):
            if place not in self.column_names:
                raise KeyError(
                    f"there is no column `{place}` among the tokenized rows, which have "
                    f"{', '.join(self.column_names)}. Texts are in the dataset that the trainer was given."
                )
            return [row[place] for row in self]
        if isinstance(place, slice):
            place = range(*place.indices(len(self)))
        if isinstance(place, Iterable):
            rows = [self._row(int(one)) for one in place]
            return {name: [row[name] for row in rows] for name in self.column_names}
        return self._row(int(place))

    def _row(self, place: int) -> dict[str, Any]:
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        (row,) = self.of.fetch([place % len(self)])
        texts = [ids.tolist() for ids in row.sequences]
        found: dict[str, Any] = {} if row.ratings else {"margin": row.margin, "target": row.target}
        if row.ranks == (0, 1):
            found |= dict(zip(("chosen_ids", "rejected_ids"), texts, strict=True))
        else:
            found["completion_ids"] = texts
            if row.ratings:
                found["scores"] = list(row.ratings)
            elif UNRANKED not in row.ranks:
                found["ranks"] = list(row.ranks)
        if row.attributes:
            width = len(row.attributes) // len(texts)
            found["attributes"] = [row.attributes[n * width : (n + 1) * width] for n in range(len(texts))]
        return {name: found.get(name) for name in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._row(place) for place in range(len(self)))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            raise AttributeError(
                f"the trainer's rows have no `{name}`: they are a view of what it tokenized. "
                "`datasets.Dataset.from_list(list(rows))` makes a dataset of them."
            )
