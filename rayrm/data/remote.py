"""Files behind URLs: pyarrow's filesystem where it knows the scheme (s3, gs, hdfs, abfs), else fsspec's.

S3 is reached with what the URL says (`s3://key:secret@bucket/path?region=..&endpoint_override=..&scheme=..&
anonymous=true`), else with the environment's AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ... of the
process that planned: they travel with the pieces, so that workers elsewhere read the same. Nothing that a
message, a name or a repr shows holds credentials. What cannot be reached is a `DataError` that says why.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from rayrm.data.pieces import SUFFIXES, Remote, kind_of
from rayrm.errors import DataError
from rayrm.urls import MASK, masked

_ARROW_SCHEMES = ("gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "file")
_S3_OPTIONS = ("region", "endpoint_override", "scheme", "anonymous")
_S3_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
_NO_ACCESS = re.compile(
    r"ACCESS_DENIED|ACCESS_KEY_ID|SIGNATURE|EXPIRED_TOKEN|\b40[13]\b|forbidden|unauthori[sz]ed|permission|"
    r"access token|AuthenticationException",
    re.I,
)
_NO_NETWORK = re.compile(
    r"NETWORK_CONNECTION|could ?n.t connect|cannot connect|could not resolve|timed? ?out|curlcode|"
    r"name or service|offline mode",
    re.I,
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|bucket '?[^ ]*'? not found", re.I)
# What filesystems of fsspec raise that is no OSError.
_FOREIGN = (
    ("aiohttp", "ClientError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
)
_SHOWN = 500
_GLOB = re.compile(r"[*\[]")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that was found: its name without credentials, and what its filesystem tells of it."""

    remote: Remote
    name: str
    size: int | None
    mtime_ns: int | None


def find_remote(url: str) -> list[RemoteFile]:
    """The data files that a URL of a file, directory or glob names, by name. Raises `DataError` for none."""
    if MASK in url:
        raise DataError(
            f"{masked(url)} has had its credentials masked when it was written down; type them again, or set "
            "them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and leave them out of the URL"
        )
    with readable_errors(url):
        settings = s3_environment()
        filesystem, path = connect(url, settings)
        entries = _arrow_entries(filesystem, path) if _is_arrow(filesystem) else _entries(filesystem, path)
    if entries is None:
        raise DataError(f"{masked(url)} does not exist{_missing_parent(filesystem, path)}; correct the URL")
    found = [
        RemoteFile(Remote(url, where, settings), _name(url, path, where), size, mtime)
        for where, size, mtime in sorted(entries)
    ]
    if not found:
        raise DataError(
            f"{masked(url)} names no data file; they end in {', '.join(SUFFIXES)}; correct the URL, or "
            "rename or convert the files"
        )
    return found


def s3_environment() -> tuple[tuple[str, str], ...]:
    """What this process's environment says of S3, for whoever connects elsewhere."""
    return tuple((name, os.environ[name]) for name in _S3_ENVIRONMENT if os.environ.get(name))


def open_remote(remote: Remote, *, seek: bool) -> Any:
    """The file's bytes as they are, for pyarrow or a buffered reader; `seek`: from any place."""
    filesystem, _ = connect(remote.url, remote.settings)
    if _is_arrow(filesystem):
        if seek:
            return filesystem.open_input_file(remote.path)
        return filesystem.open_input_stream(remote.path, compression=None)
    if not _is_http(filesystem):
        return pa.PythonFile(filesystem.open(remote.path, "rb"), mode="r")
    if not seek:
        return pa.PythonFile(filesystem.open(remote.path, "rb", block_size=0), mode="r")
    if serves_ranges(remote):
        return pa.PythonFile(filesystem.open(remote.path, "rb"), mode="r")
    return pa.BufferReader(filesystem.cat_file(remote.path))


def serves_ranges(remote: Remote) -> bool:
    """Whether a part of the file can be had without the whole: of HTTP servers some cannot."""
    filesystem, _ = connect(remote.url, remote.settings)
    return not _is_http(filesystem) or bool(filesystem.info(remote.path).get("partial"))


