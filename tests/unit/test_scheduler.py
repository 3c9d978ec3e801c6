"""The batch planner's invariants, on arbitrary queues."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrm.data.packing import pack_texts
from rayrm.serve import scheduler
from rayrm.serve.scheduler import BatchCost, Layout, QueuedText, ScoreQueue

# Few distinct tokens and short texts, so that prefixes, duplicates and empty tails really occur.
TEXT = st.lists(st.integers(1, 3), min_size=1, max_size=12)
REQUESTS = st.lists(st.lists(TEXT, min_size=1, max_size=6), min_size=1, max_size=6)
LAYOUTS = st.sampled_from(["shared", "packed", "padded"])


def ids_of(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def filled(requests: list[list[list[int]]], budget: int, layout: Layout) -> ScoreQueue:
    queue = ScoreQueue(budget, layout)
    for number, request in enumerate(requests):
        queue.add(number, [ids_of(tokens) for tokens in request])
    return queue


def place_of(text: QueuedText) -> tuple[int, int]:
    """When a text of `filled` arrived, as a place that sorts so."""
    return text.request, text.index


def begins_like(text: QueuedText, other: QueuedText) -> bool:
    """Whether `text` is worth pulling forward to `other`: a quarter of whose tokens it begins with."""
    known = sum(1 for _ in itertools.takewhile(bool, map(np.equal, text.ids, other.ids)))
    return 4 * known >= len(other.ids)


def drained(queue: ScoreQueue) -> list[list[QueuedText]]:
    batches = []
    while batch := queue.take():
        batches.append(batch)
    return batches


def cost_of(texts: list[np.ndarray], layout: Layout) -> int:
    """The cost by its definition: distinct prefixes, all tokens, or a rectangle."""
    if layout == "shared":
        return len({tuple(ids[: k + 1]) for ids in texts for k in range(len(ids))})
    if layout == "packed":
        return sum(len(ids) for ids in texts)
    return len(texts) * max(len(ids) for ids in texts)


@given(REQUESTS, st.integers(1, 40), LAYOUTS, st.integers(1, 4))
def test_every_text_is_taken_exactly_once(requests, budget, layout, turn) -> None:
    taken = [(t.request, t.index) for step in replayed(requests, budget, layout, turn) for t in step.batch]
    assert sorted(taken) == [(r, i) for r, texts in enumerate(requests) for i in range(len(texts))]


@given(REQUESTS, st.integers(1, 40), LAYOUTS, st.integers(1, 4))
def test_a_batch_keeps_to_the_budget_unless_one_text_alone_is_above_it(
    requests, budget, layout, turn
) -> None:
    for step in replayed(requests, budget, layout, turn):
        assert len(step.batch) == 1 or cost_of([t.ids for t in step.batch], layout) <= budget
    queue = filled(requests, budget, layout)
    while batch := queue.take():
        assert queue.taken_tokens == cost_of([text.ids for text in batch], layout)


@given(REQUESTS, st.integers(1, 5), LAYOUTS)
def test_a_batch_has_no_more_texts_than_a_mask_has_room_for(requests, most, layout) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "MOST_TEXTS", most)
        batches = drained(filled(requests, 1000, layout))
    assert max(len(batch) for batch in batches) <= most
    assert sum(len(batch) for batch in batches) == sum(len(request) for request in requests)


def test_a_batch_full_of_texts_leaves_the_others_for_the_next() -> None:
    texts = [[number + 1] for number in range(scheduler.MOST_TEXTS + 1)]
    assert [len(batch) for batch in drained(filled([texts], 10**6, "shared"))] == [scheduler.MOST_TEXTS, 1]


@given(st.lists(TEXT, min_size=1, max_size=10), LAYOUTS)
def test_the_cost_is_what_the_model_computes(texts, layout) -> None:
    cost = BatchCost(layout)
    for number, text in enumerate(texts):
        expected = cost_of([ids_of(t) for t in texts[: number + 1]], layout)
        assert cost.with_text(ids_of(text)) == expected
        cost.add(ids_of(text))
        assert cost.tokens == expected
    if layout != "padded":
        packed = pack_texts([ids_of(t) for t in texts], pad_token_id=0, share=layout == "shared")
        assert packed.num_tokens == cost.tokens


@given(st.lists(TEXT, min_size=1, max_size=10), LAYOUTS, st.integers(1, 12))
def test_texts_beyond_the_reach_cost_a_rectangle_of_their_own(texts, layout, reach) -> None:
    cost = BatchCost(layout, reach)
    for number in range(len(texts)):
        added = [ids_of(text) for text in texts[: number + 1]]
        parts = {
            layout: [ids for ids in added if len(ids) <= reach],
            "padded": [ids for ids in added if len(ids) > reach],
        }
        if layout == "padded":
            parts = {"padded": added}
        assert cost.with_text(added[-1]) == sum(cost_of(part, name) for name, part in parts.items() if part)
        cost.add(added[-1])


@given(REQUESTS, st.integers(1, 40), st.integers(1, 12))
def test_with_a_reach_a_batch_keeps_to_the_budget_too(requests, budget, reach) -> None:
    queue = ScoreQueue(budget, "shared", reach)
    for number, request in enumerate(requests):
        queue.add(number, [ids_of(tokens) for tokens in request])
    batches = drained(queue)
    assert sum(len(batch) for batch in batches) == sum(len(request) for request in requests)
    for batch in batches:
        cost = BatchCost("shared", reach)
        assert len(batch) == 1 or cost.fill(batch, budget) == len(batch)


@dataclass
class Step:
    """A batch, what waited when it was planned and came to the batch or not (by request), and the line, first
    to last, as it was before each text of the batch was taken; `charges`: what each added to the cost."""

    batch: list[QueuedText]
    waiting: dict[int, list[int]]
    lines: list[list[int]]
    charges: list[int]


def replayed(
    requests: list[list[list[int]]],
    budget: int,
    layout: Layout,
    turn: int,
    arrivals: list[int] | None = None,
) -> list[Step]:
    """Drain a queue and follow the line by its definition. Request r arrives before batch `arrivals[r]`, or
    when nothing else waits; all at once unless given."""
    steps: list[Step] = []
    line: list[int] = []
    waiting: dict[int, list[int]] = {}
    given = [0] * len(requests)
    to_come = sorted(range(len(requests)), key=lambda r: arrivals[r] if arrivals else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_TURN", turn)
        queue = ScoreQueue(budget, layout)
        while to_come or line:
            while to_come and (not line or not arrivals or arrivals[to_come[0]] <= len(steps)):
                request = to_come.pop(0)
                queue.add(request, [ids_of(tokens) for tokens in requests[request]])
                line.append(request)
                waiting[request] = list(range(len(requests[request])))
            step = Step(queue.take(), {r: list(left) for r, left in waiting.items()}, [], [])
            steps.append(step)
            for number, text in enumerate(step.batch):
                before = cost_of([t.ids for t in step.batch[:number]], layout) if number else 0
                charge = cost_of([t.ids for t in step.batch[: number + 1]], layout) - before
                step.lines.append(list(line))
                step.charges.append(charge)
                waiting[text.request].remove(text.index)
                given[text.request] += charge
                if not waiting[text.request]:
                    line.remove(text.request)
                elif given[text.request] >= turn * budget:
                    line.append(line.pop(line.index(text.request)))
                    given[text.request] = 0
    assert queue.take() == []
    return steps


TURNS = st.integers(1, 4)
ARRIVALS = st.lists(st.integers(0, 8), min_size=6, max_size=6)


@given(REQUESTS, st.integers(1, 40), LAYOUTS, TURNS, ARRIVALS)
def test_a_batch_begins_with_the_oldest_text_of_the_first_request_in_line(
    requests, budget, layout, turn, arrivals
) -> None:
    for step in replayed(requests, budget, layout, turn, arrivals):
        first = step.lines[0][0]
        assert (step.batch[0].request, step.batch[0].index) == (first, step.waiting[first][0])


@given(REQUESTS, st.integers(1, 40), LAYOUTS, TURNS, ARRIVALS)
def test_a_request_waits_for_one_turn_of_each_before_it_at_most(
    requests, budget, layout, turn, arrivals
) -> None:
    steps = replayed(requests, budget, layout, turn, arrivals)
    most = turn * budget + max(budget, *(sum(step.charges) for step in steps))
    for request in range(len(requests)):
        before: list[int] | None = None  # since its last text, or since it came
        passed: Counter[int] = Counter()
        for step in steps:
            for text, line, charge in zip(step.batch, step.lines, step.charges, strict=True):
                if before is None and request in line:
                    before = line[: line.index(request)]
                if text.request == request:
                    before, passed = None, Counter()
                elif before is not None and text.request in before:
                    passed[text.request] += charge
                    assert passed[text.request] <= most


@given(st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=6), ARRIVALS, LAYOUTS)
def test_requests_within_a_turn_are_first_come_first_served(requests, arrivals, layout) -> None:
    # Three texts of 12 tokens: a rectangle grows by 36 + 24 at most when such a text joins.
    for step in replayed(requests, 36, layout, 4, arrivals):
        assert step.lines[0] == sorted(step.lines[0], key=lambda r: (arrivals[r], r))


def test_a_huge_request_puts_small_ones_off_for_five_batches_at_most() -> None:
    rng = np.random.default_rng(0)
    queue = ScoreQueue(100)
    queue.add(0, list(rng.integers(0, 1000, (1000, 10), dtype=np.int32)))
    for small in range(1, 10):
        queue.add(small, list(rng.integers(0, 1000, (5, 10), dtype=np.int32)))
        next_six = [{text.request for text in queue.take()} for _ in range(6)]
        assert any(small in requests for requests in next_six)
    assert len(queue) > 300


def test_a_small_request_that_begins_as_a_huge_one_is_served_whole_when_it_is_first() -> None:
    """One system prompt for all: in token order the huge one's texts stand between those of the small one."""
    queue = ScoreQueue(200)
    queue.add(0, [ids_of([*[7] * 100, n, 1]) for n in range(0, 2000, 2)])
    queue.add(1, [ids_of([*[7] * 100, n, 1]) for n in range(1, 2000, 200)])
    firsts = [batch for batch in itertools.islice(iter(queue.take, []), 20) if batch[0].request == 1]
    assert [text.request for text in firsts[0][:10]] == [1] * 10
    assert len(firsts) == 1


