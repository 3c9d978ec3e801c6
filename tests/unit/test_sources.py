"""Every source is planned and read so that each row comes once, at its own place, however it is cut."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrm.data import cuts
from rayrm.data.sources import (
    RowChunk,
    Shard,
    SourcePlan,
    SourceRow,
    load_hub_dataset,
    place_of,
    plan_sources,
    read_work,
    row_name,
)
from rayrm.data_settings import SourceConfig
from rayrm.errors import DataError, RowError
from tests.tiny import tiny_rows

ROWS = tiny_rows(1500)
FORMS = [".jsonl", ".jsonl.gz", ".json.zst", ".parquet", ".arrow", ".feather"]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read_plan(plan: SourcePlan) -> list[SourceRow]:
    rows = itertools.chain.from_iterable(read_work(pickle.loads(pickle.dumps(work))) for work in plan.work)
    return sorted(rows, key=lambda row: (row.source, row.number))


def read_all(source: Any, *, max_rows: int | None = None, columns: Any = None) -> list[SourceRow]:
    return read_plan(plan_sources(source, max_rows=max_rows, name="train", columns=columns))


def write(path: Path, rows: list[dict[str, Any]], rows_per_part: int = 100) -> Path:
    """The rows in the form that the file's name says."""
    table, text = pa.Table.from_pylist(rows), lines_of(rows)
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path, row_group_size=rows_per_part)
        case ".arrow":
            with pa.ipc.new_stream(path, table.schema) as out:
                out.write_table(table, max_chunksize=rows_per_part)
        case ".feather":
            with pa.ipc.new_file(
                path, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
            ) as out:
                out.write_table(table, max_chunksize=rows_per_part)
        case ".gz":
            path.write_bytes(gzip.compress(text))
        case ".zst":
            path.write_bytes(zstd(text))
        case _:
            path.write_bytes(text)
    return path


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return bytes(sink.getvalue().to_pybytes())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some kilobytes are cut as gigabytes would be."""
    monkeypatch.setattr(cuts, "BYTES_PER_PIECE", 2**14)
    monkeypatch.setattr(cuts, "MOST_BYTES_PER_PIECE", 2**16)
    monkeypatch.setattr(cuts, "BYTES_PER_COMPRESSED_PART", 2**14)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", FORMS)
def test_each_row_is_read_once_in_the_files_order_whatever_the_cut(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"pairs{suffix}", ROWS)
    plan = plan_sources(path, max_rows=None, name="train")
    assert 3 <= len(plan.work) <= 16
    assert max(len(pickle.dumps(work)) for work in plan.work) < 500
    rows = read_plan(plan)
    assert [row.content for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(1500))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("max_rows", [1, 256, 700, 1500, 9999])
@pytest.mark.parametrize("suffix", FORMS)
def test_max_rows_reads_the_first_rows_only(tmp_path: Path, suffix: str, max_rows: int) -> None:
    for index, rows in enumerate((ROWS[:600], ROWS[600:])):
        write(tmp_path / f"{index}{suffix}", rows)
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
    plan = plan_sources(ROWS, max_rows=None, name="train")
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
        ("pairs.jsonl.gz", b"", "the file is empty"),
        ("pairs.jsonl.zst", b"no zstd at all", "zstd -t"),
        ("pairs.jsonl.zst", zstd(lines_of(ROWS))[:-500], "cut short"),
        ("pairs.parquet", b"PAR1 or so", "cannot be read"),
        ("pairs.parquet", b"", "cannot be read"),
        ("pairs.arrow", b"", "the file is empty"),
        ("pairs.arrow", b"ARROW1 and nothing more", "cannot be read"),
        ("pairs.feather", b"no arrow stream either", "cannot be read"),
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


def test_an_arrow_stream_cut_between_batches_is_not_read_as_whole(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(tmp_path / "pairs.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=200)
    whole = (tmp_path / "pairs.arrow").read_bytes()
    source = pa.BufferReader(whole)
    pa.ipc.open_stream(source).read_next_batch()
    for end in (source.tell(), len(whole) - 8):
        (tmp_path / "pairs.arrow").write_bytes(whole[:end])
        with pytest.raises(DataError, match="does not end where the file does"):
            read_all(str(tmp_path / "pairs.arrow"))


def test_damage_behind_max_rows_is_not_met(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines_of(ROWS * 10))[:-500])
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


def test_plain_text_is_cut_at_line_ends_found_by_one_scan() -> None:
    text = b"a\n" * 3 + b"long" * 5 + b"\n\nb\nlast"
    for size in range(1, 40):
        for offset, line in cuts.line_cuts(io.BytesIO(text), size):
            assert text[offset - 1 : offset] == b"\n"
            assert text[:offset].count(b"\n") == line
    assert list(cuts.line_cuts(io.BytesIO(text), 8)) == [(27, 4)]


class _ShortReads(io.RawIOBase):
    """A file that gives a byte at a time, as a network's may."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._content.readinto(memoryview(buffer)[:1])


