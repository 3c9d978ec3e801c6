"""Every source is planned and read so that each row comes once, at its own place, however it is cut."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrm.data import sources
from rayrm.data.sources import (
    RowChunk,
    Shard,
    SourceRow,
    load_hub_dataset,
    place_of,
    plan_sources,
    read_work,
    row_name,
)
from rayrm.errors import DataError, RowError
from tests.tiny import tiny_rows

ROWS = tiny_rows(1500)


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read_all(source: Any, *, max_parts: int = 4, max_rows: int | None = None) -> list[SourceRow]:
    plan = plan_sources(source, max_parts=max_parts, max_rows=max_rows, name="train")
    rows = itertools.chain.from_iterable(read_work(pickle.loads(pickle.dumps(work))) for work in plan.work)
    return sorted(rows, key=lambda row: (row.source, row.number))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some kilobytes are cut as gigabytes would be."""
    monkeypatch.setattr(sources, "BYTES_PER_PART", 2**12)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("max_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_each_row_is_read_once_in_the_files_order_whatever_the_cut(
    tmp_path: Path, suffix: str, max_parts: int
) -> None:
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=200)
    else:
        path.write_bytes(gzip.compress(lines_of(ROWS)) if suffix == ".jsonl.gz" else lines_of(ROWS))
    plan = plan_sources(path, max_parts=max_parts, max_rows=None, name="train")
    assert len(plan.work) == max_parts
    rows = read_all(path, max_parts=max_parts)
    assert [row.content for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(1500))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("max_rows", [1, 256, 700, 1500, 9999])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_max_rows_reads_the_first_rows_only(tmp_path: Path, suffix: str, max_rows: int) -> None:
    for index, rows in enumerate((ROWS[:600], ROWS[600:])):
        path = tmp_path / f"{index}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
        else:
            path.write_bytes(gzip.compress(lines_of(rows)))
    assert [row.content for row in read_all(tmp_path, max_rows=max_rows)] == ROWS[:max_rows]


def test_blank_lines_are_no_rows_but_keep_the_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines_of(ROWS[:1]) + b"\n  \r\n" + lines_of(ROWS[1:3]))
    rows = read_all(path)
    assert [row.content for row in rows] == ROWS[:3]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4", f"{path}:5"]
    assert [row.content for row in read_all(path, max_rows=2)] == ROWS[:2]


def test_a_gzip_file_needs_no_gz_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(gzip.compress(lines_of(ROWS[:3])))
    assert [row.content for row in read_all(tmp_path / "pairs.jsonl")] == ROWS[:3]


def test_a_damaged_line_is_a_refused_row_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines_of(ROWS[:1]) + b'{"chosen": \n{"chosen": "\xff"}\n' + b"[" * 100_000 + b"\n")
    whole, *damaged = read_all(path)
    assert whole.content == ROWS[0]
    reasons = [row.content.reason for row in damaged if isinstance(row.content, RowError)]
    assert reasons == ["bad-json", "not-utf8", "bad-json"]
    assert [row.where for row in damaged] == [f"{path}:2", f"{path}:3", f"{path}:4"]


def test_directories_globs_and_lists_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name, rows in (("b.jsonl", ROWS[2:4]), ("a.jsonl", ROWS[:2]), ("deep/c.jsonl", ROWS[4:6])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines_of(rows))
    for ignored in ("README.md", ".hidden.jsonl", "_state.json"):
        (tmp_path / ignored).write_text("not pairs")
    (tmp_path / "folder.parquet").mkdir()
    assert [row.content for row in read_all(str(tmp_path))] == ROWS[:6]
    assert [row.content for row in read_all(str(tmp_path / "[ab].jsonl"))] == ROWS[:4]
    assert [row.content for row in read_all(str(tmp_path / "**/*.jsonl"))] == ROWS[:6]
    listed = [str(tmp_path / "deep"), tmp_path / "a.jsonl"]
    assert [row.content for row in read_all(listed)] == ROWS[4:6] + ROWS[:2]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "part[1].jsonl").write_bytes(lines_of(ROWS[:1]))
    assert len(read_all(str(tmp_path / "part[1].jsonl"))) == 1


def test_datasets_and_lists_of_rows_give_their_rows() -> None:
    whole = datasets.Dataset.from_list(ROWS)
    for source in (ROWS, whole, whole.to_iterable_dataset()):
        rows = read_all(source)
        assert [row.content for row in rows] == ROWS
        assert rows[-1].where == "train[1499]"
        assert [row.content for row in read_all(source, max_rows=1001)] == ROWS[:1001]


def test_rows_in_memory_travel_in_bounded_chunks() -> None:
    plan = plan_sources(ROWS, max_parts=1, max_rows=None, name="train")
    assert [work.start for work in plan.work if isinstance(work, RowChunk)] == [0, 1000]


def test_a_hub_name_is_loaded_with_its_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines_of(ROWS[:2]))
    (tmp_path / "test.jsonl").write_bytes(lines_of(ROWS[2:5]))
    assert list(load_hub_dataset(str(tmp_path))) == ROWS[:2]
    assert list(load_hub_dataset(f"{tmp_path}:test")) == ROWS[2:5]
    with pytest.raises(DataError, match="name and split"):
        load_hub_dataset(f"{tmp_path}:nowhere")


def test_a_hub_name_that_cannot_be_had_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no path here and the hub gives no such dataset"):
        read_all("nobody/nothing-here")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere/train.jsonl", "does not exist"),
        ("s3://bucket/train.jsonl", "ray.data.read_json"),
        ("nowhere/*.jsonl", "no file matches"),
        ([], "is empty"),
        (7, "no source of pairs"),
        ([7], "no source of pairs"),
        ({"train": ROWS}, "pick one"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:1])}), "source\\['train'\\]"),
    ],
)
def test_what_is_no_source_is_refused_with_what_would_be(source: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_all(source)


def test_max_rows_must_be_positive() -> None:
    with pytest.raises(DataError, match="`max_rows` \\(0\\)"):
        read_all(ROWS, max_rows=0)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("pairs.jsonl.gz", b"no gzip at all", "gzip -t"),
        ("pairs.jsonl.gz", gzip.compress(lines_of(ROWS))[:-500], "cut short"),
        ("pairs.parquet", b"PAR1 or so", "cannot be read"),
        ("pairs.json", b'\n [{"chosen": "a"}]', "jq -c"),
        ("pairs.csv", b"a,b", "no known kind"),
    ],
)
def test_a_damaged_or_unknown_file_is_an_error_with_its_name(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read_all(str(tmp_path / name))
    assert name in str(error.value)


def test_damage_behind_max_rows_is_not_met(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines_of(ROWS))[:-500])
    assert len(read_all(str(tmp_path / "pairs.jsonl.gz"), max_rows=10)) == 10


def test_an_empty_directory_is_an_error_that_names_the_suffixes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.parquet"):
        read_all(str(tmp_path))


def test_a_file_that_vanished_after_planning_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        list(read_work(Shard(0, str(tmp_path / "gone.jsonl"))))


@pytest.mark.parametrize("source", ["a.jsonl", "b:7.jsonl.gz", "c[1].parquet", "train", "hub/name:x"])
@pytest.mark.parametrize("number", [0, 41])
def test_a_row_s_name_tells_its_source_and_its_number(source: str, number: int) -> None:
    assert place_of(row_name(source, number)) == (source, number)