def batches_and_waiting(
    requests: list[list[list[int]]], budget: int, layout: Layout
) -> list[tuple[list[QueuedText], list[QueuedText]]]:
    """Each batch, and what was left waiting behind it, in order of arrival."""
    batches = drained(filled(requests, budget, layout))
    return [
        (batch, sorted(itertools.chain(*batches[number + 1 :]), key=place_of))
        for number, batch in enumerate(batches)
    ]


@given(REQUESTS, st.integers(1, 40), LAYOUTS, TURNS, ARRIVALS)
def test_a_text_overtakes_others_in_line_only_to_join_one_that_it_begins_like(
    requests, budget, layout, turn, arrivals
) -> None:
    for step in replayed(requests, budget, layout, turn, arrivals):
        here = {(text.request, text.index) for text in step.batch}
        for number, (text, line) in enumerate(zip(step.batch, step.lines, strict=True)):
            before = line[: line.index(text.request)]
            overtaken = [(r, i) for r in before for i in step.waiting[r] if (r, i) not in here]
            overtaken += [
                (text.request, i) for i in step.waiting[text.request]
                if i < text.index and (text.request, i) not in here
            ]  # fmt: skip
            if overtaken:
                assert layout == "shared"
                assert any(begins_like(text, other) for other in step.batch[:number])


