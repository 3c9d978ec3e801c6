"""A stream read ahead by a real actor: the steps of its order, from any cursor, whatever is killed."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from rayrm.data import dispatcher
from rayrm.data.dispatcher import Dispatcher
from rayrm.data.ingest import ingest
from rayrm.data.order import Cursor
from rayrm.data.steps import Step
from rayrm.data.stream import StreamStep
from rayrm.data.stream_steps import StreamedSteps, TakenStep
from rayrm.data.streaming import open_stream
from rayrm.errors import DataError
from tests.tiny import tiny_rows, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
SHARDS, ROWS_PER_SHARD = 9, 30
TOKENIZER = tiny_tokenizer()


def write_shards(directory: Path, **bad: str) -> Path:
    """Shards whose rows are known by their margins: 0, 1, 2 ... in the data's own order."""
    directory.mkdir(exist_ok=True)
    rows = [{**row, "margin": float(n)} for n, row in enumerate(tiny_rows(SHARDS * ROWS_PER_SHARD))]
    for shard in range(SHARDS):
        mine = rows[shard * ROWS_PER_SHARD : (shard + 1) * ROWS_PER_SHARD]
        text = "".join(json.dumps(row) + "\n" for row in mine)
        (directory / f"shard-{shard}.jsonl").write_text(text + bad.get(f"shard_{shard}", ""))
    return directory


@contextmanager
def stream_of(source: Any, tmp_path: Path, **changes: Any) -> Iterator[StreamedSteps]:
    how = {name: changes.pop(name, None) for name in ("token_cache", "max_rows")}
    source = str(source) if isinstance(source, Path) else source
    opened = open_stream(source, TOKENIZER, max_length=200, **how)
    settings = {
        "rows_per_step": 8,
        "num_ranks": 1,
        "seed": 1,
        "window": 64,
        "shuffle": True,
        "drop_last": False,
        "quarantine_path": tmp_path / "quarantine.jsonl",
        "max_bad_row_fraction": 0.01,
        "max_tasks": None,
        **changes,
    }
    with opened.started(**settings) as steps:
        yield steps


def numbers(step: Step) -> list[int]:
    return [int(row.margin) for row in step.fetch(range(step.index.num_rows))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], Cursor, float]]:
    """The first 80 steps, which is more than two epochs."""
    with stream_of(shards, tmp_path_factory.mktemp("whole")) as steps:
        return [(numbers(step), step.after, step.epoch) for step in islice(steps.steps(Cursor()), 80)]


def test_an_epoch_has_each_row_once_and_the_next_has_another_order(
    whole: list[tuple[list[int], Cursor, float]],
) -> None:
    epochs: dict[int, list[int]] = {}
    before = Cursor()
    for rows, after, _ in whole:
        epochs.setdefault(before.epoch, []).extend(rows)
        before = after
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(SHARDS * ROWS_PER_SHARD))
    assert epochs[0] != epochs[1]
    progress = [epoch for _, _, epoch in whole]
    assert progress == sorted(progress)
    assert progress[33] == 1.0  # 270 rows are 34 steps of 8


@pytest.mark.parametrize("begin", [0, 5, 33, 40])
def test_a_run_goes_on_from_a_cursor_with_the_steps_that_follow(
    begin: int, whole: list[tuple[list[int], Cursor, float]], shards: Path, tmp_path: Path
) -> None:
    with stream_of(shards, tmp_path) as steps:
        again = [numbers(step) for step in islice(steps.steps(whole[begin][1]), 20)]
    assert again == [rows for rows, _, _ in whole[begin + 1 : begin + 21]]


def test_a_killed_dispatcher_is_replaced_and_no_step_is_lost_or_seen_twice(
    whole: list[tuple[list[int], Cursor, float]], shards: Path, tmp_path: Path
) -> None:
    import ray

    with stream_of(shards, tmp_path) as steps:
        seen = []
        for count, step in enumerate(islice(steps.steps(Cursor()), 45)):
            if count in (3, 20):
                process = ray.get(steps.actor.process.remote())
                os.kill(process, signal.SIGKILL)  # its blocks go with it, those of `step` among them
                steps._open.clear()
            seen.append(numbers(step))
        assert ray.get(steps.actor.process.remote()) != process
    assert seen == [rows for rows, _, _ in whole[:45]]


