"""Sweeps by Ray Tune on a tiny model: each trial in its own directory, the best named, failures shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrm import cli
from rayrm.errors import RayrmError
from rayrm.train.sweep import run_sweep
from tests.integration.test_cli import write_rows
from tests.tiny import save_tiny, tiny_rows

pytestmark = pytest.mark.ray


@pytest.fixture
def base(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a tiny run, with relative paths: trials have current directories of their own."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(24, conversational=True))
    write_rows(tmp_path / "heldout.jsonl", tiny_rows(16, seed=5, conversational=True))
    return [
        "model.name=base",
        "data.train=pairs.jsonl",
        "data.eval=heldout.jsonl",
        "output_dir=sweep",
        "bf16=false",
        "max_steps=6",
        "per_device_train_batch_size=4",
        "gradient_checkpointing=false",
        "save_strategy=no",
    ]


def eval_losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record["eval_loss"] for record in map(json.loads, lines) if "eval_loss" in record]


def test_trials_in_process_cover_the_grid_and_the_best_is_named(
    base: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--param", "learning_rate=0,1e-2", "--param", "model.lora.r=2,4", "--metric", "eval_loss"]
    assert cli.main(["sweep", *base, *words, "--mode", "min", "--max-concurrent", "2"]) == 0
    out = capfd.readouterr().out
    table = [line.split() for line in out.splitlines() if line.startswith("trial-")]
    assert [row[:3] for row in table] == [
        ["trial-01", "0", "2"],
        ["trial-02", "0", "4"],
        ["trial-03", "1e-2", "2"],
        ["trial-04", "1e-2", "4"],
    ]
    losses = [eval_losses(Path("sweep", row[0]))[-1] for row in table]
    assert [float(row[3]) for row in table] == pytest.approx(losses, abs=5e-5)
    # A rate of zero trains nothing: its trials stay at the fresh head's loss, and one of the others learns.
    best = losses.index(min(losses))
    assert best >= 2
    assert [row[4:] == ["best"] for row in table] == [number == best for number in range(4)]
    assert f"in {Path('sweep').resolve() / table[best][0]}" in out
    assert json.loads(Path("sweep/sweep.json").read_text())["best"]["metric"] == losses[best]


def test_trials_with_workers_train_and_a_failed_one_is_shown_with_its_reason(base: list[str]) -> None:
    sweep = run_sweep(
        None,
        [*base, "cluster.num_workers=2", "zero_stage=2"],
        ["learning_rate=1e-3", "max_length=64,3"],
        metric="eval_loss",
        mode="min",
    )
    trained, failed = sweep.trials
    assert trained.metric == eval_losses(trained.directory)[-1]
    assert sweep.best == trained
    assert failed.metric is None
    assert "max_length" in str(failed.failure)
    assert not (failed.directory / "metrics.jsonl").exists()


def test_a_sweep_whose_trials_all_fail_is_an_error_with_the_reasons(base: list[str]) -> None:
    with pytest.raises(RayrmError) as failure:
        run_sweep(None, base, ["model.lora.target_modules=absent_one,absent_two"])
    assert "absent_one" in str(failure.value)
    assert "absent_two" in str(failure.value)
    assert json.loads(Path("sweep/sweep.json").read_text())["best"] is None