@given(REQUESTS, st.integers(1, 40))
def test_texts_that_begin_like_the_oldest_are_in_its_batch_if_they_all_fit(requests, budget) -> None:
    for batch, left in batches_and_waiting(requests, budget, "shared"):
        alike = [text for text in [*batch, *left] if begins_like(text, batch[0])]
        if cost_of([text.ids for text in alike], "shared") <= budget:
            assert {place_of(text) for text in alike} <= {place_of(text) for text in batch}


@given(REQUESTS, st.integers(1, 40))
def test_a_group_is_cut_only_where_it_is_too_large_for_a_batch(requests, budget) -> None:
    for batch, left in batches_and_waiting(requests, budget, "shared"):
        # Who led a group: the oldest of those that waited, when those before it were in the batch.
        for number, leader in enumerate(batch[1:], 1):
            waited = sorted([*batch[number:], *left], key=place_of)
            alike = [text for text in waited if begins_like(text, leader)]
            if leader is waited[0] and cost_of([text.ids for text in alike], "shared") <= budget:
                older = [other for other in batch[:number] if begins_like(leader, other)]
                assert older or {place_of(text) for text in alike} <= {place_of(text) for text in batch}


def test_texts_that_begin_alike_meet_across_requests_without_being_told() -> None:
    queue = ScoreQueue(max_tokens=8)
    queue.add(0, [ids_of([1, 1, 1, 1, 1, 1, 3])])
    queue.add(1, [ids_of([2, 2, 2, 2, 2, 2, 3])])
    queue.add(2, [ids_of([1, 1, 1, 1, 1, 1, 4])])
    assert [[t.request for t in batch] for batch in drained(queue)] == [[0, 2], [1]]


def test_a_group_that_fits_the_next_batch_is_not_cut() -> None:
    queue = ScoreQueue(max_tokens=10)
    queue.add(0, [ids_of([1, 1, 1, 1, 1, 1])])
    queue.add(1, [ids_of([2, 2, 2, n]) for n in (3, 4, 5)])
    assert [[t.request for t in batch] for batch in drained(queue)] == [[0], [1, 1, 1]]


def test_texts_above_the_budget_together_fill_batches() -> None:
    queue = ScoreQueue(max_tokens=10)
    queue.add(0, [ids_of([1, 1, 1, 1, n, n]) for n in range(2, 8)])
    assert [[t.index for t in batch] for batch in drained(queue)] == [[0, 1, 2], [3, 4, 5]]


