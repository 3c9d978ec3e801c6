"""The HTTP application: whatever arrives, a clear answer; nothing without the token, no secret in a log.

Arbitrary requests are in `test_http_fuzz.py`, the shapes of the protocols in `test_protocols.py`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from rayrm.errors import (
    ConfigError,
    ModelError,
    OverloadedError,
    RewardUnavailableError,
    ScoreError,
    UnknownModelError,
    VersionError,
)
from rayrm.serve.http import build_app
from rayrm.serve.http_guard import token_sha256_in
from rayrm.serve.http_limits import HttpLimits
from rayrm.serve.protocols import ROUTES
from rayrm.serve.request import ScoreRequest, ScoreResult
from tests.unit.test_protocols import ready

TOKEN = "s3cret-token"
DIGEST = hashlib.sha256(TOKEN.encode()).hexdigest()
SAMPLE = {"prompt": "a", "response": "b"}
JSON = {"Content-Type": "application/json"}


async def zeros(wanted: ScoreRequest) -> ScoreResult:
    return ScoreResult([0.0] * len(wanted.inputs), "v1", "reward")


def client(**kwargs: Any) -> TestClient:
    return TestClient(build_app(kwargs.pop("score", zeros), kwargs.pop("status", ready), **kwargs))


def error_of(answer: Any) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    ((name, error),) = answer.json().items()
    assert name == "error"
    assert error["type"]
    assert error["message"]
    return dict(error)


def paths_of(app: FastAPI) -> list[tuple[str, str]]:
    """Every route of the application, those of the OpenAPI page included."""
    pairs = [(method, route.path) for route in app.routes for method in getattr(route, "methods", ())]
    assert {path for _, path in pairs} >= {
        *ROUTES,
        "/health",
        "/ready",
        "/v1/models",
        "/openapi.json",
        "/docs",
    }
    return pairs


@pytest.mark.parametrize("around", ["", "\n", " \t", "\r\n"])
def test_white_space_around_the_service_s_token_is_no_part_of_it(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOKEN", around + TOKEN + around)
    gate = client(token_sha256=token_sha256_in("TEST_TOKEN"))
    assert gate.get("/health", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    monkeypatch.setenv("TEST_TOKEN", around)
    assert token_sha256_in("TEST_TOKEN") is None


@pytest.mark.parametrize("token", ["two words", "a\tb", "clé", "a\x7fb", "one\ntwo"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOKEN", token)
    with pytest.raises(ConfigError, match=r'in `TEST_TOKEN`.*Type export TEST_TOKEN="\$\(openssl') as refused:
        token_sha256_in("TEST_TOKEN")
    assert token not in str(refused.value)


def test_no_route_answers_without_the_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = build_app(zeros, ready, token_sha256=DIGEST.upper())
    http = TestClient(app)
    basic = base64.b64encode(f"any:{TOKEN}".encode()).decode()
    wrong = ["", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, f"Token {TOKEN}",
             f"Bearer {DIGEST}", f"Basic {TOKEN}", "Basic Og==", "Basic !", f"Bearer {TOKEN}, Bearer x",
             "Bearer \xff\xfe"]  # fmt: skip
    script = ("GET", "/static-offline-docs/swagger-ui-bundle.js")
    for method, path in [
        *paths_of(app),
        script,
        ("GET", "/nowhere"),
        ("POST", "/v1/score/"),
        ("PUT", "/v1/score"),
    ]:
        for authorization in (None, *wrong):
            given = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
            answer = http.request(method, path, headers=given)
            assert answer.status_code == 401, (method, path, authorization)
            assert "Bearer" in answer.headers["WWW-Authenticate"]
            if method != "HEAD":
                assert error_of(answer)["type"] == "unauthorized"
        for authorization in (f"Bearer {TOKEN}", f"bearer  {TOKEN} ", f"Basic {basic}"):
            answer = http.request(method, path, headers={"Authorization": authorization})
            assert answer.status_code != 401, (method, path, authorization)
    twice = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {TOKEN}")]
    assert http.get("/health", headers=twice).status_code == 401
    assert TOKEN not in caplog.text
    assert basic not in caplog.text


def test_the_page_of_routes_loads_nothing_from_elsewhere() -> None:
    http = client()
    page = http.get("/docs").text
    loaded = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page)
    assert len(loaded) == 4  # style, icon, script, and what it shows
    for place in loaded:
        assert place.startswith("/")
        assert http.get(place).status_code == 200


def test_a_digest_that_is_none_is_refused_when_the_application_is_built() -> None:
    for digest in ("", "abc", TOKEN, DIGEST[:-1] + "g", hashlib.sha256(b"").hexdigest()):
        with pytest.raises(ConfigError, match="64 hexadecimal digits"):
            build_app(zeros, ready, token_sha256=digest)
    with pytest.raises(ConfigError, match=r"`max_texts` \(0\)"):
        HttpLimits(max_texts=0)


@pytest.mark.parametrize(
    ("raised", "status", "kind", "retry"),
    [
        (ScoreError("`x` (1): rule. Fix."), 422, "invalid_request", None),
        (ConfigError("`x` (1): rule. Fix."), 422, "invalid_request", None),
        (UnknownModelError("`x` (1): rule. Fix."), 404, "unknown_model", None),
        (OverloadedError("`x` (1): rule. Fix.", 0.01), 429, "overloaded", "1"),
        (OverloadedError("`x` (1): rule. Fix.", 2.2), 429, "overloaded", "3"),
        (OverloadedError("`x` (1): rule. Fix.", float("inf")), 429, "overloaded", "60"),
        (VersionError("`x` (1): rule. Fix.", "v9"), 409, "wrong_version", None),
        (RewardUnavailableError("`x` (1): rule. Fix."), 503, "unavailable", "1"),
    ],
)
def test_each_error_of_the_service_has_its_status_and_its_message(
    raised: Exception, status: int, kind: str, retry: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def score(wanted: ScoreRequest) -> ScoreResult:
        raise raised

    for path in ROUTES:
        answer = client(score=score).post(path, json=next(iter(ROUTES[path][0].examples.values())))
        assert answer.status_code == status
        error = error_of(answer)
        assert (error["type"], error["message"]) == (kind, "`x` (1): rule. Fix.")
        assert answer.headers.get("Retry-After") == retry
    assert error.get("served") == ("v9" if isinstance(raised, VersionError) else None)
    assert error.get("retry_after_s") == (int(retry or 0) if status == 429 else None)
    assert caplog.text == ""


def test_a_failure_of_the_service_is_a_503_and_its_trace_is_only_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    private = "a text of a caller"

    def deep() -> None:
        raise KeyError(private)

    async def chained(wanted: ScoreRequest) -> ScoreResult:
        try:
            deep()
        except KeyError as error:
            raise ModelError(private) from error
        raise AssertionError

    async def cancelled(wanted: ScoreRequest) -> ScoreResult:
        raise asyncio.CancelledError

    async def nothing(wanted: ScoreRequest) -> ScoreResult:
        return ScoreResult([], "v1")

    async def nan(wanted: ScoreRequest) -> ScoreResult:
        return ScoreResult([float("nan")], "v1")

    async def late(wanted: ScoreRequest) -> ScoreResult:
        raise TimeoutError

    for score in (chained, cancelled, nothing, nan, late):
        answer = client(score=score).post("/reward", json=SAMPLE)
        assert answer.status_code == 503
        assert error_of(answer)["type"] == "unavailable"
        assert int(answer.headers["Retry-After"]) >= 1
        assert private not in answer.text
        assert "Traceback" not in answer.text
    assert "in deep" in caplog.text
    assert "KeyError" in caplog.text
    assert private not in caplog.text


def test_a_partial_answer_may_lack_only_the_scores_it_explains() -> None:
    async def score(wanted: ScoreRequest) -> ScoreResult:
        return ScoreResult([1.0, float("nan")], "v1")

    assert client(score=score).post("/v1/score", json={"ids": [[1], [2]], "partial": True}).status_code == 503


def test_unknown_paths_and_methods_get_the_same_shape_of_error() -> None:
    http = client()
    assert error_of(http.get("/nowhere"))["type"] == "not_found"
    assert error_of(http.post("/v1/score/", json={}))["type"] == "not_found"
    answer = http.get("/v1/score")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST"
    assert error_of(answer)["type"] == "method_not_allowed"


def test_a_caller_that_leaves_ends_the_scoring_of_its_request(caplog: pytest.LogCaptureFixture) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def score(wanted: ScoreRequest) -> ScoreResult:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        raise AssertionError

    async def run() -> None:
        waiting = [{"type": "http.request", "body": json.dumps(SAMPLE).encode(), "more_body": False}]

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await began.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            return None

        scope = {"type": "http", "method": "POST", "path": "/reward", "query_string": b"", "root_path": "",
                 "headers": [(b"content-type", b"application/json")]}  # fmt: skip
        await asyncio.wait_for(build_app(score, ready)(scope, receive, send), 10)
        await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(run())
    assert caplog.text == ""


def test_health_is_always_told_and_readiness_as_the_service_says_it() -> None:
    async def loading() -> dict[str, Any]:
        return {"ready": False, "reason": "version v2 is being loaded"}

    async def broken() -> dict[str, Any]:
        raise RuntimeError("a secret")

    async def unavailable() -> dict[str, Any]:
        raise RewardUnavailableError("no application 'reward'")

    async def late() -> dict[str, Any]:
        raise TimeoutError

    for status, code, message in (
        (ready, 200, ""),
        (loading, 503, "is being loaded"),
        (broken, 503, "the service does not tell its state; its log says why"),
        (unavailable, 503, "no application 'reward'"),
        (late, 503, "no replica answers yet"),
    ):
        http = client(status=status)
        assert http.get("/health").json() == {"status": "alive"}
        answer = http.get("/ready")
        assert answer.status_code == code
        if code == 503:
            assert message in error_of(answer)["message"]
            assert answer.headers["Retry-After"] == "1"
            assert http.get("/v1/models").status_code == 503
    listed = client().get("/v1/models").json()
    assert listed["object"] == "list"
    assert listed["data"][0]["id"] == "reward"
    assert listed["data"][0]["version"] == "0123abcd"


def test_the_openapi_page_tells_every_route_with_an_example_and_the_token() -> None:
    page = (
        client(token_sha256=DIGEST).get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    )
    assert page["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert set(page["paths"]) == {*ROUTES, "/health", "/ready", "/v1/models"}
    for path, shapes in ROUTES.items():
        route = page["paths"][path]["post"]
        content = route["requestBody"]["content"]["application/json"]
        named = {name: body for shape in shapes for name, body in shape.examples.items()}
        assert {name: shown["value"] for name, shown in content["examples"].items()} == named
        assert {"401", "413", "422", "429", "503"} <= set(route["responses"])
        assert {parameter["name"] for parameter in route["parameters"]} == {"model", "truncation", "version"}
    assert len({route["operationId"] for path in page["paths"].values() for route in path.values()}) == len(
        page["paths"]
    )
    assert "securitySchemes" not in client().get("/openapi.json").json().get("components", {})
