"""Consistency under harmless changes: whether a model's preferences outlast what says nothing of quality.

Each change makes a copy of a row, or none where there is nothing to change; only texts that became others are
scored again. Changes: `trailing_space`, `trailing_newline` after each completion; `prompt_echo`, completions
that begin by repeating the question; `style`, Markdown taken off or bullets put in (`style.py`) on all sides;
`style_chosen` and `style_rejected`, on one side only, so that style speaks for or against the better one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrm.data.messages import Message, Text
from rayrm.data.preference import PreferenceRow
from rayrm.data.row_index import Floats
from rayrm.data.tokenize import TextInput
from rayrm.evaluation.style import swap_style
from rayrm.metrics.intervals import wilson_interval
from rayrm.serve.score_file import ROWS_PER_CHUNK, Score

Change = Callable[[PreferenceRow], PreferenceRow | None]


@dataclass(frozen=True, slots=True)
class Consistency:
    """What one change does to R rows' preferences.

    `kept`: the share of comparisons in which the model prefers the same side as before, or neither as before,
    with the 95% Wilson interval of R rows; a row's n comparisons weigh 1/n each. `shift`, `shift_std`: mean
    and standard deviation of how far the changed texts' scores move, in standard deviations of all scores
    before; NaN where these do not vary. `num_rows`: R, those that the change is possible for.
    """

    change: str
    kept: float
    kept_low: float
    kept_high: float
    shift: float
    shift_std: float
    num_rows: int

    @property
    def metrics(self) -> dict[str, float]:
        """Flat, by names that begin with the change's; without what is NaN."""
        named = {
            "kept": self.kept,
            "kept_low": self.kept_low,
            "kept_high": self.kept_high,
            "shift": self.shift,
            "shift_std": self.shift_std,
            "num_rows": float(self.num_rows),
        }
        return {
            f"consistency_{self.change}_{name}": value for name, value in named.items() if not np.isnan(value)
        }


def measure_consistency(rows: Sequence[PreferenceRow], score: Score) -> list[Consistency]:
    """Every change that is possible for at least one of the rows, in the order of `CHANGES`.

    Args:
        rows: with texts of the model's form; those of token ids are left out.
        score: texts -> one score each, in order. It is called with at most `ROWS_PER_CHUNK` rows' texts.
    """
    rows = [row for row in rows if row.ids is None]
    base = score_texts([(row, range(len(row.completions))) for row in rows], score)
    found = []
    for name, change in CHANGES.items():
        changed = [(place, copy) for place, row in enumerate(rows) if (copy := change(row)) is not None]
        if not changed:
            continue
        altered = [(copy, altered_places(rows[place], copy)) for place, copy in changed]
        after = []
        for (place, _), (_, places), own in zip(changed, altered, score_texts(altered, score), strict=True):
            scores = base[place].copy()
            scores[places] = own
            after.append(scores)
        before = [base[place] for place, _ in changed]
        ranks = [copy.ranks for _, copy in changed]
        spread = float(np.concatenate(base).std())
        found.append(consistency_of(name, ranks, before, after, [places for _, places in altered], spread))
    return found


def consistency_of(
    change: str,
    ranks: Sequence[Sequence[int]],
    before: Sequence[npt.ArrayLike],
    after: Sequence[npt.ArrayLike],
    altered: Sequence[Sequence[int]],
    spread: float,
) -> Consistency:
    """What a change did to R rows.

    Args:
        ranks: of each row's completions; two of different rank are a comparison.
        before, after: scores of each row's completions, R arrays `[K]`.
        altered: the places of the completions whose text the change made another.
        spread: the standard deviation of scores before, of whatever set they belong to.

    Raises:
        ValueError: no row, or none with a comparison.
    """
    shares = [
        share
        for own, old, new in zip(ranks, before, after, strict=True)
        if (share := kept_share(own, old, new)) is not None
    ]
    if not shares:
        raise ValueError(f"the change {change!r} has no comparison to keep: give rows of different ranks.")
    low, high = wilson_interval(min(sum(shares), len(shares)), len(shares))
    moved = np.concatenate(
        [
            (np.asarray(new, np.float64) - np.asarray(old, np.float64))[np.asarray(places, np.int64)]
            for old, new, places in zip(before, after, altered, strict=True)
        ]
    )
    in_units = moved / spread if spread else np.full_like(moved, np.nan)
    shift, shift_std = float(in_units.mean()), float(in_units.std())
    return Consistency(change, float(np.mean(shares)), low, high, shift, shift_std, len(shares))


