"""Whatever arrives over HTTP is answered: with scores, or with a clear 4xx; never a 5xx, never a hang.

The ASGI application is driven itself, with a real model behind it: a thousand requests take seconds.
`RAYRM_FUZZ_EXAMPLES` (60) is the number of requests to each route.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rayrm.serve.http import build_app
from rayrm.serve.http_limits import HttpLimits
from rayrm.serve.protocols import ROUTES
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny
from tests.unit.test_http import JSON, paths_of
from tests.unit.test_protocols import ready, service_of


async def ask(
    app: FastAPI, method: str, path: str, body: bytes = b"", headers: Any = JSON, query: bytes = b""
) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request without a server; a hang is an error after 30 seconds."""
    sent: list[Any] = []
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()  # the caller stays

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": query,
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in dict(headers).items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 30)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], dict(sent[0]["headers"]), body


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # halves of surrogate pairs too
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), ANY_TEXT,
    st.sampled_from(["a", "left", "model", "user", "assistant", 0, 1, 399, 400, -1, [[1, 2]], [], {}]),
)  # fmt: skip
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=10,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": LEAVES})


def places_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, below in inner for place in places_of(below, (*at, key)))]


def at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def changed(body: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    body = copy.deepcopy(body)
    at(body, place[:-1])[place[-1]] = new
    return body


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """A valid body with up to two changes, or arbitrary JSON; some of it cut, with bytes behind it."""
    shapes = ROUTES[path]
    valid = [example for shape in shapes for example in shape.examples.values()]
    fields = sorted({name for shape in shapes for name in shape.body.model_fields})
    value = draw(st.sampled_from(valid)) if draw(st.integers(0, 4)) else draw(ANY_JSON)
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(places_of(value)))
        new = draw(ANY_JSON | st.lists(MESSAGE, max_size=3) | st.sampled_from(valid))
        if isinstance(at(value, place), str) and draw(st.booleans()):
            value = changed(value, place, draw(ANY_TEXT))  # stays valid, mostly
        elif isinstance(value, dict) and draw(st.booleans()):
            value = {**value, draw(st.sampled_from(fields)): new}
        else:
            value = changed(value, place, new)
    content = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        content = content[: draw(st.integers(0, len(content)))] + draw(st.binary(max_size=20))
    return content


EXAMPLES = int(os.environ.get("RAYRM_FUZZ_EXAMPLES", "60"))
QUERIES = st.just(b"") | st.sampled_from([b"model=reward", b"truncation=left", b"version=x", b"%ff=%00&a"])


@pytest.fixture(scope="module", params=["standard", "conversational"])
def scoring(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    directory = tmp_path_factory.mktemp(request.param)
    save_tiny(directory, chat=request.param == "conversational")
    limits = HttpLimits(max_characters=2000, max_texts=20)
    return build_app(service_of(RewardModel.from_pretrained(directory)), ready, limits)


@pytest.mark.parametrize("path", ROUTES)
def test_whatever_is_sent_is_answered_with_a_score_or_a_clear_refusal(path: str, scoring: FastAPI) -> None:
    """A 503 would be an error that nobody thought of: none may come from what a caller sends."""
    statuses: list[int] = []
    assert path in scoring.openapi()["paths"]
    # What is drawn seldom asks for nothing that is refused.
    works = json.dumps(next(iter(ROUTES[path][0].examples.values()))).encode()

    with asyncio.Runner() as runner:

        @settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        @given(bodies(path), QUERIES)
        @example(b"\x00", b"")
        @example(b"{}", b"model")
        @example(works, b"")
        def check(content: bytes, query: bytes) -> None:
            status, headers, body = runner.run(ask(scoring, "POST", path, content, JSON, query))
            statuses.append(status)
            assert headers[b"content-type"] == b"application/json"
            answer = json.loads(body, parse_constant=pytest.fail)
            if status == 200:
                return
            assert 400 <= status < 500, (status, answer)
            assert set(answer) == {"error"}
            assert answer["error"]["message"]
            assert len(body) < 20_000

        check()
    assert set(statuses) >= {200, 422}  # some reach the model, and some do not


def test_whatever_method_and_headers_are_sent_to_any_path_get_an_answer(scoring: FastAPI) -> None:
    rng = random.Random(0)
    names = ["Content-Type", "Content-Length", "Content-Encoding", "Authorization", "Host", "Range", "Accept"]

    async def run() -> None:
        for method, path in [*paths_of(scoring), ("POST", "/%00"), ("TRACE", "/v1/score"), ("", "/")]:
            for _ in range(5):
                headers = {
                    name: "".join(chr(rng.randrange(1, 256)) for _ in range(rng.randrange(20)))
                    for name in rng.sample(names, 3)
                }
                status, _, _ = await ask(scoring, method, path, b"{}", headers)
                assert status < 500, (method, path, headers)

    asyncio.run(run())
