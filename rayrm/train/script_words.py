"""What TRL's scripts ask of a trainer beside training: its rows, and the process that drives the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayrm.data.labels import UNRANKED
from rayrm.data.tokenized_set import TokenizedSet

_INSTEAD = {
    "compute_loss": "the loss is Bradley-Terry's on packed rows (`rayrm.model.loss`)",
    "training_step": "a step is `rayrm.train.step.train_step`",
    "get_train_dataloader": "the rows are `train_dataset`; Ray Data reads them, and ranks pack them",
    "get_eval_dataloader": "the rows are `eval_dataset`",
    "hyperparameter_search": "type `rayrm sweep`, or use Ray Tune",
    "create_optimizer": "pass `optimizers` or `optimizer_cls_and_kwargs`",
    "create_scheduler": "set `lr_scheduler_type`, or pass `optimizers`",
    "create_model_card": "every saved model has its README.md",
    "callback_handler": "use `add_callback`, `pop_callback` and `remove_callback`",
    "optimizer": "callbacks are given it (`on_train_begin` and later)",
    "lr_scheduler": "callbacks are given it (`on_train_begin` and later)",
    "is_in_train": "callbacks are told of `on_train_begin` and `on_train_end`",
    "log": "metrics are in `state.log_history` and in metrics.jsonl of `output_dir`",
}


def missing(name: str) -> str:
    """What stands here in place of an attribute that transformers' trainer has."""
    instead = _INSTEAD.get(name)
    return f"RewardTrainer has no `{name}`" + (f": {instead}." if instead else ".")


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


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Sequence[dict[str, Any]]):
    """`trainer.train_dataset` and `eval_dataset`: rows as TRL's trainer tokenizes them, read when asked for.

    A pair has `chosen_ids` and `rejected_ids`, a ranking `completion_ids` and `ranks`, either a `margin` and
    a `target` where they say one; a scored row `completion_ids` and `scores`. What is rated by attribute
    has `attributes`, a list for each completion.
    """

    of: TokenizedSet

    @property
    def column_names(self) -> list[str]:
        """Of the first row."""
        return list(self[0]) if len(self) else []

    def __len__(self) -> int:
        return self.of.num_rows

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        (row,) = self.of.fetch([place % len(self)])
        texts = [ids.tolist() for ids in row.sequences]
        if row.ranks == (0, 1):
            found: dict[str, Any] = dict(zip(("chosen_ids", "rejected_ids"), texts, strict=True))
        elif row.ratings:
            found = {"completion_ids": texts, "scores": list(row.ratings)}
        elif UNRANKED in row.ranks:
            found = {"completion_ids": texts}
        else:
            found = {"completion_ids": texts, "ranks": list(row.ranks)}
        if row.attributes:
            width = len(row.attributes) // len(texts)
            found["attributes"] = [row.attributes[n * width : (n + 1) * width] for n in range(len(texts))]
        found |= {"margin": row.margin} if row.margin else {}
        return found | ({"target": row.target} if row.target != 1 else {})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))
