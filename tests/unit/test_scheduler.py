"""The batch planner's invariants, on arbitrary queues."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrm.data.packing import pack_texts
from rayrm.serve.scheduler import BatchCost, Layout, QueuedText, ScoreQueue

# Few distinct tokens and short texts, so that prefixes, duplicates and empty tails really occur.
TEXT = st.lists(st.integers(1, 3), min_size=1, max_size=12)
REQUEST = st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), TEXT), min_size=1, max_size=6)
REQUESTS = st.lists(REQUEST, min_size=1, max_size=6)
LAYOUTS = st.sampled_from(["shared", "packed", "padded"])


def ids_of(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def filled(requests: list[list[tuple[str | None, list[int]]]], budget: int, layout: Layout) -> ScoreQueue:
    queue = ScoreQueue(budget, layout)
    for number, request in enumerate(requests):
        queue.add(number, [ids_of(t) for _, t in request], [p for p, _ in request])
    return queue


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


@given(REQUESTS, st.integers(1, 40), LAYOUTS)
def test_every_text_is_taken_exactly_once(requests, budget, layout) -> None:
    taken = [(t.request, t.index) for batch in drained(filled(requests, budget, layout)) for t in batch]
    assert sorted(taken) == [(r, i) for r, texts in enumerate(requests) for i in range(len(texts))]


@given(REQUESTS, st.integers(1, 40), LAYOUTS)
def test_a_batch_keeps_to_the_budget_unless_one_text_alone_is_above_it(requests, budget, layout) -> None:
    for batch in drained(filled(requests, budget, layout)):
        assert len(batch) == 1 or cost_of([t.ids for t in batch], layout) <= budget


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


@given(REQUESTS, st.integers(1, 40), LAYOUTS)
def test_the_oldest_waiting_text_is_in_the_next_batch(requests, budget, layout) -> None:
    waiting = [(r, i) for r, texts in enumerate(requests) for i in range(len(texts))]
    for batch in drained(filled(requests, budget, layout)):
        assert (batch[0].request, batch[0].index) == waiting[0]
        waiting = [place for place in waiting if place not in {(t.request, t.index) for t in batch}]


@given(REQUESTS, st.integers(1, 40))
def test_texts_of_one_prompt_stand_together(requests, budget) -> None:
    for batch in drained(filled(requests, budget, "shared")):
        prompts = [t.prompt for t in batch]
        changes = sum(a != b for a, b in itertools.pairwise(prompts))
        assert changes == len(set(prompts)) - 1


def test_texts_are_grouped_by_prompt_across_requests() -> None:
    queue = ScoreQueue(max_tokens=8)
    prompt_a, prompt_b = [1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]
    queue.add(0, [ids_of([*prompt_a, 3])], ["a"])
    queue.add(1, [ids_of([*prompt_b, 3])], ["b"])
    queue.add(2, [ids_of([*prompt_a, 4])], ["a"])
    assert [[t.request for t in batch] for batch in drained(queue)] == [[0, 2], [1]]


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
    queue.add(0, [ids_of([1]), ids_of([2] * 9), ids_of([3])], [None, None, None])
    assert [[t.index for t in batch] for batch in drained(queue)] == [[0], [1], [2]]
