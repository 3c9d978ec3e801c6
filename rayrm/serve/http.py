"""The HTTP application: `build_app` turns a `score` function into the routes of `protocols.py`.

For callers outside Ray; inside a cluster `RewardClient` is faster. What each status means: 401 no token, 404
an unknown path or model, 409 another version than the pinned one, 413 a limit, 415 no JSON, 422 a request
that cannot be scored, 429 a full queue, 503 no answer now; the last two say in `Retry-After` when to come
back. An answer's headers tell the version (`Rayrm-Version`) and how many texts were cut (`Rayrm-Truncated`),
whatever its shape. No Ray, no torch: the service hands itself in as a function.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, get_args

from fastapi import Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from rayrm.errors import (
    ConfigError,
    OverloadedError,
    RayrmError,
    RewardUnavailableError,
    ScoreError,
    UnknownModelError,
    VersionError,
)
from rayrm.serve.http_guard import (
    BodyLimit,
    LastResort,
    TokenGate,
    error_response,
    failure_response,
    log_failure,
)
from rayrm.serve.http_limits import HttpLimits, TooLargeError, check_lengths, within_limits
from rayrm.serve.protocols import ROUTES
from rayrm.serve.request import (
    ScoreRequest,
    ScoreResult,
    Truncation,
    check_none_refused,
    check_truncation,
)
from rayrm.serve.wire import WireShape, check_characters, choose_shape, read_json
from rayrm.settings import nearest

Score = Callable[[ScoreRequest], Awaitable[ScoreResult]]
Status = Callable[[], Awaitable[dict[str, Any]]]

_STATUS_TIMEOUT_S = 5.0
_LARGE_BODY = 1 << 18  # bytes; reading more takes long enough for other requests to notice
_OF_NO_TOKEN = hashlib.sha256(b"").hexdigest()
_LEFT = 499  # nobody reads it: nginx's number for a caller that went away
_QUERY_NAMES = ("model", "truncation", "version")
_QUERY_PARAMETERS = [
    {
        "name": name,
        "in": "query",
        "required": False,
        "schema": {"type": "string"} | ({"enum": list(get_args(Truncation))} if name == "truncation" else {}),
        "description": "As the field of that name of /v1/score, for clients that can only set a URL.",
    }
    for name in _QUERY_NAMES
]
_ERRORS = {
    401: "no token, or a wrong one",
    404: "a model that the service does not have",
    409: "the pinned version does not answer",
    413: "a body, a text or a number of texts beyond the service's limits",
    415: "a body that is not JSON by its headers",
    422: "a request that cannot be scored; the message says what to change",
    429: "the queue is full; Retry-After says when to come back",
    503: "no answer now; Retry-After says when to come back",
}


def build_app(
    score: Score,
    status: Status,
    limits: HttpLimits | None = None,
    token_sha256: str | None = None,
) -> FastAPI:
    """The application. `token_sha256`: the SHA-256 of the token, hexadecimal; every path needs it then.

    `score` raises rayrm's errors as they are (not inside another error): their messages go to the caller. It
    is cancelled when the caller leaves. `status` gives `{"ready": bool, "reason": str, "models": {name:
    {"version": ..., ...}}}`; only `ready` is required. Raises ConfigError for a digest that is none.
    """
    limits = limits or HttpLimits()
    if token_sha256 is not None and (
        not re.fullmatch(r"[0-9a-fA-F]{64}", token_sha256) or token_sha256.lower() == _OF_NO_TOKEN
    ):
        raise ConfigError(
            "`token_sha256` must be the SHA-256 of the token, 64 hexadecimal digits, and the token not "
            "empty. Make it with hashlib.sha256(token.encode()).hexdigest()."
        )
    # FastAPI's own page loads its scripts from a CDN, which a cluster may not reach, and which would run in
    # the browser of somebody who sends a token.
    app = FastAPIOffline(
        redoc_url=None,
        title="rayrm reward service",
        description=(__doc__ or "").partition("\n")[2],
        redirect_slashes=False,  # a redirect would repeat the caller's Host header
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token_sha256 else [],
    )
    for path, shapes in ROUTES.items():
        app.add_api_route(
            path,
            _score_route(shapes, score, limits),
            methods=["POST"],
            response_model=None,
            summary=" or ".join(shape.title for shape in shapes),
            description="\n\n".join(shape.description for shape in shapes),
            operation_id="score" + re.sub(r"\W+", "_", path).rstrip("_"),
            responses={code: {"description": text} for code, text in _ERRORS.items()},
            openapi_extra=_openapi(shapes),
        )
    _add_status_routes(app, status)
    app.add_exception_handler(HTTPException, _path_error)
    app.add_middleware(BodyLimit, limits.max_body_bytes, limits.body_timeout_s)
    if token_sha256:
        app.add_middleware(TokenGate, token_sha256)
    app.add_middleware(LastResort)  # the last one added is the first to run
    return app


def _score_route(
    shapes: Sequence[WireShape], score: Score, limits: HttpLimits
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            content = await request.body()
            given = (content, request.query_params.multi_items(), shapes, limits)
            large = len(content) > _LARGE_BODY
            shape, body, wanted = await run_in_threadpool(_read, *given) if large else _read(*given)
            try:
                result = await _score_while_heard(score, wanted, request)
            except ScoreError as error:
                raise type(error)(shape.in_callers_words(str(error), body, len(wanted.inputs))) from error
            if result is None:
                return Response(status_code=_LEFT)
            _check_result(wanted, result)
            for place, said in result.errors.items():
                result.errors[place] = shape.in_callers_words(said, body, len(wanted.inputs))
            headers = {"Rayrm-Version": result.version, "Rayrm-Truncated": str(len(result.truncated))}
            return JSONResponse(shape.to_answer(body, result), headers=headers)
        except Exception as error:  # each kind has its status, and the rest is the service's own failure
            return _error_answer(error)

    return answer


def _read(
    content: bytes,
    query: Sequence[tuple[str, str]],
    shapes: Sequence[WireShape],
    limits: HttpLimits,
) -> tuple[WireShape, BaseModel, ScoreRequest]:
    fields = read_json(content)
    shape = choose_shape(shapes, fields)
    check_lengths(fields, shape, limits)
    check_characters(content, fields, but=shape.each_alone)
    body = shape.parse(fields)
    wanted = _with_query(shape.to_request(body), query)
    if not wanted.partial:
        check_none_refused(wanted.inputs)
    inputs = within_limits(wanted, limits, lambda place: shape.name_of(fields, place, len(wanted.inputs)))
    return shape, body, dataclasses.replace(wanted, inputs=inputs)


def _with_query(wanted: ScoreRequest, query: Sequence[tuple[str, str]]) -> ScoreRequest:
    """`?model=`, `?truncation=` and `?version=` for what the body leaves open. Raises ScoreError."""
    named: dict[str, Any] = dict(query)
    for name, value in query:
        if name not in _QUERY_NAMES:
            raise ScoreError(
                f"the URL's parameter `{name[:60]}` is none of {', '.join(_QUERY_NAMES)}."
                f"{nearest(name[:60], _QUERY_NAMES) or ' Remove it.'}"
            )
        of_body = None if name == "model" and wanted.any_model else getattr(wanted, name)
        if of_body not in (None, value):
            raise ScoreError(
                f"the body asks for the {name} {of_body[:60]!r} and the URL (`?{name}=`) for {value[:60]!r}, "
                "which are not the same. Leave it out of one of them."
            )
    if len(named) != len(query):
        raise ScoreError("a parameter of the URL is given twice. Keep one.")
    check_truncation(named.get("truncation"))
    # A URL is written for this service, where a body's model may be what a framework puts there by itself.
    return dataclasses.replace(wanted, any_model=wanted.any_model and "model" not in named, **named)


async def _score_while_heard(score: Score, wanted: ScoreRequest, request: Request) -> ScoreResult | None:
    """The result; None when the caller left first, and then scoring is cancelled."""
    scoring = asyncio.ensure_future(score(wanted))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({scoring, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not scoring.done():
            return None
        if scoring.cancelled():
            raise RuntimeError("scoring was cancelled by the service itself")
        return scoring.result()
    finally:
        leaving.cancel()
        if not scoring.done():
            scoring.add_done_callback(_forget)
            scoring.cancel()


async def _left(request: Request) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # a server that cannot tell any more: as good as gone
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _forget(scoring: asyncio.Future[ScoreResult]) -> None:
    if not scoring.cancelled():
        scoring.exception()  # asked for, or asyncio warns of it


def _check_result(wanted: ScoreRequest, result: ScoreResult) -> None:
    """A score that is missing or no number must not look like an answer: this is the service's own fault."""
    if len(result.scores) != len(wanted.inputs):
        raise RuntimeError("the service gave another number of scores than it was asked for")
    for place, value in enumerate(result.scores):
        if not math.isfinite(value) and not (wanted.partial and place in result.errors):
            raise RuntimeError("the service gave a score that is not finite")


