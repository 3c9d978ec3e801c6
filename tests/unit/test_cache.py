"""The token cache: found by content and rules, whole or made anew, filled by several at once."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayrm.data.blocks import index_of
from rayrm.data.cache import TokenCache, blocks_of
from rayrm.data.pieces import Piece, SourceRow
from rayrm.data.reading import Reading, raise_if_stopped
from rayrm.data.selection import Selection
from rayrm.data.sources import plan_sources, read_work
from rayrm.data.tokenized_set import assemble
from rayrm.errors import DataError
from tests.tiny import CHAT_TEMPLATE, tiny_rows, tiny_tokenizer

ROWS = tiny_rows(120, margin=True)


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reading(cache: Path, tokenizer: Any = None, **rules: Any) -> Reading:
    tokenizer = tokenizer or tiny_tokenizer()
    rules.setdefault("max_length", 200)
    return Reading.of(tokenizer, pickle.dumps(tokenizer), token_cache=str(cache), **rules)


def fill(source: Path, how: Reading, columns: dict[str, str] | None = None) -> list[list[int]]:
    """The rows of a source by the cache, as their ids."""
    plan = plan_sources(str(source), max_rows=None, name="train", columns=columns)
    found = [entry for piece in plan.work for entry in how.cached(piece)]
    rows = assemble("train", plan.names, [block for block, _ in found], [index for _, index in found])
    return [row.ids.tolist() for row in rows.fetch(np.arange(rows.num_rows))]


def entries(cache: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}


def plain(source: Path) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    how = Reading.of(tokenizer, pickle.dumps(tokenizer), max_length=200)
    plan = plan_sources(str(source), max_rows=None, name="train")
    tables = [table for piece in plan.work for table in how.tables(piece)]
    rows = assemble("train", plan.names, list(tables), [index_of(table) for table in tables])
    return [row.ids.tolist() for row in rows.fetch(np.arange(rows.num_rows))]


def test_what_is_cached_is_what_would_be_tokenized_and_is_made_once(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    first = fill(source, reading(cache))
    made = entries(cache)
    assert first == plain(source)
    assert len(made) == 1
    assert fill(source, reading(cache)) == first
    assert entries(cache) == made


def test_the_same_content_elsewhere_finds_its_entry_and_knows_its_own_source(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write(tmp_path / "both" / "a.jsonl", ROWS[:50])
    write(tmp_path / "both" / "b.jsonl", ROWS[50:])
    fill(write(tmp_path / "elsewhere.jsonl", ROWS[50:]), reading(cache))
    made = entries(cache)
    plan = plan_sources(str(tmp_path / "both"), max_rows=None, name="train")
    found = [entry for piece in plan.work for entry in reading(cache).cached(piece)]
    assert len(entries(cache)) == 2
    assert entries(cache).items() >= made.items()
    rows = assemble("train", plan.names, [block for block, _ in found], [index for _, index in found])
    names = [rows.name_of(row) for row in rows.fetch([0, 49, 50, 119])]
    assert [name.rpartition("/")[2] for name in names] == [
        "a.jsonl:1",
        "a.jsonl:50",
        "b.jsonl:1",
        "b.jsonl:70",
    ]


def test_whatever_shapes_rows_makes_another_entry(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    other_template = tiny_tokenizer()
    other_template.chat_template = CHAT_TEMPLATE + " "
    other_eos = tiny_tokenizer()
    other_eos.eos_token = "the"
    ways: list[Reading] = [
        reading(cache),
        reading(cache, max_length=20),
        reading(cache, tiny_tokenizer(bos=True)),
        reading(cache, other_template),
        reading(cache, other_eos),
        reading(cache, selection=Selection("train", 0.5)),
        reading(cache, selection=Selection("eval", 0.5)),
    ]
    for number, way in enumerate(ways, 1):
        fill(source, way)
        assert len(entries(cache)) == number
    fill(source, reading(cache), columns={"chosen": "rejected", "rejected": "chosen"})
    write(source, ROWS[:-1])
    fill(source, reading(cache))
    assert len(entries(cache)) == len(ways) + 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, damage: str) -> None:
    source, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    first = fill(source, reading(cache))
    (entry,) = cache.rglob("*.arrow")
    whole = entry.read_bytes()
    broken = {
        "flip": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "cut": whole[:900],
        "empty": b"",
    }
    entry.write_bytes(broken[damage])
    assert fill(source, reading(cache)) == first
    (again,) = cache.rglob("*.arrow")
    assert again.read_bytes() == whole


def _fill_in_a_process(source: Path, cache: Path, out: Any) -> None:
    out.put(fill(source, reading(cache)))


def test_two_runs_may_fill_one_cache_at_once(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    runs = [context.Process(target=_fill_in_a_process, args=(source, cache, out)) for _ in range(2)]
    for run in runs:
        run.start()
    found = [out.get(timeout=120) for _ in runs]
    for run in runs:
        run.join()
    assert found[0] == found[1] == plain(source)
    assert len(entries(cache)) == 1
    assert not list(cache.rglob(".*"))


def test_a_cache_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"`token_cache` \(.*cache\) cannot be written"):
        fill(write(tmp_path / "a.jsonl"), reading(tmp_path / "cache"))


def test_what_fails_while_an_entry_is_made_leaves_none(tmp_path: Path) -> None:
    def broken() -> Any:
        raise DataError("no more")
        yield

    with pytest.raises(DataError, match="no more"):
        TokenCache(str(tmp_path / "cache"), "rules").entry("content", broken)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def streamed(source: Path, how: Reading) -> Iterator[pa.Table]:
    plan = plan_sources(str(source), max_rows=None, name="train")
    return (table for piece in plan.work for table in how.tables(piece))


def files_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_a_stream_gives_the_same_rows_by_the_cache_and_leaves_the_entry_that_a_set_makes(
    tmp_path: Path,
) -> None:
    refused = '{"chosen": 1}\n'
    source, cache = write(tmp_path / "a.jsonl", tiny_rows(700)), tmp_path / "cache"
    source.write_text(source.read_text() + refused)
    without = pa.concat_tables(streamed(source, replace(reading(cache), cache=None)))
    assert without.num_rows == 701
    assert pa.concat_tables(streamed(source, reading(cache))) == without
    made = entries(cache)
    assert pa.concat_tables(streamed(source, reading(cache))) == without
    fill(source, reading(cache))
    assert entries(cache) == made
    fill(source, reading(tmp_path / "indexed"))
    ((entry,), (indexed,)) = (files_in(at) for at in (cache, tmp_path / "indexed"))
    assert entry.name == indexed.name


def test_rows_of_a_stream_come_before_their_piece_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counted(piece: Piece) -> Iterator[SourceRow]:
        for row in read_work(piece):
            read.append(row.number)
            yield row

    monkeypatch.setattr("rayrm.data.reading.read_work", counted)
    source, cache = write(tmp_path / "a.jsonl", tiny_rows(2000)), tmp_path / "cache"
    rows = streamed(source, reading(cache))
    assert len(next(rows)) == len(read) == 512
    assert not entries(cache)
    assert sum(len(table) for table in rows) == 2000 - 512
    assert len(entries(cache)) == len(files_in(cache)) == 1


@pytest.mark.parametrize("num_tables", [1, 4])
def test_a_stream_that_is_left_early_leaves_nothing_in_the_cache(
    tmp_path: Path, num_tables: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrm.data.cache._BLOCK_BYTES", 2000)
    source, cache = write(tmp_path / "a.jsonl", tiny_rows(2000)), tmp_path / "cache"
    rows = streamed(source, reading(cache))
    taken = [next(rows) for _ in range(num_tables)]
    assert len(files_in(cache)) == 1
    del rows
    assert not files_in(cache)
    assert pa.concat_tables(streamed(source, reading(cache))).slice(0, 512) == taken[0]


def test_what_a_killed_writer_left_is_deleted_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "a.jsonl", tiny_rows(2000)), tmp_path / "cache"
    living = streamed(source, reading(cache))
    first = next(living)
    (aside,) = files_in(cache)
    left = aside.with_name(".0123-killed")
    left.write_bytes(b"half")
    other = streamed(source, reading(cache))
    assert next(other) == first
    assert len(files_in(cache)) == 2
    assert aside.exists()
    assert not left.exists()
    assert sum(len(table) for table in living) == sum(len(table) for table in other) == 2000 - 512
    assert len(entries(cache)) == len(files_in(cache)) == 1


def test_a_stream_makes_a_damaged_entry_anew(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    first = pa.concat_tables(streamed(source, reading(cache)))
    (entry,) = files_in(cache)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert pa.concat_tables(streamed(source, reading(cache))) == first
    assert [path.read_bytes() for path in files_in(cache)] == [whole]


def test_a_full_disk_ends_a_stream_with_what_to_type_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrm.data.cache._BLOCK_BYTES", 2000)
    source, cache = write(tmp_path / "a.jsonl", tiny_rows(1100)), tmp_path / "cache"
    how = reading(cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk that is full then
    try:
        tables = list(streamed(source, how))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(DataError, match=r"`token_cache` \(.*cache\) cannot be written .*free space"):
        raise_if_stopped(index_of(tables[-1]))
    assert not files_in(cache)


def test_a_large_piece_is_kept_as_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrm.data.cache._BLOCK_BYTES", 2000)
    source, cache = write(tmp_path / "a.jsonl", tiny_rows(1100)), tmp_path / "cache"
    assert fill(source, reading(cache)) == plain(source)
    (entry,) = cache.rglob("*.arrow")
    assert len(blocks_of(entry, 0)) == 3  # tables of 512 rows