def test_blocks_that_are_lost_while_the_dispatcher_lives_are_read_anew(
    whole: list[tuple[list[int], Cursor, float]], shards: Path, tmp_path: Path
) -> None:
    """Ray makes lost blocks anew while it can; what is told here is that it cannot."""
    import ray

    def ids(told: StreamStep) -> set[str]:
        return {block.hex() for block in told.blocks}

    with stream_of(shards, tmp_path, num_ranks=2) as steps:
        first, second = steps.steps(Cursor()), steps.steps(Cursor())
        seen = [numbers(step) for step in islice(first, 5)]
        behind = [numbers(step) for step in islice(second, 3)]
        process = ray.get(steps.actor.process.remote())
        lost = next(first).told
        anew = steps.ask(lost.before, lost=lost)
        assert not ids(anew) & ids(lost)
        # Both ranks lost them, and the second to say so gets the same new ones.
        assert ids(steps.ask(lost.before, lost=lost)) == ids(anew)
        seen.append(numbers(TakenStep(anew, steps)))
        seen += [numbers(step) for step in islice(first, 14)]
        behind += [numbers(step) for step in islice(second, 10)]
        assert ray.get(steps.actor.process.remote()) == process
    assert seen == [rows for rows, _, _ in whole[:20]]
    assert behind == seen[: len(behind)]


