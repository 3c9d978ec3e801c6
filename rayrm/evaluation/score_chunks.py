"""The rows of a piece of a source in chunks: what is scored at once, and remembered at once.

Consecutive rows of one prompt stay in one chunk, so that the prompt is computed once. Invariants, each a
test: the chunks of a piece are its rows in order; they depend on the rows alone, so that who reads the piece
again finds the same chunks; a chunk takes no new row after 256 completions, but to keep a prompt whole, and
none at all after 1024. Pure: no ray, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrm.data.pieces import SourceRow

TEXTS_PER_CHUNK = 256
MOST_TEXTS_PER_CHUNK = 1024
_ONE_PROMPT = ("prompt", "tools", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows: number `number` (from 0) of those of piece `piece` of a plan; `is_last`: of these."""

    piece: int
    number: int
    rows: Sequence[SourceRow]
    is_last: bool


def chunks_of(piece: int, rows: Iterable[SourceRow]) -> Iterator[Chunk]:
    """The rows of a piece in chunks, in order; none for a piece without rows."""
    held: list[SourceRow] = []
    number = num_texts = 0
    for row in rows:
        if num_texts >= TEXTS_PER_CHUNK and (
            num_texts >= MOST_TEXTS_PER_CHUNK or not same_prompt(held[-1].content, row.content)
        ):
            yield Chunk(piece, number, held, is_last=False)
            held, num_texts, number = [], 0, number + 1
        held.append(row)
        num_texts += _num_texts(row.content)
    if held:
        yield Chunk(piece, number, held, is_last=True)


def same_prompt(row: Any, other: Any) -> bool:
    """Whether two rows ask the same: prompt, tools and template settings. Rows without a prompt never do."""
    return (
        isinstance(row, Mapping)
        and isinstance(other, Mapping)
        and row.get("prompt") is not None
        and all(row.get(name) == other.get(name) for name in _ONE_PROMPT)
    )


def _num_texts(row: Any) -> int:
    completions = row.get("completions") if isinstance(row, Mapping) else None
    return max(1, len(completions)) if isinstance(completions, list) else 1
