"""URLs as people may see them: credentials masked, in messages, logs, names and files alike."""

from __future__ import annotations

import re

_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]+://)([^\s'\"<>]*)")
# A secret that is not percent-encoded may hold slashes: after a colon everything up to the @ is one.
_USER = re.compile(r"^(?:[^/@:]*:[^@]*|[^/@]*)@")
_PARAMETER = re.compile(r"([?&])([^=&#]+)=([^&#]*)")
_HARMLESS = {
    "endpoint_override",
    "scheme",
    "region",
    "anonymous",
    "download",
    "revision",
    "retry_limit_seconds",
}
_CONTAINERS = ("abfs://", "abfss://")  # what stands before their @ is no user
MASK = "***"


def is_url(text: str) -> bool:
    """Whether a source's name is a URL; a drive letter is no scheme."""
    return _URL.match(text) is not None


def masked(text: str) -> str:
    """The text, with what may be secret in the URLs that it holds replaced by `***`."""
    return _URL.sub(_masked_url, text)


def _masked_url(found: re.Match[str]) -> str:
    scheme, rest = found[1], found[2]
    user = _USER.match(rest)
    if user and not (scheme.lower() in _CONTAINERS and ":" not in user[0]):
        rest = f"{MASK}@{rest[user.end() :]}"
    return scheme + _PARAMETER.sub(
        lambda part: part[0] if part[2] in _HARMLESS else f"{part[1]}{part[2]}={MASK}", rest
    )
