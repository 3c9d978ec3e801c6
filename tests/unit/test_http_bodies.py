"""What a request's body may be: JSON that all readers read alike, within the limits, however it is sent."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import uvicorn

from rayrm.serve.http import build_app
from rayrm.serve.http_limits import HttpLimits
from tests.unit.test_http import JSON, SAMPLE, client, error_of, zeros
from tests.unit.test_protocols import ready


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a", "response": "b"} x', "not valid JSON"),
        (b'{"prompt": "a\x00", "response": "b"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"prompt": "\xff"}', "byte 12 of the body is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"[]", "JSON array"),
        (b'"a"', "JSON string"),
        (b"null", "JSON null"),
        (b"1", "JSON number"),
        (b'{"prompt": NaN}', "NaN"),
        (b'{"prompt": -Infinity}', "-Infinity"),
        (b'{"prompt": 1e400}', "too large"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b'{"prompt": "a", "prompt": "b", "response": "c"}', "'prompt' twice"),
        (b'{"label": ' + b"[" * 70 + b"]" * 70 + b"}", "deeper than 64"),
        (b"[" * 100_000, "deeper than 64"),
        (b'{"label": [' + b"[]," * 2_000_000 + b"1]}", "opening brackets"),
        (b'{"a":' * 100_000, "deeper than 64"),
        (b'{"prompt": "\\ud800", "response": "b"}', "`prompt` holds half of a surrogate pair"),
        (b'{"prompt": "a", "response": "b", "label": {"\\udfff": 1}}', "`label` holds half"),
        (b'{"prompt": "a", "response": "b", "label": [0, ["\\udfff"]]}', "`label[1]` holds half"),
        (b'{"prompt": "a", "response": "b", "\\udfff": 1}', "`\\udfff` holds half"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_body_that_readers_disagree_about_is_refused(body: bytes, says: str) -> None:
    answer = client().post("/reward", content=body, headers=JSON)
    assert answer.status_code == 422
    assert says in error_of(answer)["message"]


def test_whole_characters_written_as_two_escapes_and_deep_labels_are_read() -> None:
    body = b'{"prompt": "\\ud83d\\ude00", "response": "b", "label": ' + b"[" * 60 + b"]" * 60 + b"}"
    assert client().post("/reward", content=body, headers=JSON).json() == 0.0


def test_only_json_by_its_headers_is_read() -> None:
    http, body = client(), json.dumps(SAMPLE).encode()
    for kind in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'):
        assert http.post("/reward", content=body, headers={"Content-Type": kind}).status_code == 200
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json; charset=latin-1"},
                    {"Content-Type": "application/x-www-form-urlencoded"},
                    {**JSON, "Content-Encoding": "gzip"}):  # fmt: skip
        answer = http.post("/reward", content=body, headers=headers)
        assert answer.status_code == 415
        assert error_of(answer)["type"] == "unsupported_media_type"


def test_a_request_beyond_a_limit_is_refused_and_one_at_it_is_scored() -> None:
    limits = HttpLimits(max_body_bytes=2000, max_texts=3, max_characters=100)
    http = client(limits=limits)
    tools = [{"t": "x" * 90}]
    cases: list[tuple[str, Any, bool]] = [
        ("/get_reward", {"query": ["a"] * 3}, True),
        ("/get_reward", {"query": ["a"] * 4}, False),
        ("/get_reward", {"query": ["a" * 100]}, True),
        ("/get_reward", {"query": ["a", "a" * 101]}, False),
        ("/v1/score", {"ids": [[1] * 100]}, True),
        ("/v1/score", {"ids": [[1] * 101]}, False),
        ("/score", {"text_1": "a" * 60, "text_2": ["b" * 40]}, True),
        ("/score", {"text_1": "a" * 60, "text_2": ["b" * 41]}, False),
        ("/v1/score", {"completions": [[{"role": "assistant", "content": "a" * 40}]]}, True),
        ("/v1/score", {"completions": [[{"role": "assistant", "content": "a" * 100}]]}, False),
        ("/v1/score", {"completions": ["a"], "tools": tools}, False),
        ("/v1/score", {"completions": ["a"], "chat_template_kwargs": {"t": "x" * 90}}, True),
        ("/v1/score", {"completions": [[]] * 4}, False),
        ("/classify", {"input": [1] * 100}, True),
        ("/classify", {"input": [1] * 101}, False),
        ("/get_reward", {"query": ["a"], "labels": ["b" * 2000]}, False),
    ]
    for path, body, passes in cases:
        answer = http.post(path, json=body)
        assert answer.status_code == (200 if passes else 413), (path, body, answer.text)
        if not passes:
            assert error_of(answer)["type"] == "too_large"
            assert "limit of this service" in error_of(answer)["message"]


def test_a_text_beyond_the_limit_is_named_as_its_caller_names_it() -> None:
    http, long = client(limits=HttpLimits(max_characters=10)), "a" * 11
    said = {"role": "assistant", "content": long}
    for path, body, name in (
        ("/v1/score", {"completions": ["a", long]}, "completions[1]"),
        ("/v1/score", {"ids": [[1], [1] * 11]}, "ids[1]"),
        ("/get_reward", {"query": ["a", long]}, "query[1]"),
        ("/classify", {"input": long}, "input"),
        ("/classify", {"messages": [{"role": "user", "content": "a"}, said]}, "messages"),
        ("/score", {"text_1": "a", "text_2": ["a", long]}, "text_2[1]"),
        ("/predict", {"inputs": ["a", long], "raw_scores": True}, "inputs"),
        ("/v1/score/evaluation", {"messages": ["a", long]}, "messages[1]"),
        ("/reward", {"prompt": "a", "response": long}, "response"),
    ):  # fmt: skip
        answer = http.post(path, json=body)
        assert answer.status_code == 413
        assert f"`{name}`, its prompt and its tools have " in error_of(answer)["message"]


def test_a_prompt_that_is_repeated_counts_for_each_text() -> None:
    http = client(limits=HttpLimits(max_body_bytes=5000, max_texts=1000))
    assert http.post("/score", json={"text_1": "a" * 900, "text_2": ["b"] * 5}).status_code == 200
    answer = http.post("/score", json={"text_1": "a" * 900, "text_2": ["b"] * 6})
    assert answer.status_code == 413
    assert "counting a prompt" in error_of(answer)["message"]


def test_the_bytes_of_a_body_are_counted_as_they_come_whatever_was_announced() -> None:
    app = build_app(zeros, ready, HttpLimits(max_body_bytes=100, body_timeout_s=0.2))
    read = 0

    async def post(chunk: bytes, pause_s: float, announced: bytes) -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            nonlocal read
            read += len(chunk)
            await asyncio.sleep(pause_s)
            return {"type": "http.request", "body": chunk, "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", announced)]
        scope = {"type": "http", "method": "POST", "path": "/reward", "query_string": b"", "root_path": "",
                 "headers": headers}  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 30)
        return int(sent[0]["status"])

    # A body without end: read on for a while, so that its caller hears the answer, and not for ever.
    assert asyncio.run(post(b"x" * 10, 0, b"5")) == 413
    assert 100 < read <= 500
    assert asyncio.run(post(b"", 0.01, b"5")) == 408


@pytest.fixture
def port() -> Iterator[int]:
    """A real server on a free port: what only a real connection shows."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    app = build_app(zeros, ready, HttpLimits(max_body_bytes=1 << 20))
    server = uvicorn.Server(uvicorn.Config(app, port=free, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield free
    server.should_exit = True
    thread.join()


def test_a_real_connection_hears_the_answer_to_a_chunked_body_and_to_one_too_large(port: int) -> None:
    def chunked(*chunks: bytes) -> bytes:
        head = b"POST /reward HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        parts = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
        return head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + parts + b"0\r\n\r\n"

    def answer_to(request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(request)
            received = b""
            while piece := connection.recv(65536):
                received += piece
            return received

    body = json.dumps(SAMPLE).encode()
    assert answer_to(chunked(body[:5], body[5:])).endswith(b"\r\n\r\n0.0")
    assert answer_to(chunked(*[b"x" * 65536] * 40)).startswith(b"HTTP/1.1 413")
    assert answer_to(chunked(b"{")).startswith(b"HTTP/1.1 422")
