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

from rayrm.data.sources import StreamShard, hub_stream, plan_sources, read_work
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