@given(REQUESTS, st.integers(1, 40))
@settings(max_examples=50)
def test_a_request_is_answered_once_in_its_own_order(requests, budget) -> None:
    queue = filled(requests, budget, "shared")
    answers: dict[int, list[float]] = {}
    while batch := queue.take():
        for request, scores in queue.answer(batch, [100.0 * t.request + t.index for t in batch]):
            assert request not in answers
            answers[request] = scores
    assert answers == {r: [100.0 * r + i for i in range(len(ts))] for r, ts in enumerate(requests)}
    assert len(queue) == queue.num_requests == 0


@given(REQUESTS, st.integers(1, 40), st.data())
def test_a_dropped_request_is_neither_computed_nor_answered(requests, budget, data) -> None:
    queue = filled(requests, budget, "shared")
    first = queue.take()
    dropped = data.draw(st.integers(0, len(requests) - 1))
    queue.drop(dropped)
    answers = queue.answer(first, [0.0] * len(first))
    for batch in drained(queue):
        assert all(t.request != dropped for t in batch)
        answers += queue.answer(batch, [0.0] * len(batch))
    assert sorted(request for request, _ in answers) == [r for r in range(len(requests)) if r != dropped]
    queue.drop(dropped)


def test_an_empty_queue_gives_an_empty_batch() -> None:
    assert ScoreQueue(10).take() == []


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_text_above_the_budget_travels_alone(layout: Layout) -> None:
    queue = ScoreQueue(4, layout)
    queue.add(0, [ids_of([1]), ids_of([2] * 9), ids_of([3])])
    assert [[t.index for t in batch] for batch in drained(queue)] == [[0], [1], [2]]


@given(REQUESTS, st.integers(1, 40), LAYOUTS, st.data())
def test_waiting_tokens_are_those_of_what_waits(requests, budget, layout, data) -> None:
    queue = filled(requests, budget, layout)
    waiting = {(r, i): len(text) for r, texts in enumerate(requests) for i, text in enumerate(texts)}
    while len(queue):
        assert queue.waiting_tokens == sum(waiting.values())
        if data.draw(st.booleans()):
            dropped = data.draw(st.integers(0, len(requests) - 1))
            queue.drop(dropped)
            waiting = {place: length for place, length in waiting.items() if place[0] != dropped}
        else:
            for text in queue.take():
                del waiting[text.request, text.index]
        assert len(queue) == len(waiting)
    assert queue.waiting_tokens == 0


@given(REQUESTS, st.integers(1, 40), LAYOUTS, st.lists(st.integers(0, 9) | st.none(), min_size=6, max_size=6))
def test_a_request_expires_when_its_time_is_past_and_nothing_of_it_was_taken(
    requests, budget, layout, times
) -> None:
    queue = ScoreQueue(budget, layout)
    for number, request in enumerate(requests):
        queue.add(number, [ids_of(tokens) for tokens in request], expires_at=times[number])
    begun = {text.request for text in queue.take()}
    past = {r for r in range(len(requests)) if r not in begun and times[r] is not None and times[r] <= 5}
    expired = queue.expire(5)
    assert len(expired) == len(set(expired))
    assert set(expired) == past
    assert queue.expire(5) == []
    assert queue.num_requests == len(requests) - len(past)
    computed = begun | {text.request for batch in drained(queue) for text in batch}
    assert computed == set(range(len(requests))) - past
    # Time goes on, and whatever was taken in the meantime is no longer given up.
    assert queue.expire(100) == []


@pytest.mark.parametrize("count", [3, 600])
def test_what_is_added_and_dropped_at_once_or_one_by_one_leaves_the_others_alike(count: int) -> None:
    queue = ScoreQueue(10**6)
    queue.add(0, [ids_of([5, 5, n]) for n in range(10)])
    queue.add(1, [ids_of([5, 5, n]) for n in range(count)])
    queue.add(2, [ids_of([9, n]) for n in range(10)])
    queue.drop(1)
    assert queue.waiting_tokens == 50
    assert [(text.request, text.index) for text in queue.take()] == [
        (r, i) for r in (0, 2) for i in range(10)
    ]


def test_requests_that_were_answered_before_their_time_are_forgotten() -> None:
    """Callers may wait for a day, and a service answer thousands a minute."""
    queue = ScoreQueue(64)
    for number in range(5000):
        queue.add(number, [ids_of([1, 2])], expires_at=1e9 + number)
        queue.answer(queue.take(), [0.0])
    assert len(queue._expiring) < 2000
    queue.add(5000, [ids_of([1])], expires_at=3.0)
    assert queue.expire(5.0) == [5000]