def test_short_reads_move_no_cut() -> None:
    text = lines_of(ROWS[:30])
    whole = list(cuts.line_cuts(io.BytesIO(text), 1000))
    assert len(whole) > 3
    assert list(cuts.line_cuts(io.BufferedReader(_ShortReads(text)), 1000)) == whole


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", FORMS)
def test_contiguous_pieces_hold_rows_that_follow_one_another(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"pairs{suffix}", ROWS)
    plan = plan_sources(path, max_rows=None, name="train", contiguous=True)
    numbers = [row.number for work in plan.work for row in read_work(work)]
    assert numbers == list(range(1500))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", FORMS)
def test_a_file_of_a_source_of_many_is_one_piece(tmp_path: Path, suffix: str) -> None:
    for index in range(num_files := 64):
        write(tmp_path / f"{index:02}{suffix}", ROWS[index * 20 : index * 20 + 20])
    plan = plan_sources(str(tmp_path), max_rows=None, name="train")
    assert len(plan.work) == num_files
    assert [row.content for row in read_plan(plan)] == ROWS[:1280]
    assert [row.content for row in read_all(str(tmp_path), max_rows=33)] == ROWS[:33]


def test_a_damaged_file_of_many_is_met_when_it_is_read(tmp_path: Path) -> None:
    for index in range(64):
        write(tmp_path / f"{index:02}.jsonl", ROWS[:1])
    (tmp_path / "40.jsonl").write_bytes(b"[{}]")
    with pytest.raises(DataError, match=r"40\.jsonl begins with"):
        read_all(str(tmp_path))


def test_pieces_of_real_sizes_are_megabytes(tmp_path: Path) -> None:
    row = {"chosen": "a" * 500, "rejected": "b" * 500}
    path = write(tmp_path / "pairs.jsonl", [row] * 10_000)
    plan = plan_sources(path, max_rows=None, name="train")
    lengths = [work.length for work in plan.work if isinstance(work, Shard)]
    assert sum(filter(None, lengths)) == path.stat().st_size
    assert len(lengths) == 3
    assert all(abs(length - 4 * 2**20) < 2000 for length in lengths[:2] if length)
    assert [row.number for row in read_plan(plan)] == list(range(10_000))


def test_a_file_that_changed_after_planning_is_a_data_error(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", ROWS[:10])
    plan = plan_sources(path, max_rows=None, name="train")
    with path.open("ab") as out:
        out.write(b"{}\n")
    with pytest.raises(DataError, match="when it was planned"):
        read_plan(plan)


def test_a_saved_dataset_is_read_and_one_of_splits_names_them(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"fit": dataset, "test": dataset}).save_to_disk(str(tmp_path / "dict"))
    assert [row.content for row in read_all(str(tmp_path / "one"))] == ROWS
    with pytest.raises(DataError, match=r"splits fit, test; one is needed here; type .*/dict/fit"):
        read_all(str(tmp_path / "dict"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json is damaged"):
        read_all(str(tmp_path / "one"))


def test_a_column_of_json_is_read_as_what_it_holds(tmp_path: Path) -> None:
    rows = [{"chosen": "a", "tools": [{"a": 1}, {"a": "x"}]}, {"chosen": "b", "tools": None}]
    features = datasets.Features({"chosen": datasets.Value("string"), "tools": datasets.Json()})
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "pairs.parquet"))
    for name in ("saved", "pairs.parquet"):
        assert [row.content for row in read_all(str(tmp_path / name))] == rows


def test_a_group_is_what_was_named_whatever_its_files(tmp_path: Path) -> None:
    for index in range(4):
        write(tmp_path / f"{index}.jsonl", ROWS[index * 10 : index * 10 + 10])
    two = [str(tmp_path / "2.jsonl"), str(tmp_path / "3.jsonl")]
    plan = plan_sources(
        [str(tmp_path / "[01].jsonl"), SourceConfig(path=two, name="late", weight=0.5, max_pairs=13)],
        max_rows=None,
        name="train",
    )
    assert [(group.name, group.weight) for group in plan.groups] == [
        (str(tmp_path / "[01].jsonl"), 1.0),
        ("late", 0.5),
    ]
    assert plan.names == [str(tmp_path / f"{index}.jsonl") for index in range(4)]
    assert plan.group_of == [0, 0, 1, 1]
    assert [row.content for row in read_plan(plan)] == ROWS[:33]


def test_two_sources_of_one_name_are_told_apart() -> None:
    plan = plan_sources([ROWS[:2], ROWS[2:4]], max_rows=None, name="train")
    assert [group.name for group in plan.groups] == ["train", "train (2)"]


def test_the_pieces_of_a_source_are_the_same_whenever_they_are_planned(tmp_path: Path) -> None:
    for suffix in FORMS:
        write(tmp_path / f"pairs{suffix}", ROWS)
    assert plan_sources(tmp_path, max_rows=None, name="a") == plan_sources(tmp_path, max_rows=None, name="b")
