"""`datasets` streams are read by their own shards, in processes that know nothing of the one that planned."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrm.data.reading import content_of
from rayrm.data.sources import (
    DatasetPart,
    RowChunk,
    SourcePlan,
    StreamShard,
    hub_stream,
    plan_sources,
    read_work,
)
from rayrm.data_settings import SourceConfig
from rayrm.errors import DataError
from tests.tiny import tiny_rows

ROWS = tiny_rows(90)


@pytest.fixture(params=["json", "parquet"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Three files, which are the stream's three shards."""
    files = []
    for index in range(3):
        path, rows = tmp_path / f"{index}.{request.param}", ROWS[index * 30 : index * 30 + 30]
        if request.param == "json":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        files.append(str(path))
    return datasets.load_dataset(request.param, data_files=files, split="train", streaming=True)


def test_each_shard_of_a_stream_is_a_piece_whose_rows_are_counted_in_it(stream: Any) -> None:
    plan = plan_sources(stream, max_rows=None, name="set")
    assert plan.names == ["set/shard-0", "set/shard-1", "set/shard-2"]
    assert plan.group_of == [0, 0, 0]
    assert [group.name for group in plan.groups] == ["set"]
    rows = [list(read_work(pickle.loads(pickle.dumps(work)))) for work in plan.work]
    assert [row.content for shard in rows for row in shard] == ROWS
    assert [(row.source, row.number) for row in rows[2]] == [(2, number) for number in range(30)]
    assert rows[1][17].where == "set/shard-1[17]"


def test_a_capped_stream_gives_its_first_rows(stream: Any) -> None:
    plan = plan_sources(stream, max_rows=40, name="set")
    assert [row.content for work in plan.work for row in read_work(work)] == ROWS[:40]


def test_columns_are_read_from_streams(stream: Any) -> None:
    plan = plan_sources(stream, max_rows=None, name="set", columns={"chosen": "rejected"})
    assert next(read_work(plan.work[0])).content["chosen"] == ROWS[0]["rejected"]


def test_an_endless_stream_is_planned_without_being_read() -> None:
    def count() -> Iterator[dict[str, int]]:
        number = 0
        while True:
            yield {"chosen": number}
            number += 1

    plan = plan_sources(datasets.IterableDataset.from_generator(count), max_rows=None, name="set")
    assert [type(work) for work in plan.work] == [StreamShard]
    reader = read_work(plan.work[0])
    assert [next(reader).where for _ in range(3)] == ["set[0]", "set[1]", "set[2]"]


def test_a_generator_of_the_users_script_is_read_by_another_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import pickle, sys, threading, datasets\n"
        "from rayrm.data.sources import plan_sources\n"
        "lock = threading.Lock()  # what else a script has is not sent with it\n"
        "class Side(str): pass\n"
        "def pairs(files):\n"
        "    for name in files:\n"
        "        yield {'chosen': Side(name), 'rejected': 'b'}\n"
        "stream = datasets.IterableDataset.from_generator(pairs, gen_kwargs={'files': ['x', 'y']})\n"
        "plan = plan_sources(stream, max_rows=None, name='set')\n"
        "pickle.dump(plan.work, open(sys.argv[1], 'wb'))\n"
    )
    read = (
        "import pickle, sys; from rayrm.data.sources import read_work\n"
        "print([str(row.content['chosen']) for work in pickle.load(open(sys.argv[1], 'rb'))"
        " for row in read_work(work)])"
    )
    for command in ([str(tmp_path / "script.py")], ["-c", read]):
        ran = subprocess.run(
            [sys.executable, *command, str(tmp_path / "work")], capture_output=True, text=True, env=os.environ
        )
        assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "['x', 'y']"


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    frame = sys._getframe()
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset().map(lambda row: {"chosen": str(frame)})
    with pytest.raises(DataError, match=r"set .* cannot be sent to other processes"):
        plan_sources(stream, max_rows=None, name="set")


def test_a_stream_that_breaks_off_names_its_shard(stream: Any, tmp_path: Path) -> None:
    plan = plan_sources(stream, max_rows=None, name="set")
    for path in tmp_path.glob("1.*"):
        path.write_bytes(b"{damaged")
    assert len(list(read_work(plan.work[0]))) == 30
    with pytest.raises(DataError, match=r"set/shard-1 cannot be read beyond row 0"):
        list(read_work(plan.work[1]))


def test_a_hub_name_can_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert list(hub_stream(str(tmp_path))) == ROWS[:1]
    with pytest.raises(DataError, match="name and split"):
        hub_stream(f"{tmp_path}:nowhere")


MANY = [{"chosen": f"{n} {'x' * 200}", "rejected": f"{n} {'y' * 200}"} for n in range(2500)]


def on_disk(directory: Path, rows: list[dict[str, Any]] = MANY) -> datasets.Dataset:
    datasets.Dataset.from_list(rows).save_to_disk(str(directory), num_shards=2)
    return datasets.load_from_disk(str(directory))


