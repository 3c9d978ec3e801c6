"""Which texts make the next batch: pure planning over token ids, apart from torch, Ray and threads.

A `ScoreQueue` holds the texts of many requests. Whenever the model is free, `take()` gives the next batch and
`answer()` turns its scores into finished requests. Requests stand in a line, in order of arrival. Strategy of
`take`:

1. start with the oldest text of the first request in line;
2. pull forward the texts that begin like it, with at least a quarter of its tokens: those of its own request
   first, then others' in the order of the line;
3. go on with the oldest text of who is then first in line and those that begin like it, until they would
   exceed the budget. A group that fits a batch of its own is then left for the next one, any other is cut.
4. A request that has been given a turn, 4 batches' worth of tokens, goes to the back of the line. What counts
   is what its own texts add to the cost of their batches, those pulled forward included.

A batch is full at `max_tokens`, or at 1024 texts: in the last layer each text's score meets every token of
the batch, and for thousands of texts of a few tokens that mask would outgrow all else.

What texts begin with is read off their ids, so groups need no name: completions of one prompt, the turns of
one dialogue and the texts under one long system prompt are found alike.

Invariants, each a test:

1. Every text is taken exactly once, or never when its request was dropped or had expired before.
2. A batch begins with the oldest text of the first request in line.
3. A batch has at most 1024 texts, and costs at most `max_tokens`, unless one text alone costs more: it then
   travels alone.
4. A text overtakes those before it in line only to join a text that has a quarter of its tokens in common
   with it; without sharing none does.
5. Texts that begin alike and fit one batch are in one batch, if they wait when the first of them is taken.
6. A request is answered once, with its scores in its own order, when its last text is done.
7. Requests of no more than a turn are first in line in order of arrival. A request waits for its next text no
   longer than until each one before it has been given a turn and the rest of the batch that completes it: so
   none starves, and one of any size delays another by 5 batches' worth of its tokens at most. (Texts of
   others that join its batches by their beginnings come on top: room it left.)

The cost of a batch is the number of tokens the model computes: shared beginnings once (`shared`), every text
in full (`packed`), or every text as long as the longest (`padded`). Texts longer than `reach` are padded
whatever the layout, apart from the others. Planning costs less than 0.1 ms a text, also with 50,000 texts of
1,000 requests waiting (`jobs/bench/scheduler.py`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Literal

from rayrm.data.packing import Ids, common_prefix_length

Layout = Literal["shared", "packed", "padded"]

_WORTHWHILE = 4
"""A text is pulled forward to one that has at least a quarter of its own tokens in common with it."""

_TURN = 4
"""Batches' worth of tokens after which a request goes to the back of the line. Of a request that is no larger
than this nothing is put off for the sake of later ones; one of thousands of texts delays others so long."""

MOST_TEXTS = 1024
"""Of a batch."""

_FEW = 512
"""Texts that are put into a sorted list, or taken out of it, one by one: each moves half of the list. Of
more of them it is sorted or filtered once."""

_Ordered = tuple[bytes, int]
"""A waiting text in a list sorted by token: its ids as `_token_order` gives them, and its ticket."""


@dataclass(frozen=True, slots=True, eq=False)
class QueuedText:
    """Text number `index` of request `request`."""

    request: int
    index: int
    ids: Ids


@dataclass(slots=True, eq=False)
class _Request:
    """`tickets`: of its texts, in order; those before number `oldest` were taken. `alike`: what of it waits,
    sorted by token. `place`: where it stands in line, lower is earlier. `given`: tokens in its present turn.
    """

    scores: list[float]
    num_missing: int
    tickets: range
    place: int
    alike: list[_Ordered] = field(default_factory=list)
    num_waiting: int = 0
    oldest: int = 0
    given: int = 0


class BatchCost:
    """How many tokens the model computes for the texts added so far; `added`: by how much each raised it."""

    def __init__(self, layout: Layout, reach: int | None = None) -> None:
        self.layout = layout
        self.reach = reach
        self.tokens = 0
        self.added: list[int] = []
        self._num_padded = 0
        self._longest = 0
        # Sorted by token: a text's longest match in the batch is then one of its two neighbours, and the
        # number of distinct prefixes grows by what goes beyond that match.
        self._sorted: list[tuple[bytes, Ids]] = []

    def with_text(self, ids: Ids) -> int:
        """The cost if `ids` were added as well."""
        return self.tokens + self._increase((_token_order(ids), ids))

    def add(self, ids: Ids) -> None:
        item = (_token_order(ids), ids)
        self._add(item, self._increase(item))

    def fill(self, texts: Sequence[QueuedText], max_tokens: int) -> int:
        """Add texts from the first on while the batch is not full; how many were added."""
        for number, text in enumerate(texts):
            item = (_token_order(text.ids), text.ids)
            increase = self._increase(item)
            if len(self.added) == MOST_TEXTS or self.tokens + increase > max_tokens:
                return number
            self._add(item, increase)
        return len(texts)

    def _increase(self, item: tuple[bytes, Ids]) -> int:
        ids = item[1]
        if self._pads(ids):
            padded = (self._num_padded + 1) * max(self._longest, len(ids))
            return padded - self._num_padded * self._longest
        if self.layout == "packed":
            return len(ids)
        place = bisect_left(self._sorted, item[0], key=_first)
        neighbours = self._sorted[max(place - 1, 0) : place + 1]
        return len(ids) - max((common_prefix_length([ids, other]) for _, other in neighbours), default=0)

    def _add(self, item: tuple[bytes, Ids], increase: int) -> None:
        self.tokens += increase
        self.added.append(increase)
        if self._pads(item[1]):
            self._num_padded += 1
            self._longest = max(self._longest, len(item[1]))
        elif self.layout == "shared":
            insort(self._sorted, item, key=_first)

    def _pads(self, ids: Ids) -> bool:
        return self.layout == "padded" or (self.reach is not None and len(ids) > self.reach)


class ScoreQueue:
    """The state of a scorer: who stands in line, what of it waits, and which answers are still incomplete.

    `waiting_tokens`: of all waiting texts, each in full.
    """

    def __init__(self, max_tokens: int, layout: Layout = "shared", reach: int | None = None) -> None:
        self.max_tokens = max_tokens
        self.layout: Layout = layout
        self.reach = reach
        self.waiting_tokens = 0
        # What the model computes for the batch that `take` gave last.
        self.taken_tokens = 0
        self._waiting: dict[int, QueuedText] = {}
        # What waits, of all requests, sorted: texts that begin alike are neighbours.
        self._alike: list[_Ordered] = []
        self._requests: dict[int, _Request] = {}
        # Those of which something waits, first in line first.
        self._line: OrderedDict[int, _Request] = OrderedDict()
        self._expiring: list[tuple[float, int]] = []
        self._next_ticket = 0
        self._next_place = 0

    def __len__(self) -> int:
        """How many texts wait."""
        return len(self._waiting)

    @property
    def num_requests(self) -> int:
        """How many requests are not answered yet."""
        return len(self._requests)

    def add(self, request: int, sequences: Sequence[Ids], *, expires_at: float | None = None) -> None:
        """Queue a request's texts (at least one) at the back of the line; a number is used once.

        `expires_at`: when nobody waits for it any longer, on the clock that `expire` is told.
        """
        assert request not in self._requests
        assert sequences
        first, count = self._next_ticket, len(sequences)
        tickets = range(first, first + count)
        self._next_ticket += count
        entry = _Request([0.0] * count, count, tickets, self._place(), num_waiting=count)
        for index, (ticket, ids) in enumerate(zip(tickets, sequences, strict=True)):
            self._waiting[ticket] = QueuedText(request, index, ids)
            self.waiting_tokens += len(ids)
        if self.layout == "shared":
            entry.alike = sorted((_token_order(ids), n) for n, ids in zip(tickets, sequences, strict=True))
            if count <= _FEW:
                for item in entry.alike:
                    insort(self._alike, item)
            else:
                self._alike += entry.alike
                self._alike.sort()
        self._requests[request] = self._line[request] = entry
        if expires_at is not None:
            heappush(self._expiring, (expires_at, request))
            if len(self._expiring) > 2 * len(self._requests) + 1024:  # most were answered long before
                self._expiring = [item for item in self._expiring if item[1] in self._requests]
                heapify(self._expiring)

    def drop(self, request: int) -> None:
        """Forget a request: its waiting texts are not computed. Unknown and answered requests are ignored."""
        entry = self._requests.pop(request, None)
        if entry is None or not entry.num_waiting:
            return
        del self._line[request]
        for ticket in entry.tickets[entry.oldest :]:
            if (text := self._waiting.pop(ticket, None)) is not None:
                self.waiting_tokens -= len(text.ids)
        if len(entry.alike) <= _FEW:
            for item in entry.alike:
                del self._alike[bisect_left(self._alike, item)]
        else:
            self._alike = [item for item in self._alike if item[1] not in entry.tickets]

    def expire(self, now: float) -> list[int]:
        """Drop the requests whose time is past, unless a text of them was taken; returns their numbers."""
        expired: list[int] = []
        while self._expiring and self._expiring[0][0] <= now:
            _, request = heappop(self._expiring)
            entry = self._requests.get(request)
            if entry is not None and entry.num_waiting == len(entry.scores):
                self.drop(request)
                expired.append(request)
        return expired

    def take(self) -> list[QueuedText]:
        """The next batch, removed from the queue; empty when nothing waits."""
        cost = BatchCost(self.layout, self.reach)
        self.taken_tokens = 0
        taken: list[QueuedText] = []
        while self._line:
            tickets = self._group()
            group = [self._waiting[ticket] for ticket in tickets]
            fits = cost.fill(group, self.max_tokens)
            if fits < len(group) and taken and self._fits(group):
                return taken
            if not taken and not fits:
                # A text above the budget by itself, the first of its group, travels alone.
                cost.add(group[0].ids)
                return [self._take(tickets[0], cost.tokens)]
            for ticket, tokens in zip(tickets[:fits], cost.added[len(taken) :], strict=True):
                taken.append(self._take(ticket, tokens))
            if fits < len(group):
                return taken
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

    def _fits(self, group: Sequence[QueuedText]) -> bool:
        return BatchCost(self.layout, self.reach).fill(group, self.max_tokens) == len(group)

    def _place(self) -> int:
        """The place at the back of the line."""
        self._next_place += 1
        return self._next_place

    def _group(self) -> list[int]:
        """The oldest text of who is first in line and those that begin like it, in the order of the line."""
        entry = next(iter(self._line.values()))
        while (oldest := entry.tickets[entry.oldest]) not in self._waiting:
            entry.oldest += 1
        if self.layout != "shared":
            return [oldest]
        leader = (_token_order(self._waiting[oldest].ids), oldest)
        # Texts of others stand between those of one request: it must not wait until they are done.
        alike, fill_a_batch = self._neighbours(entry.alike, leader)
        if not fill_a_batch:
            alike |= self._neighbours(self._alike, leader)[0]
        return sorted(alike, key=lambda ticket: (self._requests[self._waiting[ticket].request].place, ticket))

    def _neighbours(self, ordered: Sequence[_Ordered], leader: _Ordered) -> tuple[set[int], bool]:
        """The leader and the texts of a sorted list that begin like it, but no more than fill a batch, before
        it and after it; and whether they do.

        In token order what texts have in common with this one only shrinks with distance, and what a text
        adds to those up to it is what goes beyond its neighbour.
        """
        ids = self._waiting[leader[1]].ids
        place = bisect_left(ordered, leader)
        found, are_many = [leader[1]], False
        for step in (-1, 1):
            known, room, most = len(ids), self.max_tokens - len(ids), len(found) + MOST_TEXTS
            nearer, at = ids, place + step
            while 0 <= at < len(ordered):
                if room < 0 or len(found) == most:
                    are_many = True
                    break
                ticket = ordered[at][1]
                other = self._waiting[ticket].ids
                beyond = common_prefix_length([nearer, other])
                known = min(known, beyond)
                if _WORTHWHILE * known < len(ids):
                    break
                found.append(ticket)
                room -= len(other) - beyond
                nearer, at = other, at + step
        return set(found), are_many

    def _take(self, ticket: int, tokens: int) -> QueuedText:
        """Remove a text that adds `tokens` to its batch; ends its request's turn when that makes it full."""
        text = self._waiting.pop(ticket)
        self.waiting_tokens -= len(text.ids)
        self.taken_tokens += tokens
        entry = self._requests[text.request]
        if self.layout == "shared":
            item = (_token_order(text.ids), ticket)
            for ordered in (self._alike, entry.alike):
                del ordered[bisect_left(ordered, item)]
        entry.num_waiting -= 1
        entry.given += tokens
        if not entry.num_waiting:
            del self._line[text.request]
        elif entry.given >= _TURN * self.max_tokens:
            self._line.move_to_end(text.request)
            entry.place, entry.given = self._place(), 0
        return text


def _token_order(ids: Ids) -> bytes:
    """Bytes that sort as the ids do: big-endian, and ids are not negative."""
    return ids.astype(">i4").tobytes()


def _first(item: tuple[bytes, Ids]) -> bytes:
    return item[0]
