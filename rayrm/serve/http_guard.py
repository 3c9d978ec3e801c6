"""What stands before every HTTP route: the token, the limit on bodies, and an answer for whatever fails.

Plain ASGI, so that it holds for each path: routes, the OpenAPI page, paths that do not exist. Every error is
`{"error": {"type", "message", ...}}`. No log line here holds anything that a caller sent: neither the token,
nor a text, nor an exception's message, which may quote one. No Ray, no torch.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrm.errors import ConfigError

logger = logging.getLogger(__name__)

# How much of a body that is too large is still read and thrown away: a client that is cut off while it sends
# sees a broken connection and never the answer.
_DRAINED = 4
_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


def token_sha256_in(variable: str) -> str | None:
    """The SHA-256 (hexadecimal) of the token in an environment variable; None: there is none.

    White space around it is no part of the token (a file or a secret often ends with a newline). Raises
    ConfigError for a token that no caller could send in a header.
    """
    token = os.environ.get(variable, "").strip()
    if not token:
        return None
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(
            f"the token in `{variable}` holds white space, a control character or one beyond ASCII, which a "
            f'header cannot carry. Type export {variable}="$(openssl rand -hex 32)".'
        )
    return hashlib.sha256(token.encode()).hexdigest()


def error_response(
    status: int, kind: str, message: str, headers: Mapping[str, str] | None = None, **more: Any
) -> JSONResponse:
    """The one shape of an error. `kind`: what a program tells errors apart by; `more`: figures beside it."""
    return JSONResponse({"error": {"type": kind, "message": message, **more}}, status, headers)


def log_failure(error: BaseException) -> None:
    """One log line with the kinds and the places of `error` and its causes, and without their messages."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(lines) < 8:
        lines.append(f"{type(cause).__name__}\n{''.join(traceback.format_tb(cause.__traceback__))}")
        cause = cause.__cause__ or cause.__context__
    logger.error("a request failed: %s", "caused by ".join(lines))


def failure_response() -> JSONResponse:
    """What a caller learns of an error that is the service's own."""
    return error_response(
        503,
        "unavailable",
        "the service failed on this request, and its log says where. Send the request again later.",
        {"Retry-After": "1"},
    )


class LastResort:
    """Answers 503 for an exception that nothing else took. Never a bare 500, never a trace on the wire."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # whatever it is, its caller gets an answer
            log_failure(error)
            if not started:
                await failure_response()(scope, receive, send)


class TokenGate:
    """Lets a request pass whose token has the SHA-256 `token_sha256` (hexadecimal); all others get 401.

    `Authorization: Bearer TOKEN`, or Basic with the token as the password, which clients that can set no
    header (OpenRLHF, slime) send for `http://any:TOKEN@host/...`.
    """

    def __init__(self, app: ASGIApp, token_sha256: str) -> None:
        self._app = app
        self._digest = token_sha256.lower().encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._passes(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await error_response(
                401,
                "unauthorized",
                "this service needs its token. Send the header `Authorization: Bearer TOKEN`, or the URL "
                "http://any:TOKEN@host/... where no header can be set.",
                {"WWW-Authenticate": 'Bearer realm="rayrm", Basic realm="rayrm"'},
            )(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _passes(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        presented = _presented(values[0]) if len(values) == 1 else b""
        digest = hashlib.sha256(presented).hexdigest().encode("ascii")
        return hmac.compare_digest(digest, self._digest)


def _presented(authorization: bytes) -> bytes:
    scheme, _, rest = authorization.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


class BodyLimit:
    """Reads a request's body whole, counting its bytes as they come, before the route begins.

    413 beyond `max_body_bytes`, whatever the length that was announced; 408 where it is not there after
    `body_timeout_s`; 415 for a body that is not plain JSON by its headers.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max = max_body_bytes
        self._timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        refusal = _content_refusal(Headers(scope=scope))
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(receive)
        except TimeoutError:
            refusal, body = self._too_slow(), b""
        if body is None:
            return  # the caller left
        if refusal is None and len(body) > self._max:
            refusal = self._too_large()
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replayed, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; of one that is too large its beginning, longer than the limit; None: the caller left."""
        chunks, kept, seen = [], 0, 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            seen += len(chunk)
            if kept <= self._max:
                chunks.append(chunk)
                kept += len(chunk)
            if not message.get("more_body", False) or seen > _DRAINED * self._max:
                return b"".join(chunks)

    def _too_large(self) -> JSONResponse:
        return error_response(
            413,
            "too_large",
            f"the body is larger than {self._max} bytes, which is the limit of this service. Send fewer "
            "texts in each request.",
            limit=self._max,
        )

    def _too_slow(self) -> JSONResponse:
        return error_response(
            408,
            "too_slow",
            f"the body was not complete after {self._timeout_s:g} seconds. Send it again, or less at once.",
            {"Connection": "close"},
        )


def _content_refusal(headers: Headers) -> JSONResponse | None:
    media, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.lower().replace(" ", "").replace('"', "")
    if media.strip().lower() != "application/json" or (
        "charset=" in charset and "charset=utf-8" not in charset
    ):
        return error_response(
            415,
            "unsupported_media_type",
            "the body must be JSON in UTF-8 and say so. Send the header `Content-Type: application/json`.",
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        return error_response(
            415,
            "unsupported_media_type",
            "a compressed body is not read. Send it without `Content-Encoding`.",
        )
    return None
