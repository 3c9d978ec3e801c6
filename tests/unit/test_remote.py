"""Files behind URLs: a real S3 server and a real HTTP server on this machine, read as local files are."""

from __future__ import annotations

import functools
import gzip
import http.server
import importlib.util
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrm.data.sources import Shard, plan_sources, read_work
from rayrm.errors import DataError
from rayrm.urls import masked
from tests.s3 import s3_server
from tests.tiny import tiny_rows

ROWS = tiny_rows(300)
SECRET = "aB3/x+Y9zsecret"


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=100)
    return bytes(sink.getvalue().to_pybytes())


def arrow_of(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


FILES = {
    "data/a.jsonl": lines_of(ROWS[:100]),
    "data/b.jsonl.gz": gzip.compress(lines_of(ROWS[100:200])),
    "data/deep/c.parquet": parquet_of(ROWS[200:]),
    "other/d.arrow": arrow_of(ROWS[:50]),
}
IGNORED = {"data/_state.json": b"{}", "data/README.md": b"no pairs", "data/.hidden.jsonl": b"{}"}


def contents(source: Any, max_rows: int | None = None) -> list[Any]:
    plan = plan_sources(source, max_rows=max_rows, name="train")
    pieces = [pickle.loads(pickle.dumps(work)) for work in plan.work]
    return [row.content for row in itertools.chain.from_iterable(map(read_work, pieces))]


def failure(source: str) -> str:
    with pytest.raises(DataError) as error:
        contents(source)
    return str(error.value)


@pytest.fixture(scope="module")
def filled_s3() -> Iterator[str]:
    with s3_server() as url:
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="user",
            aws_secret_access_key=SECRET,
        )
        client.create_bucket(Bucket="pairs")
        for key, body in (FILES | IGNORED).items():
            client.put_object(Bucket="pairs", Key=key, Body=body)
        yield url


