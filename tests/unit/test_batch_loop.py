"""The replica's loop without Ray: who is answered, by which version, and what is not computed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rayrm.data.tokenize import TextInput
from rayrm.errors import (
    OverloadedError,
    RewardUnavailableError,
    ScoreError,
    UnknownModelError,
    VersionError,
)
from rayrm.serve.batch_loop import BatchLoop, BatchReport
from rayrm.serve.loaded import LoadedModel
from rayrm.serve.request import ModelPlace, ScoreRequest, ScoreResult
from rayrm.serve.scorer import RewardModel
from rayrm.serve_settings import Ensemble
from tests.tiny import WORDS, save_tiny

SAME = 1e-5


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[ModelPlace]:
    """Three models of one tokenizer and other weights."""
    root = tmp_path_factory.mktemp("loop")
    return [ModelPlace(str(save_tiny(root / f"{n}", seed=n, chat=False)), f"v{n}") for n in range(3)]


@pytest.fixture(scope="module")
def right(places: list[ModelPlace]) -> list[RewardModel]:
    return [RewardModel.from_pretrained(place.path) for place in places]


def loaded(place: ModelPlace, name: str = "reward", max_tokens: int = 64) -> LoadedModel:
    return LoadedModel.load(name, place, max_tokens)


def inputs(count: int, salt: str = "") -> list[TextInput]:
    return [TextInput(f"{salt} what is {WORDS[n % len(WORDS)]}?", f" it is {n}") for n in range(count)]


def ask(count: int, salt: str = "", **fields: Any) -> ScoreRequest:
    return ScoreRequest(inputs(count, salt), **fields)


def run(loop: BatchLoop, story: Callable[[], Awaitable[Any]]) -> Any:
    async def told() -> Any:
        try:
            return await story()
        finally:
            await loop.close()

    return asyncio.run(asyncio.wait_for(told(), 60))


class Gate:
    """Holds a model's computing until it is opened, and counts what is computed."""

    def __init__(self, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: list[int] = []
        self._open = threading.Event()
        compute = model.model.compute

        def wait(sequences: Any) -> list[float]:
            self.computed.append(len(sequences))
            assert self._open.wait(30)
            return compute(sequences)

        monkeypatch.setattr(model.model, "compute", wait)

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        while not self.computed:
            await asyncio.sleep(0.01)


@pytest.fixture
def gated(places: list[ModelPlace], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[BatchLoop, Gate]]:
    model = loaded(places[0])
    gate = Gate(model, monkeypatch)
    yield BatchLoop({"reward": model}), gate
    gate.open()


def test_each_request_gets_its_own_scores_with_counts_and_times(places: Any, right: Any) -> None:
    loop = BatchLoop({"reward": loaded(places[0])})
    requests = [ask(count, str(count)) for count in (1, 40, 3, 17)]
    answers: list[ScoreResult] = run(loop, lambda: asyncio.gather(*map(loop.score, requests)))
    for answer, request in zip(answers, requests, strict=True):
        assert answer.scores == pytest.approx(right[0].score_inputs(request.inputs), abs=SAME)
        assert answer.num_tokens == [len(ids) for ids in right[0].encode(request.inputs)]
        assert (answer.version, answer.model, answer.truncated, answer.spread) == ("v0", "reward", [], None)
        assert answer.timing.compute_s > 0
        assert answer.timing.total_s >= answer.timing.tokenize_s + answer.timing.queue_s
    assert loop.num_waiting == loop.waiting_tokens == 0


def test_ids_and_texts_that_are_too_long(places: Any, right: Any) -> None:
    loop = BatchLoop({"reward": loaded(places[0])})
    long = np.full(600, 5, np.int32)

    async def story() -> tuple[ScoreResult, ScoreResult]:
        with pytest.raises(ScoreError, match="600 tokens, the model's position limit is 512"):
            await loop.score(ScoreRequest([long]))
        cut = await loop.score(ScoreRequest([long[:7], long], truncation="left"))
        partial = await loop.score(ScoreRequest([long[:7], long, *inputs(1)], partial=True))
        return cut, partial

    cut, partial = run(loop, story)
    assert cut.truncated == [1]
    assert cut.num_tokens == [7, 512]
    assert cut.scores == pytest.approx(right[0].score_ids([long[:7], long[-512:]]), abs=SAME)
    assert np.isnan(partial.scores[1])
    assert list(partial.errors) == [1]
    assert [partial.scores[0]] == pytest.approx(right[0].score_ids([long[:7]]), abs=SAME)
    assert [partial.scores[2]] == pytest.approx(right[0].score_inputs(inputs(1)), abs=SAME)


def test_the_event_loop_runs_while_the_model_computes(gated: tuple[BatchLoop, Gate]) -> None:
    loop, gate = gated

    async def story() -> int:
        task = asyncio.create_task(loop.score(ask(1)))
        await gate.reached()
        ticks = 0
        for _ in range(20):
            await asyncio.sleep(0.001)
            ticks += 1
        assert not task.done()
        gate.open()
        await task
        return ticks

    assert run(loop, story) == 20


def test_a_request_of_thousands_leaves_the_tokenizer_to_others(
    places: Any, right: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small request is encoded between the parts of a large one, whose places and errors stay its own."""
    loop = BatchLoop({"reward": loaded(places[0], max_tokens=4096)})
    model = loop.models["reward"]
    seen: list[tuple[int, int]] = []
    encode = model.model.encode_request

    def noted(request: ScoreRequest, start: int, stop: int) -> Any:
        seen.append((len(request.inputs), start))
        return encode(request, start, stop)

    monkeypatch.setattr(model.model, "encode_request", noted)
    long = np.full(600, 5, np.int32)
    large = ScoreRequest([*inputs(600), long, *inputs(20)], truncation="right")

    async def story() -> Any:
        first = asyncio.create_task(loop.score(large))
        await asyncio.sleep(0)
        answers = await asyncio.gather(first, loop.score(ask(3)))
        with pytest.raises(ScoreError, match="input 600 has 600 tokens"):
            await loop.score(replace(large, truncation=None))
        return [*answers, await loop.score(replace(large, truncation=None, partial=True))]

    whole, small, partial = run(loop, story)
    assert seen[:4] == [(621, 0), (3, 0), (621, 256), (621, 512)]
    expected = right[0].score_inputs([*inputs(600), long[:512], *inputs(20)])
    assert whole.scores == pytest.approx(expected, abs=SAME)
    assert whole.truncated == [600]
    assert small.scores == pytest.approx(expected[:3], abs=SAME)
    assert list(partial.errors) == [600]
    assert partial.scores[601:] == pytest.approx(expected[601:], abs=SAME)


def test_what_is_cancelled_or_has_expired_is_not_computed(gated: tuple[BatchLoop, Gate]) -> None:
    loop, gate = gated

    async def story() -> None:
        first = asyncio.create_task(loop.score(ask(1)))
        await gate.reached()
        cancelled = asyncio.create_task(loop.score(ask(50, "cancelled")))
        expired = asyncio.create_task(loop.score(ask(40, "expired", left_s=0.05)))
        last = asyncio.create_task(loop.score(ask(2, "last")))
        while len(loop.models["reward"].queue) < 92:
            await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.sleep(0.1)
        gate.open()
        await first
        with pytest.raises(RewardUnavailableError, match="waited longer than its caller"):
            await expired
        assert len((await last).scores) == 2

    run(loop, story)
    assert sum(gate.computed) == 3
    assert loop.num_waiting == 0


def test_a_failed_batch_fails_its_requests_and_the_loop_goes_on(
    places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(places[0])
    loop = BatchLoop({"reward": model})
    compute, failures = model.model.compute, [RuntimeError("out of memory")]

    def failing_once(sequences: Any) -> list[float]:
        if failures:
            raise failures.pop()
        return compute(sequences)

    monkeypatch.setattr(model.model, "compute", failing_once)

    async def story() -> ScoreResult:
        with pytest.raises(RuntimeError, match="out of memory"):
            await loop.score(ask(30))
        assert loop.num_waiting == len(model.queue) == 0
        assert loop.failure() is None
        return await loop.score(ask(30))

    assert len(run(loop, story).scores) == 30
    assert isinstance(loop.failure(), asyncio.CancelledError)  # it was closed


def test_a_request_is_scored_by_the_version_that_it_met(
    places: Any, right: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times the model's budget wait when another version takes over: all by the old one."""
    old, new = loaded(places[0]), loaded(places[1])
    gate = Gate(old, monkeypatch)
    loop = BatchLoop({"reward": old})

    async def story() -> list[ScoreResult]:
        before = [asyncio.create_task(loop.score(ask(20, f"before {n}"))) for n in range(3)]
        await gate.reached()
        while len(old.queue) < 40:
            await asyncio.sleep(0.01)
        loop.swap(new)
        after = asyncio.create_task(loop.score(ask(20, "after")))
        pinned = asyncio.create_task(loop.score(ask(2, "pinned", version="v0")))
        await asyncio.sleep(0.05)
        assert loop.leaving() == ["v0"]
        gate.open()
        return await asyncio.gather(*before, pinned, after)

    *before, pinned, after = run(loop, story)
    assert [answer.version for answer in (*before, pinned, after)] == ["v0"] * 4 + ["v1"]
    for n, answer in enumerate(before):
        assert answer.scores == pytest.approx(right[0].score_inputs(inputs(20, f"before {n}")), abs=SAME)
    assert after.scores == pytest.approx(right[1].score_inputs(inputs(20, "after")), abs=SAME)
    assert loop.leaving() == []


def test_a_member_that_is_replaced_as_its_ensemble_is_asked_still_answers(places: Any, right: Any) -> None:
    """The swap comes before the members' own tasks have begun."""
    models = {name: loaded(place, name) for name, place in zip("ab", places, strict=False)}
    loop = BatchLoop(models, {"both": Ensemble(members=["a", "b"])})
    newer = loaded(places[2], "a")

    async def story() -> ScoreResult:
        asked = asyncio.create_task(loop.score(ask(4, model="both")))
        asyncio.get_running_loop().call_soon(loop.swap, newer)
        return await asked

    answer = run(loop, story)
    assert answer.version == "v0.v1"
    members = np.array([right[0].score_inputs(inputs(4)), right[1].score_inputs(inputs(4))])
    assert answer.scores == pytest.approx(members.mean(0), abs=SAME)
    assert (loop.leaving(), loop.num_waiting) == ([], 0)


def test_a_replaced_version_takes_pinned_requests_for_a_while_only(
    gated: tuple[BatchLoop, Gate], places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, gate = gated

    async def story() -> None:
        waits = asyncio.create_task(loop.score(ask(2)))
        await gate.reached()
        loop.swap(loaded(places[1]))
        pinned = asyncio.create_task(loop.score(ask(1, version="v0")))
        await asyncio.sleep(0)
        monkeypatch.setattr("rayrm.serve.batch_loop._PINNED_S", -1.0)
        with pytest.raises(VersionError, match="'v1' is served here"):
            await loop.score(ask(1, version="v0"))
        gate.open()
        assert [answer.version for answer in await asyncio.gather(waits, pinned)] == ["v0", "v0"]

    run(loop, story)


def test_a_replica_that_can_compute_no_batch_says_so(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = BatchLoop({"reward": loaded(places[0])})
    compute, broken = loop.models["reward"].model.compute, RuntimeError("CUDA error")

    def fail(sequences: Any) -> list[float]:
        raise broken

    async def story() -> None:
        for works in (False, False, True, False, False, False, False, False):
            assert loop.failure() is None
            monkeypatch.setattr(loop.models["reward"].model, "compute", compute if works else fail)
            await asyncio.gather(loop.score(ask(1)), return_exceptions=True)
        assert loop.failure() is broken

    run(loop, story)


def test_a_score_that_is_no_number_is_its_own_texts_error(
    places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = BatchLoop({"reward": loaded(places[0])})
    monkeypatch.setattr(loop.models["reward"].model, "compute", lambda ids: [0.5, float("nan")])
    wanted = ScoreRequest([np.zeros(0, np.int32), np.ones(3, np.int32), np.ones(5, np.int32)], partial=True)
    answer = run(loop, lambda: loop.score(wanted))
    assert answer.scores[1] == 0.5
    assert sorted(answer.errors) == [0, 2]
    assert "input 2 of 3 got the score nan" in answer.errors[2]


def test_a_pinned_version_that_is_not_served_is_refused(places: Any) -> None:
    loop = BatchLoop({"reward": loaded(places[0])})
    with pytest.raises(
        VersionError, match="version 'v9' of 'reward' is pinned, and 'v0' is served"
    ) as raised:
        run(loop, lambda: loop.score(ask(1, version="v9")))
    assert raised.value.served == "v0"


def test_above_the_limit_new_requests_are_refused_at_once(gated: tuple[BatchLoop, Gate]) -> None:
    """They are told to come back in half the time that the waiting texts take, by late batches' own time."""
    loop, gate = gated
    loop.max_queued = 3
    loop._rated.extend([(30, 2.0), (10, 1.0), (40, 1.0)])

    async def story() -> int:
        waiting = [asyncio.create_task(loop.score(ask(2, str(n)))) for n in range(3)]
        await gate.reached()
        with pytest.raises(
            OverloadedError, match="3 requests waiting, and `max_queued_requests` is 3"
        ) as raised:
            await loop.score(ask(1))
        assert loop.waiting_tokens > 0
        assert raised.value.retry_after_s == pytest.approx((loop.waiting_tokens * 4.0 / 80 + 1.0) / 2)
        gate.open()
        await asyncio.gather(*waiting)
        return len((await loop.score(ask(1))).scores)

    assert run(loop, story) == 1


def test_an_unknown_name_stands_for_the_only_model_where_the_request_says_so(places: Any) -> None:
    asked = ask(1, model="/models/reward", any_model=True)

    async def by(loop: BatchLoop) -> str:
        return (await loop.score(asked)).model

    only = BatchLoop({"a": loaded(places[0], "a")})
    assert run(only, lambda: by(only)) == "a"
    several = BatchLoop({name: loaded(place, name) for name, place in zip("ab", places[:2], strict=True)})
    with pytest.raises(UnknownModelError, match=r"'/models/reward'.* is none of them"):
        run(several, lambda: by(several))


@pytest.mark.parametrize("reduce", ["mean", "min", "mean-std"])
def test_several_models_and_an_ensemble_of_them(places: Any, right: Any, reduce: Any) -> None:
    models = {name: loaded(place, name) for name, place in zip("abc", places, strict=True)}
    ensemble = Ensemble(members=["a", "c"], reduce=reduce)
    loop = BatchLoop(models, {"both": ensemble})

    async def story() -> list[ScoreResult]:
        with pytest.raises(ScoreError, match="the service has a, b, c, both"):
            await loop.score(ask(1))
        with pytest.raises(ScoreError, match=r"`model` \('bath'\) is none of them.* Did you mean `both`"):
            await loop.score(ask(1, model="bath"))
        return await asyncio.gather(*(loop.score(ask(9, model=name)) for name in ("a", "b", "c", "both")))

    *single, both = run(loop, story)
    scores = [model.score_inputs(inputs(9)) for model in right]
    for answer, expected, name in zip(single, scores, "abc", strict=True):
        assert answer.model == name
        assert answer.scores == pytest.approx(expected, abs=SAME)
    members = np.array([scores[0], scores[2]])
    expected = {
        "mean": members.mean(0), "min": members.min(0), "mean-std": members.mean(0) - members.std(0),
    }[reduce]  # fmt: skip
    assert both.scores == pytest.approx(expected, abs=SAME)
    assert both.spread == pytest.approx(members.std(0), abs=SAME)
    assert (both.model, both.version) == ("both", "v0.v2")


def test_an_idle_model_leaves_the_device_and_comes_back(places: Any, right: Any) -> None:
    """On a CPU nothing moves; that the loop asks for it, and computes afterwards, is seen by its calls."""
    model = loaded(places[0])
    loop = BatchLoop({"reward": model}, idle_s=0.05)
    moved: list[str] = []
    model.model.offload = lambda: moved.append("away")  # type: ignore[method-assign]

    async def gone(times: int) -> None:
        while len(moved) < times:
            await asyncio.sleep(0.01)

    async def story() -> list[ScoreResult]:
        loop.start()
        await gone(1)  # nobody has called yet
        first = await loop.score(ask(3))
        await gone(2)
        await asyncio.sleep(0.2)
        assert moved == ["away"] * 2  # once, and not again while it is away
        assert loop.weights == "on_cpu"
        second = await loop.score(ask(3))
        await gone(3)
        loop.swap(model)  # a version that was loaded while the service is idle leaves too
        await gone(4)
        return [first, second]

    first, second = run(loop, story)
    assert first.scores == second.scores == pytest.approx(right[0].score_inputs(inputs(3)), abs=SAME)


def test_each_batch_is_reported(places: Any) -> None:
    reports: list[BatchReport] = []
    loop = BatchLoop({"reward": loaded(places[0], max_tokens=4096)}, told=reports.append)
    alike = [TextInput("the same beginning of some words ", f"{n}") for n in range(8)]
    run(loop, lambda: loop.score(ScoreRequest(alike)))
    assert [len(report.texts) for report in reports] == [8]
    assert reports[0].num_computed < reports[0].num_tokens
    assert [len(result.scores) for result in reports[0].results] == [8]
