"""A stream of many files on a Ray of two CPUs, of which a training worker holds one: it comes to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.tiny import tiny_rows

pytestmark = pytest.mark.ray
FILES = 70

EPOCH = """
    import json, sys
    from pathlib import Path

    import ray
    from rayrm.data.order import Cursor
    from rayrm.data.streaming import open_stream
    from tests.tiny import tiny_tokenizer

    here = Path(sys.argv[1])
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)

    @ray.remote(num_cpus=1)
    class Worker:
        def epoch(self, stream):
            before, rows = Cursor(), []
            for step in stream.steps(before):
                if before.epoch:
                    return rows
                rows += [int(row.margin) for row in step.fetch(range(step.index.num_rows))]
                before = step.after

    worker = Worker.remote()
    source = open_stream(str(here / "files"), tiny_tokenizer(), max_length=200)
    settings = dict(
        rows_per_step=16, num_ranks=1, seed=3, window=256, shuffle=True, drop_last=False,
        quarantine_path=here / "quarantine.jsonl", max_bad_row_fraction=0.01, max_tasks=None,
    )
    with source.started(**settings) as steps:
        rows = ray.get(worker.epoch.remote(steps), timeout=600)
    (here / "rows.json").write_text(json.dumps(rows))
"""


def test_many_uneven_files_stream_to_the_end_beside_a_worker_that_holds_a_cpu(tmp_path: Path) -> None:
    sizes = [1490 if number == 40 else 1 + number * 37 % 60 for number in range(FILES)]  # no whole windows
    rows = [json.dumps({**row, "margin": float(n)}) + "\n" for n, row in enumerate(tiny_rows(sum(sizes)))]
    (tmp_path / "files").mkdir()
    for number, size in enumerate(sizes):
        begin = sum(sizes[:number])
        (tmp_path / "files" / f"{number:02}.jsonl").write_text("".join(rows[begin : begin + size]))
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EPOCH), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=700,
    )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads((tmp_path / "rows.json").read_text())
    assert sorted(seen) == list(range(sum(sizes)))
    assert seen != sorted(seen)