def test_a_source_of_many_pieces_is_given_to_ray_data_some_at_a_time(
    whole: list[tuple[list[int], Cursor, float]],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With parts of 2 and 3 pieces, of 9, as with the parts of a source that has thousands."""
    given: list[int] = []
    kept = Dispatcher._tables_between

    def between(self: Any, begin: int, end: int, pieces: Any) -> Iterator[Any]:
        given.append(end - begin)
        return kept(self, begin, end, pieces)

    monkeypatch.setattr(dispatcher, "_FIRST_PIECES", 2)
    monkeypatch.setattr(dispatcher, "_PIECES_AT_ONCE", 3)
    monkeypatch.setattr(Dispatcher, "_tables_between", between)
    with stream_of(shards, tmp_path) as steps:
        here = Dispatcher()  # in this process, by the same plan
        cursor, seen = Cursor(), []
        for _ in range(40):
            told = here.step(cursor, [steps.plan])
            seen.append([int(row.margin) for row in steps.fetch(told, range(told.index.num_rows))])
            cursor = told.after
        with here._changed:
            assert here._run is not None
            here._run.stopped = True
            here._changed.notify_all()
        for thread in threading.enumerate():
            if thread.name == "rayrm-stream":
                thread.join(60)
    assert seen == [rows for rows, _, _ in whole[:40]]
    assert given[:4] == [2, 3, 3, 1]


def test_the_dispatcher_stays_four_steps_ahead_and_no_further_than_a_window(
    shards: Path, tmp_path: Path
) -> None:
    import ray

    with stream_of(shards, tmp_path, window=16) as steps:
        for step in islice(steps.steps(Cursor()), 30):
            deadline = time.monotonic() + 60
            while (ahead := ray.get(steps.actor.num_ahead.remote())) < 4:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert ahead == 4
            numbers(step)


def test_reading_ahead_begins_before_a_step_is_asked_for(
    whole: list[tuple[list[int], Cursor, float]], shards: Path, tmp_path: Path
) -> None:
    import ray

    cursor = whole[4][1]
    with stream_of(shards, tmp_path) as steps:
        steps.read_ahead(cursor)
        deadline = time.monotonic() + 60
        while ray.get(steps.actor.num_ahead.remote()) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        seen = [numbers(step) for step in islice(steps.steps(cursor), 10)]
        steps.read_ahead(Cursor())  # and where another one is asked for after all
        seen += [numbers(step) for step in islice(steps.steps(whole[14][1]), 5)]
    assert seen == [rows for rows, _, _ in whole[5:20]]


def test_a_rank_that_is_behind_gets_the_same_steps(shards: Path, tmp_path: Path) -> None:
    with stream_of(shards, tmp_path, num_ranks=2) as steps:
        first, second = steps.steps(Cursor()), steps.steps(Cursor())
        ahead = [numbers(step) for step in islice(first, 10)]
        assert [numbers(step) for step in islice(second, 10)] == ahead


def test_later_epochs_come_from_the_token_cache(
    whole: list[tuple[list[int], Cursor, float]], shards: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    for _ in range(2):
        with stream_of(shards, tmp_path, token_cache=cache) as steps:
            seen = [numbers(step) for step in islice(steps.steps(Cursor()), 50)]
        assert seen == [rows for rows, _, _ in whole[:50]]
        assert len(list(Path(cache).rglob("*.arrow"))) == SHARDS


def test_a_refused_row_is_kept_once_with_file_and_line(tmp_path: Path) -> None:
    bad = write_shards(tmp_path / "bad", shard_3='{"chosen": 1}\n')
    with stream_of(bad, tmp_path, max_bad_row_fraction=0.5) as steps:
        seen = [n for step in islice(steps.steps(Cursor()), 68) for n in numbers(step)]
    assert sorted(seen) == sorted(2 * list(range(SHARDS * ROWS_PER_SHARD)))
    (entry,) = (json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert entry["source"].endswith("shard-3.jsonl")
    assert f"shard-3.jsonl:{ROWS_PER_SHARD + 1}" in entry["message"]
    assert (entry["row"], entry["line"]) == (ROWS_PER_SHARD, ROWS_PER_SHARD + 1)


def test_what_was_read_and_refused_is_told_by_source_when_the_stream_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "one", shard_3='{"chosen": 1}\n')
    write_shards(tmp_path / "two")
    sources = [str(tmp_path / "one"), str(tmp_path / "two")]
    caplog.set_level("INFO", "rayrm.data")
    with stream_of(sources, tmp_path, max_bad_row_fraction=0.5) as steps:
        # One epoch, and what is read of the next before its first step is asked for.
        told = list(islice(steps.steps(Cursor()), 2 * SHARDS * ROWS_PER_SHARD // 8 + 1))
        assert told
    lines = [record.getMessage() for record in caplog.records if "kept" in record.getMessage()]
    assert lines[0].startswith("the stream of train: ")
    assert "missing-rejected" in lines[0]
    one, two = lines[1:]
    assert "/one: " in one
    assert "missing-rejected" in one
    assert "/two: " in two
    assert "refused: none" in two


def test_a_file_that_is_damaged_ends_the_reading_with_its_name(tmp_path: Path) -> None:
    bad = write_shards(tmp_path / "bad")
    draw = random.Random(0)
    rows = [{"chosen": draw.randbytes(400).hex(), "rejected": "no"} for _ in range(2000)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (bad / "zz.jsonl.gz").write_bytes(gzip.compress(text)[:-1000])
    with stream_of(bad, tmp_path) as steps, pytest.raises(DataError, match=r"zz\.jsonl\.gz cannot be read"):
        list(islice(steps.steps(Cursor()), 400))


def test_rows_of_another_form_in_a_later_shard_end_the_reading(tmp_path: Path) -> None:
    mixed = write_shards(tmp_path / "mixed")
    plain = isinstance(tiny_rows(1)[0]["chosen"], str)
    with (mixed / "shard-7.jsonl").open("a") as out:
        out.write(json.dumps(tiny_rows(1, conversational=plain)[0]) + "\n")
    message = rf"shard-7\.jsonl:{ROWS_PER_SHARD + 1} is .*began with"
    with stream_of(mixed, tmp_path) as steps, pytest.raises(DataError, match=message):
        list(islice(steps.steps(Cursor()), 80))


def kinds_of_rows(kind: str, rows: list[dict[str, Any]], directory: Path) -> Any:
    memory = datasets.Dataset.from_list(rows)
    if kind == "on disk":
        memory.save_to_disk(str(directory / "saved"), num_shards=3)
        return datasets.load_from_disk(str(directory / "saved"))
    streams = {"stream": memory.to_iterable_dataset(num_shards=3), "in memory": memory, "list": rows}
    return streams[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "list",
        pytest.param("in memory", marks=pytest.mark.slow),
        pytest.param("on disk", marks=pytest.mark.slow),
        "stream",
    ],
)
def test_the_first_rows_of_what_is_no_file_are_streamed_as_an_indexed_set_has_them(
    kind: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{**row, "margin": float(n)} for n, row in enumerate(tiny_rows(1400))]
    rows[1100] = {"chosen": "no rejected", "rejected": None, "margin": None}
    source = kinds_of_rows(kind, rows, tmp_path)
    indexed = ingest(source, TOKENIZER, max_length=200, max_rows=1300, name="train")
    expected = [int(row.margin) for row in indexed.fetch(range(indexed.num_rows))]
    how = {"max_rows": 1300, "rows_per_step": 100, "token_cache": str(tmp_path / "cache")}
    for _ in range(2):
        with stream_of(source, tmp_path, shuffle=False, **how) as steps:
            seen = [n for step in islice(steps.steps(Cursor()), 26) for n in numbers(step)]
        assert seen == 2 * expected
    assert set(expected) == set(range(1300)) - {1100}
    (entry,) = (json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (entry["source"], entry["row"]) == ("train", 1100)
    assert entry["message"].startswith("train[1100]")


FINGERPRINT = """
    import datasets, sys
    from rayrm.data.streaming import open_stream
    from tests.tiny import tiny_tokenizer

    streaming, limit = sys.argv[2] == "streaming", int(sys.argv[3]) or None
    files = sys.argv[1] + "/*.jsonl"
    rows = datasets.load_dataset("json", data_files=files, streaming=streaming, split="train")
    rows = rows.map(lambda row: {"margin": row["margin"] + 1})
    print(open_stream(rows, tiny_tokenizer(), max_length=200, max_rows=limit).report.fingerprint)
"""


@pytest.mark.parametrize(
    ("kind", "limit"),
    [pytest.param("streaming", "0", marks=pytest.mark.slow), ("streaming", "100"), ("on disk", "100")],
)
def test_what_datasets_gives_is_known_again_by_another_process(
    shards: Path, tmp_path: Path, kind: str, limit: str
) -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(FINGERPRINT), str(shards), kind, limit],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        for seed in range(2)
    }
    assert len(found) == 1
    assert len(found.pop()) == 64