@contextmanager
def readable_errors(url: str) -> Iterator[None]:
    """What goes wrong inside with a remote file, as a `DataError` that names the URL and what to type."""
    try:
        yield
    except DataError:
        raise
    except _failures() as error:
        shown, whole = masked(url), _whole_message(error)
        said = _without_credentials(whole, url)
        raise DataError(f"{shown} {_what_to_type(url, said, error)} ({said})") from None


def _failures() -> tuple[type[BaseException], ...]:
    """Asked when something was raised: by then the filesystem's own packages are loaded."""
    return (
        OSError,
        EOFError,
        ValueError,
        ImportError,
        asyncio.TimeoutError,
        pa.ArrowException,
        *(getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules),
    )


def _what_to_type(url: str, said: str, error: BaseException) -> str:
    scheme = urlsplit(url).scheme
    if isinstance(error, ImportError):
        return "needs a package that is not installed: install the one named here, on every node"
    if "libjvm" in said or "libhdfs" in said:
        return "needs Hadoop's client: set JAVA_HOME, HADOOP_HOME and CLASSPATH, on every node"
    if "Protocol not known" in said:
        return f"has a scheme ({scheme}) that neither pyarrow nor fsspec knows; correct the URL"
    if _NO_BUCKET.search(said):
        return "is in a bucket that does not exist; correct the bucket's name, or its region"
    if _NO_ACCESS.search(said):
        return "was refused to these credentials; " + (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) of an account that may "
            "list and read it, or add ?anonymous=true for a public bucket"
            if scheme.startswith("s3")
            else "give those of an account that may read it"
        )
    if _NO_NETWORK.search(said):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        told = f" and AWS_ENDPOINT_URL ({masked(endpoint)})" if scheme.startswith("s3") and endpoint else ""
        return f"cannot be reached; check the network and the URL's host{told}"
    if isinstance(error, FileNotFoundError):
        return "does not exist; correct the URL" + (
            "; memory:// holds only what this same process wrote" if scheme == "memory" else ""
        )
    return "cannot be read; it is damaged, cut short or not what its name says; copy it there again"


def _whole_message(error: BaseException) -> str:
    """The error with its causes: fsspec says "not found" of a refusal, and keeps the refusal behind it."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        parts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "; caused by ".join(parts)


def _without_credentials(text: str, url: str) -> str:
    shown = masked(text.replace(url, masked(url)))
    parts = urlsplit(url)
    for secret in (parts.password, parts.username):
        for form in filter(None, {secret, unquote(secret or "")}):
            shown = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", MASK, shown)
    return " ".join(shown.split())[:_SHOWN]


def _missing_parent(filesystem: Any, path: str) -> str:
    if _is_arrow(filesystem) and filesystem.type_name == "s3":
        bucket = path.partition("/")[0]
        if filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            return f" (nor does the bucket {bucket})"
    return ""


@functools.lru_cache(maxsize=16)
def connect(url: str, settings: tuple[tuple[str, str], ...]) -> tuple[Any, str]:
    """The filesystem of a URL, and the URL's path in it."""
    scheme = urlsplit(url).scheme.lower()
    if scheme in ("s3", "s3a", "s3n"):
        return _s3(url, dict(settings))
    if scheme in _ARROW_SCHEMES:
        if scheme in ("gs", "gcs") and "retry_limit_seconds" not in url:  # its default is 15 minutes
            url += f"{'&' if '?' in url else '?'}retry_limit_seconds=60"
        filesystem, path = fs.FileSystem.from_uri(url)
        return filesystem, path
    import fsspec

    found, path = fsspec.core.url_to_fs(url)
    return found, path