def planned(source: Any, **changes: Any) -> SourcePlan:
    return plan_sources(source, **{"max_rows": None, "name": "set", "streaming": True, **changes})


def contents(plan: SourcePlan) -> list[Any]:
    return [row.content for work in plan.work for row in read_work(pickle.loads(pickle.dumps(work)))]


def test_a_dataset_on_disk_is_streamed_by_parts_that_do_not_carry_its_rows(tmp_path: Path) -> None:
    dataset = on_disk(tmp_path / "saved")
    plan = planned(dataset)
    assert [type(work) for work in plan.work] == [DatasetPart] * 3
    assert plan.names == ["set"]
    assert max(len(pickle.dumps(work)) for work in plan.work) < 5000
    assert contents(plan) == MANY
    last = list(read_work(plan.work[2]))[-1]
    assert (last.source, last.number, last.where) == (0, 2499, "set[2499]")
    again = planned(datasets.load_from_disk(str(tmp_path / "saved")))
    assert [content_of(work) for work in again.work] == [content_of(work) for work in plan.work]
    assert len({content_of(work) for work in plan.work}) == 3


@pytest.mark.parametrize("limit", [1, 1000, 1400, 9999])
def test_the_first_rows_of_what_is_streamed_are_those_of_an_indexed_set(tmp_path: Path, limit: int) -> None:
    dataset = on_disk(tmp_path / "saved")
    sources = {
        "saved": dataset,
        "shuffled": dataset.shuffle(seed=1),
        "mapped": dataset.map(lambda row: {"chosen": row["chosen"] + "!"}),
        "transformed": dataset.with_transform(lambda rows: {"chosen": rows["chosen"], "rejected": ["-"]}),
        "in memory": datasets.Dataset.from_list(MANY),
        "in memory, shuffled": datasets.Dataset.from_list(MANY).shuffle(seed=1),
        "both": datasets.concatenate_datasets([dataset, datasets.Dataset.from_list(MANY[:7] * 400)]),
        "stream": dataset.to_iterable_dataset(num_shards=4),
        "stream, shuffled": dataset.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=50),
        "list": MANY,
    }
    for kind, source in sources.items():
        found = contents(planned(source, max_rows=limit))
        assert found == contents(planned(source, max_rows=limit, streaming=False)), kind
        assert len(found) == min(limit, 5300 if kind == "both" else 2500), kind


def test_what_lies_in_memory_is_sent_as_its_rows(tmp_path: Path) -> None:
    memory = datasets.Dataset.from_list(MANY)
    for source in (MANY, memory, datasets.concatenate_datasets([on_disk(tmp_path / "saved"), memory] * 2)):
        plan = planned(source)
        assert {type(work) for work in plan.work} == {RowChunk}
        # A part's share of the rows, not the whole table that it is cut from.
        assert sum(len(pickle.dumps(work)) for work in plan.work) < 600 * len(contents(plan))


def test_a_stream_is_capped_without_being_read() -> None:
    def broken() -> Iterator[dict[str, int]]:
        yield {"chosen": 0}
        raise AssertionError("read while it was planned")

    plan = planned(datasets.IterableDataset.from_generator(broken), max_rows=10**9)
    (work,) = plan.work
    assert isinstance(work, StreamShard)
    assert work.stop == 10**9
    assert next(read_work(work)).where == "set[0]"


@pytest.mark.parametrize(
    ("limit", "expected"), [(20, [20, 0]), (90, [90, 0]), (100, [90, 10]), (999, [90, 30])]
)
def test_a_stream_that_others_follow_leaves_them_their_rows_of_a_common_limit(
    stream: Any, tmp_path: Path, limit: int, expected: list[int]
) -> None:
    (tmp_path / "after").mkdir()
    after = tmp_path / "after" / "rows.jsonl"
    after.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:30]))
    for streaming in (True, False):
        plan = planned([stream, str(after)], max_rows=limit, streaming=streaming)
        counts = [0, 0]
        for work in plan.work:
            counts[work.source] += len(list(read_work(work)))
        assert counts == expected


def test_hub_names_of_one_source_have_its_limit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "train.jsonl").write_text(
            "".join(json.dumps({"chosen": f"{name} {n}", "rejected": "no"}) + "\n" for n in range(5))
        )
    there = hub_stream
    monkeypatch.setattr(
        "rayrm.data.sources.hub_stream", lambda name: there(str(tmp_path / "set" / name[-3:]))
    )
    plan = planned(SourceConfig(path=["hub/one", "hub/two"], max_pairs=7))
    assert plan.names == ["hub/one", "hub/two"]
    assert [row["chosen"] for row in contents(plan)] == [*(f"one {n}" for n in range(5)), "two 0", "two 1"]


def test_a_dataset_whose_files_are_not_here_says_what_to_do(tmp_path: Path) -> None:
    plan = planned(on_disk(tmp_path / "saved"))
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"set cannot be read .*every node .*data\.mode=\"indexed\""):
        list(read_work(plan.work[1]))
