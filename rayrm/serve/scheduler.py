"""Which texts make the next batch: pure planning over token ids, apart from torch, Ray and threads.

A `ScoreQueue` holds the texts of many requests. Whenever the model is free, `take()` gives the next batch and
`answer()` turns its scores into finished requests. Strategy of `take`:

1. start with the oldest waiting text;
2. pull forward the waiting texts that have its prompt, of whatever request, oldest first;
3. go on with the oldest text still waiting, until the next one would exceed the token budget.

Invariants, each a test:

1. Every text is taken exactly once, or never when its request was dropped first.
2. The oldest waiting text is in the next batch, so that nothing starves.
3. A batch costs at most `max_tokens`, unless one text alone costs more: it then travels alone.
4. Within a batch, texts of one prompt stand together; a text overtakes older ones only to join its prompt.
5. A request is answered once, with its scores in its own order, when its last text is done.

The cost of a batch is the number of tokens the model computes: shared beginnings once (`shared`), every text
in full (`packed`), or every text as long as the longest (`padded`). Planning costs about 10 us a text.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayrm.data.packing import Ids, common_prefix_length

Layout = Literal["shared", "packed", "padded"]


@dataclass(frozen=True, slots=True, eq=False)
class QueuedText:
    """Text number `index` of request `request`; texts with equal `prompt` are computed together."""

    request: int
    index: int
    ids: Ids
    prompt: Hashable


@dataclass(slots=True)
class _Request:
    scores: list[float]
    num_missing: int
    tickets: list[int] = field(default_factory=list)


class BatchCost:
    """How many tokens the model computes for the texts added so far."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.tokens = 0
        self._num_texts = 0
        self._longest = 0
        # Sorted by token: a text's longest match in the batch is then one of its two neighbours, and the
        # number of distinct prefixes grows by what goes beyond that match.
        self._sorted: list[tuple[bytes, Ids]] = []

    def with_text(self, ids: Ids) -> int:
        """The cost if `ids` were added as well."""
        if self.layout == "padded":
            return (self._num_texts + 1) * max(self._longest, len(ids))
        if self.layout == "packed":
            return self.tokens + len(ids)
        place = bisect_left(self._sorted, _token_order(ids), key=_first)
        neighbours = self._sorted[max(place - 1, 0) : place + 1]
        known = max((common_prefix_length([ids, other]) for _, other in neighbours), default=0)
        return self.tokens + len(ids) - known

    def add(self, ids: Ids) -> None:
        self.tokens = self.with_text(ids)
        self._num_texts += 1
        self._longest = max(self._longest, len(ids))
        if self.layout == "shared":
            insort(self._sorted, (_token_order(ids), ids), key=_first)


class ScoreQueue:
    """The state of a scorer: what waits, in order of arrival, and which answers are still incomplete."""

    def __init__(self, max_tokens: int, layout: Layout = "shared") -> None:
        self.max_tokens = max_tokens
        self.layout: Layout = layout
        self._waiting: dict[int, QueuedText] = {}
        self._by_prompt: dict[Hashable, dict[int, None]] = {}
        self._requests: dict[int, _Request] = {}
        self._next_ticket = 0

    def __len__(self) -> int:
        """How many texts wait."""
        return len(self._waiting)

    @property
    def num_requests(self) -> int:
        """How many requests are not answered yet."""
        return len(self._requests)

    def add(self, request: int, sequences: Sequence[Ids], prompts: Sequence[Hashable | None]) -> None:
        """Queue a request's texts (at least one); a `prompt` of None is like no other."""
        assert request not in self._requests
        assert len(sequences) == len(prompts) > 0
        entry = _Request(scores=[0.0] * len(sequences), num_missing=len(sequences))
        for index, (ids, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            ticket = self._next_ticket
            self._next_ticket += 1
            key: Hashable = ("only", ticket) if prompt is None else ("prompt", prompt)
            self._waiting[ticket] = QueuedText(request, index, ids, key)
            self._by_prompt.setdefault(key, {})[ticket] = None
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
        cost = BatchCost(self.layout)
        taken: list[QueuedText] = []
        while self._waiting:
            oldest = self._waiting[next(iter(self._waiting))]
            for ticket in list(self._by_prompt[oldest.prompt]):
                text = self._waiting[ticket]
                if taken and cost.with_text(text.ids) > self.max_tokens:
                    return taken
                cost.add(text.ids)
                taken.append(text)
                self._remove(ticket)
        return taken

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

    def _remove(self, ticket: int) -> None:
        text = self._waiting.pop(ticket)
        group = self._by_prompt[text.prompt]
        del group[ticket]
        if not group:
            del self._by_prompt[text.prompt]


def _token_order(ids: Ids) -> bytes:
    """Bytes that sort as the ids do: big-endian, and ids are not negative."""
    return ids.astype(">i4").tobytes()


def _first(item: tuple[bytes, Ids]) -> bytes:
    return item[0]
