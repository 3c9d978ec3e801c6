"""What TRL's scripts ask of a trainer beside training: its rows, and the process that drives the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayrm.data.tokenized_set import TokenizedSet


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

    A pair has `chosen_ids` and `rejected_ids`, a ranking `completion_ids` and `ranks`; either a `margin`.
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
        else:
            found = {"completion_ids": texts, "ranks": list(row.ranks)}
        return {**found, "margin": row.margin} if row.margin else found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))