def _error_answer(error: Exception) -> Response:
    message = str(error)
    match error:
        case TooLargeError():
            return error_response(413, "too_large", message)
        case UnknownModelError():
            return error_response(404, "unknown_model", message)
        case ScoreError() | ConfigError():
            return error_response(422, "invalid_request", message)
        case OverloadedError():
            wait = _retry_after(error.retry_after_s)
            return error_response(429, "overloaded", message, wait, retry_after_s=int(wait["Retry-After"]))
        case VersionError():
            return error_response(409, "wrong_version", message, served=error.served)
        case RewardUnavailableError():
            return error_response(503, "unavailable", message, _retry_after(1.0))
    log_failure(error)
    return failure_response()


def _retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds, at least 1: clients that read the header as an integer must not come back at once."""
    return {"Retry-After": str(max(1, math.ceil(seconds)) if math.isfinite(seconds) else 60)}


async def _path_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind, message = {
        404: ("not_found", "no such path. /docs lists the paths of this service."),
        405: ("method_not_allowed", "this path takes another method. /docs shows which."),
    }.get(error.status_code, ("invalid_request", "the request is not one this service can read."))
    return error_response(error.status_code, kind, message, error.headers)


def _add_status_routes(app: FastAPI, status: Status) -> None:
    async def told() -> dict[str, Any]:
        try:
            return await asyncio.wait_for(status(), _STATUS_TIMEOUT_S)
        except (RayrmError, TimeoutError) as error:
            said = str(error) if isinstance(error, RayrmError) else "no replica answers yet"
            return {"ready": False, "reason": said}
        except Exception as error:  # not ready, whatever the reason
            log_failure(error)
            return {"ready": False, "reason": "the service does not tell its state; its log says why"}

    @app.get("/health", summary="Whether this process answers")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="Whether requests are scored now", responses={503: {"description": "not yet"}})
    async def ready() -> Response:
        state = await told()
        return JSONResponse({"ready": True}) if state.get("ready") else _not_ready(state)

    @app.get("/v1/models", summary="The models and ensembles by name, and their versions")
    async def models() -> Response:
        state = await told()
        if "models" not in state:
            return _not_ready(state)
        listed = [
            {"id": name, "object": "model", "owned_by": "rayrm", **about}
            for name, about in state["models"].items()
        ]
        return JSONResponse({"object": "list", "data": listed})


def _not_ready(state: Mapping[str, Any]) -> Response:
    reason = state.get("reason") or "no model is loaded yet"
    return error_response(503, "unavailable", reason, _retry_after(1.0))


def _openapi(shapes: Sequence[WireShape]) -> dict[str, Any]:
    schemas = [shape.body.model_json_schema() for shape in shapes]
    examples = {name: {"value": body} for shape in shapes for name, body in shape.examples.items()}
    content = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}, "examples": examples}
    return {
        "parameters": _QUERY_PARAMETERS,
        "requestBody": {"required": True, "content": {"application/json": content}},
    }