def _s3(url: str, environment: dict[str, str]) -> tuple[Any, str]:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    for name in options:
        if name not in _S3_OPTIONS:
            raise DataError(
                f"{masked(url)} has the option `{name}`; an s3 URL takes {', '.join(_S3_OPTIONS)}; correct it"
            )
    bucket = parts.netloc.rpartition("@")[2]
    if not bucket:
        raise DataError(f"{masked(url)} names no bucket; type s3://bucket/path")
    endpoint = (
        options.get("endpoint_override")
        or environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
    )
    known: dict[str, Any] = {}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        known |= {
            "endpoint_override": host.rstrip("/"),
            "scheme": options.get("scheme") or scheme or "https",
        }
    region = options.get("region") or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        region = fs.resolve_s3_region(bucket)
    if region:
        known["region"] = region
    if options.get("anonymous", "").lower() in ("true", "1"):
        known["anonymous"] = True
    elif parts.username:
        known |= {"access_key": unquote(parts.username), "secret_key": unquote(parts.password or "")}
    elif environment.get("AWS_ACCESS_KEY_ID"):
        known |= {
            "access_key": environment["AWS_ACCESS_KEY_ID"],
            "secret_key": environment.get("AWS_SECRET_ACCESS_KEY", ""),
            "session_token": environment.get("AWS_SESSION_TOKEN"),
        }
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=4)
    filesystem = fs.S3FileSystem(retry_strategy=retries, connect_timeout=10, request_timeout=60, **known)
    return filesystem, f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/")


def _is_arrow(filesystem: Any) -> bool:
    return isinstance(filesystem, fs.FileSystem)


def _is_http(filesystem: Any) -> bool:
    return not _is_arrow(filesystem) and "http" in filesystem.protocol


_Entry = tuple[str, int | None, int | None]


def _arrow_entries(filesystem: Any, path: str) -> list[_Entry] | None:
    if _GLOB.search(path):
        fixed = path[: _GLOB.search(path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        pattern = _pattern(path)
        selector = fs.FileSelector(fixed, recursive="/" in path[len(fixed) + 1 :])
        infos = [
            info
            for info in filesystem.get_file_info(selector)
            if pattern.fullmatch(info.path) and "/." not in info.path[len(fixed) :]
        ]
    else:
        [info] = filesystem.get_file_info([path])
        if info.type == fs.FileType.NotFound:
            return None
        infos = [info]
        if info.type == fs.FileType.Directory:
            infos = [
                entry
                for entry in filesystem.get_file_info(fs.FileSelector(path, recursive=True))
                if _is_data(entry.path[len(path) :])
            ]
    return [
        (info.path, info.size, info.mtime_ns)
        for info in infos
        if info.type == fs.FileType.File and info.path.endswith(SUFFIXES)
    ]


def _entries(filesystem: Any, path: str) -> list[_Entry] | None:
    if _GLOB.search(path):
        found = [info for where, info in filesystem.glob(path, detail=True).items() if "/." not in where]
    elif not kind_of(path).endswith(SUFFIXES) and filesystem.isdir(path):
        found = [
            info
            for where, info in filesystem.find(path, detail=True).items()
            if _is_data(where[len(path.rstrip("/")) :])
        ]
    else:
        found = [filesystem.info(path)]
    return [
        (info["name"], info.get("size"), _mtime_ns(info))
        for entry in found
        if entry["type"] == "file" and kind_of(entry["name"]).endswith(SUFFIXES)
        for info in [entry if entry.get("size") is not None else filesystem.info(entry["name"])]
    ]


def _is_data(below: str) -> bool:
    return not any(part.startswith((".", "_")) for part in below.strip("/").split("/"))


def _mtime_ns(info: dict[str, Any]) -> int | None:
    """When a file was last changed, under any of the names that fsspec's filesystems have for it."""
    for name in ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"):
        match info.get(name):
            case str(text) if name == "Last-Modified":
                return int(parsedate_to_datetime(text).timestamp() * 1e9)
            case datetime() as time:
                return int(time.timestamp() * 1e9)
            case int() | float() as seconds:
                return int(seconds * 1e9)
    return None


def _pattern(glob: str) -> re.Pattern[str]:
    """`*` within a name, `**/` any directories, `[..]` a class of characters."""
    translated = re.escape(glob).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.compile(re.sub(r"\\\[(!?)(.*?)\\\]", lambda m: f"[{'^' if m[1] else ''}{m[2]}]", translated))


def _name(url: str, path: str, where: str) -> str:
    """What messages call the file `where`, found by a URL whose path in its filesystem is `path`."""
    if "://" in where:
        return masked(where)
    whole = url.partition("?")[0].rstrip("/")
    stem = (
        whole[: -len(path.rstrip("/"))] if whole.endswith(path.rstrip("/")) else urlsplit(url).scheme + "://"
    )
    return masked(stem + where)
