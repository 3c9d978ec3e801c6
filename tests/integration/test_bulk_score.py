"""Bulk scoring by Ray Data's actors: killed in the middle, gone on with, and its pairs trained on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayrm import RewardConfig, RewardModel, RewardTrainer, cli
from rayrm.data.preference import parse_row
from rayrm.evaluation.best_of import Selection
from rayrm.evaluation.bulk_score import ScoreSettings, score_files
from rayrm.evaluation.score_ledger import partial_of
from tests.tiny import WORDS, save_tiny, write_rows

pytestmark = pytest.mark.ray
SAME = 1e-5  # float32, other neighbours in the batch


def flat_rows(count: int) -> list[dict[str, Any]]:
    """Four sampled completions a prompt, one a row."""
    rng = random.Random(3)
    return [
        {
            "id": n,
            "prompt": f"why {WORDS[n // 4 % len(WORDS)]} {n // 4}?",
            "completion": f" {' '.join(words)}",
        }
        for n in range(count)
        for words in [rng.choices(WORDS, k=rng.randint(1, 9))]
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_in_the_middle_the_same_command_goes_on_and_every_row_is_there_once(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", chat=False)
    rows = flat_rows(3000)
    rows[2100]["completion"] = "never " * 600  # more than the model has positions for
    write_rows(tmp_path / "in-0.jsonl", rows[:1500])
    write_rows(tmp_path / "in-1.jsonl", rows[1500:])
    subprocess.run(["gzip", "in-1.jsonl"], check=True)
    words = ["score", "model", "in-*", "--output", "out.jsonl", "--max-bad-row-fraction", "0.01"]
    ledger = partial_of(tmp_path / "out.jsonl") / "scores.jsonl"
    with subprocess.Popen(  # with a Ray of its own
        [sys.executable, "-m", "rayrm.cli", *words, "--num-workers", "2"],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as first:
        while not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 3):
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.002)
        os.kill(first.pid, signal.SIGKILL)
    whole = [line for line in ledger.read_bytes().splitlines(True) if line.endswith(b"\n")]
    kept = sum(len(json.loads(line)["scores"]) for line in whole)
    assert 0 < kept < 3000
    assert not Path("out.jsonl").exists()
    assert cli.main([*words, "--num-workers", "99"]) == 1
    assert "--num-workers (99)" in capfd.readouterr().err
    assert cli.main([*words, "--num-workers", "2"]) == 0
    said = capfd.readouterr().err
    assert f"going on after {kept:,} rows" in said
    assert "scored 2,999 rows into out.jsonl" in said
    assert "refused 1 rows, which are in out.jsonl.refused.jsonl" in said
    (refusal,) = read(Path("out.jsonl.refused.jsonl"))
    assert refusal["line"] == 601
    assert "position limit is 512" in refusal["message"]
    del rows[2100]
    written = read(Path("out.jsonl"))
    assert [{name: row[name] for name in row if name != "score"} for row in written] == rows
    expected = RewardModel.from_pretrained("model").score(
        [row["prompt"] for row in rows], [row["completion"] for row in rows]
    )
    np.testing.assert_allclose([row["score"] for row in written], expected, atol=SAME)


def test_pairs_of_scored_samples_train(ray_cluster: None, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", chat=False)
    source = write_rows(tmp_path / "in.jsonl", flat_rows(64))
    output = tmp_path / "pairs.parquet"
    done = score_files([str(source)], output, ScoreSettings(str(model)), selection=Selection("pairs"))
    assert done.num_written == 16
    pairs = pq.read_table(output).to_pylist()
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    scores = RewardModel.from_pretrained(model).score(
        [pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs]
    )
    np.testing.assert_allclose([pair["chosen_score"] for pair in pairs], scores, atol=SAME)
    assert [parse_row(pair).completions for pair in pairs] == [
        (pair["chosen"], pair["rejected"]) for pair in pairs
    ]
    trainer = RewardTrainer(
        str(model),
        RewardConfig(output_dir=str(tmp_path / "run"), max_steps=1, bf16=False, report_to="none"),
        train_dataset=str(output),
    )
    trainer.train()
    assert trainer.state.global_step == 1
