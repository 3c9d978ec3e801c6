"""Which texts make the next batch: pure planning over token ids, apart from torch, Ray and threads.

A `ScoreQueue` holds the texts of many requests. Whenever the model is free, `take()` gives the next batch and
`answer()` turns its scores into finished requests. Strategy of `take`:

1. start with the oldest waiting text;
2. pull forward, of whatever request, the texts that begin like it: with at least a quarter of its tokens;
3. go on with the oldest text still waiting and those that begin like it, until they would exceed the budget.
   A group that fits a batch of its own is then left for the next one, any other is cut.

A batch is full at `max_tokens`, or at 1024 texts: in the last layer each text's score meets every token of
the batch, and for thousands of texts of a few tokens that mask would outgrow all else.

What texts begin with is read off their ids, so groups need no name: completions of one prompt, the turns of
one dialogue and the texts under one long system prompt are found alike.

Invariants, each a test:

1. Every text is taken exactly once, or never when its request was dropped first.
2. The oldest waiting text is in the next batch, so that nothing starves.
3. A batch has at most 1024 texts, and costs at most `max_tokens`, unless one text alone costs more: it then
   travels alone.
4. A text overtakes older ones only to join a text that has a quarter of its tokens in common with it; without
   sharing none does.
5. Texts that begin alike and fit one batch are in one batch, if they wait when the first of them is taken.
6. A request is answered once, with its scores in its own order, when its last text is done.

The cost of a batch is the number of tokens the model computes: shared beginnings once (`shared`), every text
in full (`packed`), or every text as long as the longest (`padded`). Texts longer than `reach` are padded
whatever the layout, apart from the others. Planning costs about 0.1 ms a text.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayrm.data.packing import Ids, common_prefix_length

Layout = Literal["shared", "packed", "padded"]

_WORTHWHILE = 4
"""A text is pulled forward to one that has at least a quarter of its own tokens in common with it."""

MOST_TEXTS = 1024
"""Of a batch."""


@dataclass(frozen=True, slots=True, eq=False)
class QueuedText:
    """Text number `index` of request `request`."""

    request: int
    index: int
    ids: Ids


@dataclass(slots=True)
class _Request:
    scores: list[float]
    num_missing: int
    tickets: list[int] = field(default_factory=list)


class BatchCost:
    """How many tokens the model computes for the texts added so far."""

    def __init__(self, layout: Layout, reach: int | None = None) -> None:
        self.layout = layout
        self.reach = reach
        self.tokens = 0
        self._num_texts = 0
        self._num_padded = 0
        self._longest = 0
        # Sorted by token: a text's longest match in the batch is then one of its two neighbours, and the
        # number of distinct prefixes grows by what goes beyond that match.
        self._sorted: list[tuple[bytes, Ids]] = []

    def with_text(self, ids: Ids) -> int:
        """The cost if `ids` were added as well."""
        if self._pads(ids):
            before = self._num_padded * self._longest
            return self.tokens - before + (self._num_padded + 1) * max(self._longest, len(ids))
        if self.layout == "packed":
            return self.tokens + len(ids)
        place = bisect_left(self._sorted, _token_order(ids), key=_first)
        neighbours = self._sorted[max(place - 1, 0) : place + 1]
        known = max((common_prefix_length([ids, other]) for _, other in neighbours), default=0)
        return self.tokens + len(ids) - known

    def add(self, ids: Ids) -> None:
        self.tokens = self.with_text(ids)
        self._num_texts += 1
        if self._pads(ids):
            self._num_padded += 1
            self._longest = max(self._longest, len(ids))
        elif self.layout == "shared":
            insort(self._sorted, (_token_order(ids), ids), key=_first)

    def fill(self, texts: Sequence[QueuedText], max_tokens: int) -> int:
        """Add texts from the first on while the batch is not full; how many were added."""
        for number, text in enumerate(texts):
            if self._num_texts == MOST_TEXTS or self.with_text(text.ids) > max_tokens:
                return number
            self.add(text.ids)
        return len(texts)

    def copy(self) -> BatchCost:
        twin = BatchCost(self.layout, self.reach)
        twin.tokens, twin._num_texts = self.tokens, self._num_texts
        twin._num_padded, twin._longest = self._num_padded, self._longest
        twin._sorted = list(self._sorted)
        return twin

    def _pads(self, ids: Ids) -> bool:
        return self.layout == "padded" or (self.reach is not None and len(ids) > self.reach)


class ScoreQueue:
    """The state of a scorer: what waits, in order of arrival, and which answers are still incomplete."""

    def __init__(self, max_tokens: int, layout: Layout = "shared", reach: int | None = None) -> None:
        self.max_tokens = max_tokens
        self.layout: Layout = layout
        self.reach = reach
        self._waiting: dict[int, QueuedText] = {}
        # (token order, ticket) of what waits, sorted: texts that begin alike are neighbours.
        self._alike: list[tuple[bytes, int]] = []
        self._requests: dict[int, _Request] = {}
        self._next_ticket = 0

    def __len__(self) -> int:
        """How many texts wait."""
        return len(self._waiting)

    @property
    def num_requests(self) -> int:
        """How many requests are not answered yet."""
        return len(self._requests)

    def add(self, request: int, sequences: Sequence[Ids]) -> None:
        """Queue a request's texts (at least one)."""
        assert request not in self._requests
        assert sequences
        entry = _Request(scores=[0.0] * len(sequences), num_missing=len(sequences))
        for index, ids in enumerate(sequences):
            ticket = self._next_ticket
            self._next_ticket += 1
            self._waiting[ticket] = QueuedText(request, index, ids)
            if self.layout == "shared":
                insort(self._alike, (_token_order(ids), ticket))
            entry.tickets.append(ticket)
        self._requests[request] = entry

    def drop(self, request: int) -> None:
        """Forget a request: its waiting texts are not computed. Unknown and answered requests are ignored."""
        entry = self._requests.pop(request, None)
        for ticket in entry.tickets if entry else ():
            if ticket in self._waiting:
                self._remove(ticket)

    def take(self) -> list[QueuedText]:
        """The next batch, removed from the queue; empty when nothing waits."""
        cost = BatchCost(self.layout, self.reach)
        taken: list[QueuedText] = []
        while self._waiting:
            tickets = self._group()
            group = [self._waiting[ticket] for ticket in tickets]
            with_group = cost.copy()
            fits = with_group.fill(group, self.max_tokens)
            if fits < len(group) and taken and self._fits(group):
                return taken
            # A text above the budget by itself, the first of its group, travels alone.
            alone = not taken and not fits
            for ticket in tickets[: fits + alone]:
                taken.append(self._remove(ticket))
            if alone or fits < len(group):
                return taken
            cost = with_group
        return taken

    def _fits(self, group: Sequence[QueuedText]) -> bool:
        return BatchCost(self.layout, self.reach).fill(group, self.max_tokens) == len(group)

    def answer(self, texts: Sequence[QueuedText], scores: Sequence[float]) -> list[tuple[int, list[float]]]:
        """Note a taken batch's scores; returns the requests complete now, each with all its scores."""
        complete: list[tuple[int, list[float]]] = []
        for text, score in zip(texts, scores, strict=True):
            entry = self._requests.get(text.request)
            if entry is None:
                continue
            entry.scores[text.index] = score
            entry.num_missing -= 1
            if entry.num_missing == 0:
                complete.append((text.request, entry.scores))
                del self._requests[text.request]
        return complete

    def _group(self) -> list[int]:
        """The oldest waiting text and those that begin like it, oldest first; no more than fill a batch.

        In token order what texts have in common with this one only shrinks with distance, and what a text
        adds to those up to it is what goes beyond its neighbour.
        """
        oldest = next(iter(self._waiting))
        if self.layout != "shared":
            return [oldest]
        ids = self._waiting[oldest].ids
        place = bisect_left(self._alike, (_token_order(ids), oldest))
        group = [oldest]
        for direction in (-1, 1):
            known, room = len(ids), self.max_tokens - len(ids)
            nearer, at = ids, place + direction
            while room >= 0 and 0 <= at < len(self._alike):
                ticket = self._alike[at][1]
                other = self._waiting[ticket].ids
                beyond = common_prefix_length([nearer, other])
                known = min(known, beyond)
                if _WORTHWHILE * known < len(ids):
                    break
                group.append(ticket)
                room -= len(other) - beyond
                nearer, at = other, at + direction
        return sorted(group)

    def _remove(self, ticket: int) -> QueuedText:
        text = self._waiting.pop(ticket)
        if self.layout == "shared":
            del self._alike[bisect_left(self._alike, (_token_order(text.ids), ticket))]
        return text


def _token_order(ids: Ids) -> bytes:
    """Bytes that sort as the ids do: big-endian, and ids are not negative."""
    return ids.astype(">i4").tobytes()


def _first(item: tuple[bytes, Ids]) -> bytes:
    return item[0]
