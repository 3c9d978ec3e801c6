"""One row of a file whose loss is NaN, from the first failed command to the finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig

from rayrm import RewardConfig, RewardTrainer
from rayrm.errors import RayrmError
from rayrm.train.checkpoint import checkpoints
from tests.integration.test_resume import untimed
from tests.tiny import save_tiny, tiny_model, tiny_rows, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
BAD, TOKEN = 25, "<|tools|>"
STEPS_PER_EPOCH = 5


class FailsOnce(torch.optim.AdamW):
    """AdamW that raises in the step after checkpoint 8, once."""

    def __init__(self, params: Any, *, lr: float, marker: str) -> None:
        super().__init__(params, lr=lr)
        self._marker = Path(marker)

    def step(self, closure: Any = None) -> Any:
        sealed = self._marker.parent / "run" / "checkpoint-8" / "checkpoint.json"
        if sealed.exists() and not self._marker.exists():
            self._marker.touch()
            raise InterruptedError("once")
        return super().step(closure)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny(home / "base", seed=1)
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    model.save_pretrained(home / "base")
    rows = tiny_rows(8 * STEPS_PER_EPOCH)
    rows[BAD]["chosen"] += TOKEN
    # A row that is refused, too.
    write_rows(home / "pairs.jsonl", [*rows, {"prompt": "Why?"}])
    return home


def train(home: Path, root: Path, nonfinite_loss: Any, workers: int = 0, max_failures: int = 0) -> None:
    root.mkdir(exist_ok=True)
    RewardTrainer(
        str(home / "base"),
        RewardConfig(
            str(root / "run"),
            nonfinite_loss=nonfinite_loss,
            max_steps=2 * STEPS_PER_EPOCH,
            per_device_train_batch_size=8 // max(workers, 1),
            learning_rate=1e-3,
            max_bad_row_fraction=0.1,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=2,
            save_steps=1,
        ),
        train_dataset=str(home / "pairs.jsonl"),
        optimizer_cls_and_kwargs=(FailsOnce, {"lr": 1e-3, "marker": str(root / "failed")}),
        scaling_config=ScalingConfig(num_workers=workers) if workers else None,
        run_config=RunConfig(failure_config=FailureConfig(max_failures=max_failures)) if workers else None,
        auto_resume=True,
    ).train()


def counted(directory: Path) -> list[dict[str, float]]:
    """The records, without what only a run that skips says."""
    return [
        {name: value for name, value in record.items() if name != "skipped_steps"}
        for record in untimed(directory)
    ]


def quarantined(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "run" / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_row_is_named_and_the_run_then_goes_on_without_its_steps(
    home: Path, tmp_path: Path, workers: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    whole.mkdir()
    (whole / "failed").touch()
    train(home, whole, "skip", workers)

    with pytest.raises(RayrmError, match=r"not finite at step (\d), in \d of its 8 rows") as stopped:
        train(home, run, "stop", workers)
    bad_step = int(str(stopped.value).partition("at step ")[2][0])
    assert [path.name for path in checkpoints(run / "run")] == [f"checkpoint-{n}" for n in range(1, bad_step)]
    # The message says what to type; what was trained before is kept.
    if workers:
        (run / "failed").touch()
    else:
        with pytest.raises(InterruptedError, match="once"):
            train(home, run, "skip")
    train(home, run, "skip", workers)

    assert counted(run / "run") == counted(whole / "run")
    assert quarantined(run) == quarantined(whole)
    refused, first, second = quarantined(run)
    assert (refused["row"], refused["reason"]) == (8 * STEPS_PER_EPOCH, "missing-chosen")
    for entry, steps in ((first, range(1, 6)), (second, range(6, 11))):
        assert (entry["row"], entry["reason"]) == (BAD, "nonfinite-loss")
        assert entry["step"] in steps
        assert entry["message"].startswith(f"{home / 'pairs.jsonl'}:{BAD + 1}: ")
    assert first["step"] == bad_step


def test_an_error_of_ours_ends_the_run_however_often_lost_workers_are_replaced(
    home: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failed").touch()
    with pytest.raises(RayrmError, match=r"not finite at step \d"):
        train(home, tmp_path / "run", "stop", workers=2, max_failures=-1)
    assert not list((tmp_path / "run" / "run").glob(".error*"))
