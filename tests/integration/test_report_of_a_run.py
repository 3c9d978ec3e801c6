"""The report of a run that was trained, with what it logged and evaluated itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrm.config import RewardConfig
from rayrm.report.run import write_run_report
from rayrm.train.trainer import RewardTrainer
from tests.tiny import save_tiny, tiny_rows, write_rows

pytestmark = pytest.mark.ray


def test_the_report_of_a_real_run_says_what_it_logged(ray_cluster: None, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    rows = tiny_rows(40)
    del rows[3]["chosen"]
    train, held = (
        write_rows(tmp_path / "train.jsonl", rows),
        write_rows(tmp_path / "held.jsonl", tiny_rows(20)),
    )
    config = RewardConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        max_bad_row_fraction=0.1,
        disable_tqdm=True,
    )
    RewardTrainer(
        model=str(model), args=config, train_dataset=str(train), eval_dataset={"held": str(held)}
    ).train()
    found = json.loads(write_run_report(tmp_path / "run").with_suffix(".json").read_text())
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found["notes"] == []
    curve = found["sections"]["curves"]["loss"]
    assert curve["training"]["value"] == [record["loss"] for record in log if "loss" in record]
    assert curve["held"]["step"] == [2, 4]
    last = [record["eval_held_accuracy"] for record in log if "eval_held_accuracy" in record][-1]
    assert found["facts"]["accuracy on held"]["value"] == last
    assert found["facts"]["pairs trained on"] == pytest.approx(16)
    assert found["sections"]["set:held"]["margins"]["count"] == 20, "training evaluates at its end"
    (refused,) = found["sections"]["data"]["refused"]
    assert refused["missing-chosen"] == 1