@pytest.fixture
def s3(filled_s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's URL; the environment says where it is and who asks, as a user's does."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", filled_s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return filled_s3


class _Requests(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges where `ranges`; /private asks for a password."""

    ranges = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if "private" in self.path and "Authorization" not in self.headers:
            self.send_error(401)
        elif path.is_dir():
            super().do_GET()
        elif not path.is_file():
            self.send_error(404)
        else:
            content, status = path.read_bytes(), 200
            size = len(content)
            wanted = (
                re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.ranges else None
            )
            if wanted:
                first, last = int(wanted[1]), min(size - 1, int(wanted[2] or size - 1))
                content, status = content[first : last + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            if self.ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body:
                self.wfile.write(content)


class _WholeFilesOnly(_Requests):
    ranges = False


@pytest.fixture(params=[_Requests, _WholeFilesOnly], ids=["ranges", "whole"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    for key, body in (FILES | IGNORED | {"private/a.jsonl": FILES["data/a.jsonl"]}).items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(body)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(request.param, directory=str(tmp_path))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("url", "rows"),
    [
        ("s3://pairs/data/a.jsonl", ROWS[:100]),
        ("s3://pairs/data", ROWS),
        ("s3://pairs/data/*.jsonl*", ROWS[:200]),
        ("s3://pairs/data/**/*.parquet", ROWS[200:]),
        ("s3://pairs/**/[ab].jsonl*", ROWS[:200]),
        ("s3://pairs/other/d.arrow", ROWS[:50]),
    ],
)
def test_s3_files_directories_and_globs_are_read_in_order(url: str, rows: list[Any]) -> None:
    assert contents(url) == rows
    assert contents(url, max_rows=30) == rows[:30]


@pytest.mark.usefixtures("s3")
def test_a_piece_of_s3_is_small_and_knows_the_files_state() -> None:
    plan = plan_sources("s3://pairs/data", max_rows=None, name="train")
    assert plan.names == [f"s3://pairs/{key}" for key in sorted(FILES) if key.startswith("data")]
    for work in plan.work:
        assert isinstance(work, Shard)
        assert work.size == len(FILES[work.path.removeprefix("s3://pairs/")])
        assert work.mtime_ns
        assert len(pickle.dumps(work)) < 1000


def test_a_piece_is_read_in_a_process_that_has_no_settings(s3: str, tmp_path: Path) -> None:
    plan = plan_sources("s3://pairs/data", max_rows=None, name="train")
    (tmp_path / "work").write_bytes(pickle.dumps(plan.work))
    script = (
        "import pickle, sys; from rayrm.data.sources import read_work\n"
        "print(sum(1 for work in pickle.load(open(sys.argv[1], 'rb')) for _ in read_work(work)))"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "work")], env=bare, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "300", ran.stderr


def test_an_s3_url_may_say_everything_itself(
    s3: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    host = s3.removeprefix("http://")
    url = f"s3://user:{SECRET.replace('/', '%2F')}@pairs/data?endpoint_override={host}&scheme=http"
    plan = plan_sources(url, max_rows=None, name="train")
    assert contents(url) == ROWS
    shown = f"{plan!r} {[row.where for work in plan.work for row in read_work(work)]}"
    assert "s3://***@pairs/data/a.jsonl" in shown
    assert "x+Y9zsecret" not in shown
    said = failure(url.replace("/data?", "/nothing?"))
    assert "x+Y9zsecret" not in said
    assert "s3://***@pairs/nothing" in said
    assert failure(masked(url)).startswith("s3://***@pairs/data?endpoint_override")
    assert "x+Y9zsecret" not in "".join(capfd.readouterr())


def test_what_s3_lacks_is_named(s3: str) -> None:
    assert "s3://pairs/data/z.jsonl does not exist; correct" in failure("s3://pairs/data/z.jsonl")
    assert "nor does the bucket nobody" in failure("s3://nobody/a.jsonl")
    assert "bucket that does not exist" in failure("s3://nobody/data/*.jsonl")
    assert "names no data file" in failure("s3://pairs/data/*.csv")
    assert "has the option `regio`" in failure("s3://pairs/data?regio=a")


def test_refused_credentials_say_what_to_set(s3: str) -> None:
    import requests

    requests.post(f"{s3}/moto-api/reset-auth", data="0", timeout=10)
    try:
        said = failure("s3://pairs/data/a.jsonl") + failure("s3://pairs/data/*.jsonl")
    finally:
        requests.post(f"{s3}/moto-api/reset-auth", data="inf", timeout=10)
    assert said.count("set AWS_ACCESS_KEY_ID") == 2
    assert said.count("s3://pairs/data/") >= 2
    assert SECRET not in said


def test_no_network_names_the_endpoint(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "cannot be reached" in failure("s3://pairs/data/a.jsonl")
    assert "AWS_ENDPOINT_URL (http://127.0.0.1:9)" in failure("s3://pairs/data/a.jsonl")


def test_a_file_that_is_cut_short_there_is_named(s3: str) -> None:
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    client.put_object(Bucket="pairs", Key="broken/a.jsonl.gz", Body=FILES["data/b.jsonl.gz"][:-50])
    client.put_object(Bucket="pairs", Key="broken/b.parquet", Body=b"PAR1 or so")
    assert "s3://pairs/broken/a.jsonl.gz" in failure("s3://pairs/broken/*.gz")
    assert "cut short" in failure("s3://pairs/broken/*.gz")
    assert "s3://pairs/broken/b.parquet" in failure("s3://pairs/broken/b.parquet")


def test_http_files_directories_and_globs_are_read(web: str) -> None:
    for key, rows in (
        ("data/a.jsonl", ROWS[:100]),
        ("data/b.jsonl.gz", ROWS[100:200]),
        ("data/deep/c.parquet", ROWS[200:]),
        ("other/d.arrow", ROWS[:50]),
        ("data/", ROWS),
        ("data/*.jsonl*", ROWS[:200]),
        ("data/a.jsonl?download=true", ROWS[:100]),
    ):
        assert contents(f"{web}/{key}") == rows, key
    assert contents(f"{web}/data/deep/c.parquet", max_rows=7) == ROWS[200:207]


def test_http_refusals_name_the_url_without_its_password(web: str) -> None:
    assert f"{web}/data/z.jsonl does not exist" in failure(f"{web}/data/z.jsonl")
    assert "was refused to these credentials" in failure(f"{web}/private/a.jsonl")
    there = web.replace("://", f"://user:{SECRET.replace('/', '%2F')}@")
    assert contents(f"{there}/private/a.jsonl") == ROWS[:100]
    said = failure(f"{there}/data/z.jsonl?token=abc123")
    assert "abc123" not in said
    assert "x+Y9zsecret" not in said
    assert "cannot be reached" in failure("http://127.0.0.1:9/a.jsonl")


def test_file_and_memory_urls_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(FILES["data/a.jsonl"])
    assert contents(f"file://{tmp_path}/a.jsonl") == ROWS[:100]
    memory = fsspec.filesystem("memory")
    for key in ("data/a.jsonl", "data/deep/c.parquet"):
        memory.pipe(f"/rayrm/{key}", FILES[key])
    assert contents("memory://rayrm/data") == ROWS[:100] + ROWS[200:]
    assert contents("memory://rayrm/data/*.jsonl") == ROWS[:100]
    assert "only what this same process wrote" in failure("memory://rayrm/nothing.jsonl")


def test_a_scheme_that_nothing_reads_is_refused() -> None:
    assert "neither pyarrow nor fsspec knows" in failure("s4://bucket/a.jsonl")


def test_other_filesystems_say_what_they_lack() -> None:
    bucket = "gs://anonymous@bucket/a.jsonl?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=1"
    assert "cannot be reached" in failure(bucket)
    assert "cannot be reached" in failure("hf://datasets/nobody/nothing/a.jsonl")
    if importlib.util.find_spec("paramiko") is None:
        assert "needs a package that is not installed" in failure("sftp://u:p@host/a.jsonl")
        assert '"paramiko"' in failure("sftp://u:p@host/a.jsonl")


@pytest.mark.skipif("JAVA_HOME" in os.environ, reason="Hadoop's client may be installed here")
def test_hdfs_without_hadoop_says_what_to_set() -> None:
    assert "set JAVA_HOME, HADOOP_HOME" in failure("hdfs://host:9000/a.jsonl")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:se/cr@et@bucket/a", "s3://***@et@bucket/a"),
        ("s3://bucket/a@b.jsonl", "s3://bucket/a@b.jsonl"),
        ("https://token@host/a?sig=abc&download=true", "https://***@host/a?sig=***&download=true"),
        ("abfs://container@account.dfs/a", "abfs://container@account.dfs/a"),
        ("see 's3://a:b@c/d' and http://x:y@z", "see 's3://***@c/d' and http://***@z"),
        ("/local/a@b?c=d", "/local/a@b?c=d"),
    ],
)
def test_masking_takes_credentials_and_nothing_else(text: str, shown: str) -> None:
    assert masked(text) == shown