def kept_share(ranks: Sequence[int], before: npt.ArrayLike, after: npt.ArrayLike) -> float | None:
    """The share of a row's comparisons whose margin has the sign that it had; None where it has none."""
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    kept = [
        bool(np.sign(old[i] - old[j]) == np.sign(new[i] - new[j]))
        for i, j in itertools.combinations(range(len(ranks)), 2)
        if ranks[i] != ranks[j]
    ]
    return float(np.mean(kept)) if kept else None


def altered_places(row: PreferenceRow, copy: PreferenceRow) -> list[int]:
    """The places of the completions that differ."""
    both = zip(row.completions, copy.completions, strict=True)
    return [place for place, (old, new) in enumerate(both) if old != new]


def score_texts(wanted: Sequence[tuple[PreferenceRow, Sequence[int]]], score: Score) -> list[Floats]:
    """The scores of the completions of each row that stand at these places, one array a row."""
    scores: list[Floats] = []
    reader = iter(wanted)
    while chunk := list(itertools.islice(reader, ROWS_PER_CHUNK)):
        inputs = [
            TextInput(row.prompt, row.completions[place], row.tools, row.chat_template_kwargs)
            for row, places in chunk
            for place in places
        ]
        flat = iter(score(inputs))
        scores.extend(
            np.fromiter(itertools.islice(flat, len(places)), np.float64, len(places)) for _, places in chunk
        )
    return scores


def trailing(ending: str) -> Change:
    """Every completion, with `ending` after it."""
    return lambda row: _edited(row, lambda text: text + ending)


def prompt_echo(row: PreferenceRow) -> PreferenceRow | None:
    """Every completion, after the question and an empty line; None where no question is told apart."""
    question = question_of(row)
    return None if not question else _edited(row, lambda text: f"{question}\n\n{text.lstrip()}")


def style(row: PreferenceRow, side: str = "both") -> PreferenceRow | None:
    """The row in another style; `side`: "both", "chosen" (its best completions), "rejected" (the others)."""
    best = min(row.ranks)
    places = {
        place
        for place, rank in enumerate(row.ranks)
        if side == "both" or (rank == best) == (side == "chosen")
    }
    return _edited(row, swap_style, places)


CHANGES: dict[str, Change] = {
    "trailing_space": trailing(" "),
    "trailing_newline": trailing("\n"),
    "prompt_echo": prompt_echo,
    "style": style,
    "style_chosen": lambda row: style(row, "chosen"),
    "style_rejected": lambda row: style(row, "rejected"),
}


def question_of(row: PreferenceRow) -> str:
    """What was asked last: the prompt, or its last user's message; "" where a string holds both sides."""
    if row.prompt is None and isinstance(row.completions[0], str):
        return ""
    dialogue = row.completions[0][:-1] if row.prompt is None else row.prompt
    if isinstance(dialogue, str):
        return dialogue.strip()
    assert not isinstance(dialogue, str)
    asked = [message for message in dialogue if isinstance(message, dict) and message["role"] == "user"]
    return _said(asked[-1]).strip() if asked else ""


def _edited(
    row: PreferenceRow, edit: Callable[[str], str | None], places: set[int] | None = None
) -> PreferenceRow | None:
    """The row with what is judged of its completions edited; None where that changes nothing."""
    completions = tuple(
        _with_last(text, edit) if places is None or place in places else text
        for place, text in enumerate(row.completions)
    )
    return None if completions == row.completions else replace(row, completions=completions)


def _with_last(text: Text, edit: Callable[[str], str | None]) -> Text:
    """A completion whose text, or whose last message's, is edited; itself where `edit` gives None."""
    if isinstance(text, str):
        changed = edit(text)
        return text if changed is None else changed
    said = _said(text[-1])
    changed = edit(said) if said else None
    if changed is None:
        return text
    content: Any = changed
    if not isinstance(text[-1]["content"], str):
        content = [{"type": "text", "text": changed}]
    return [*text[:-1], {**text[-1], "content": content}]


def _said(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
