"""What rank 0 writes while a policy learns (`metrics.jsonl`, the report), and what a checkpoint keeps."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rayrm.errors import writing
from rayrm.rl.guard import GuardSettings, HackingGuard
from rayrm.rl.trl import SQUARE, TRLReward, versions_in
from rayrm.train.records import METRICS, read_records, replace_text

logger = logging.getLogger("rayrm.rl")

SHAPING = "shaping.json"
_REPORT_EVERY_S = 300.0
Report = Callable[[Path], Any]


class RunLog(TrainerCallback):  # type: ignore[misc]
    """Rank 0's log: `metrics.jsonl`, a line of progress for each record, what the guard warns of, and now and
    then the report."""

    def __init__(self, output_dir: Path, guard: GuardSettings, report: Report | None = None) -> None:
        self._file = output_dir / METRICS
        self._guard = HackingGuard(guard)
        self._report = report
        self._began = self._reported = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What follows the checkpoint that training goes on from is logged again."""
        kept = [record for record in read_records(self._file.parent) if record["step"] <= state.global_step]
        with writing(self._file):
            replace_text(self._file, "".join(json.dumps(record) + "\n" for record in kept))
        for record in kept:
            self._guard.see(record)
        self._began = self._reported = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "reward" not in logs:
            return
        record = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        record = {**over_all_ranks(record), **shares_of_versions(record), "step": state.global_step}
        record["seconds"] = time.monotonic() - self._began
        versions = versions_in(record)
        with writing(self._file), self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record | {"versions": versions}) + "\n")
        kl = f", KL {record['kl']:.4f}" if "kl" in record else ""
        logger.info(
            "step %d of %d: reward %+.3f (std %.3f)%s, %.1f tokens, version %s",
            state.global_step,
            state.max_steps,
            record["reward"],
            record["reward_std"],
            kl,
            record.get("completions/mean_length", float("nan")),
            " and ".join(versions) or "unknown",
        )
        for warning in self._guard.see(record):
            logger.warning("%s", warning)
        if self._report is not None and time.monotonic() - self._reported > _REPORT_EVERY_S:
            try:
                self._report(self._file.parent)
            except Exception as error:  # a picture of the run must not end it; it is made again at the end
                logger.warning("no report was made at step %d: %s", state.global_step, error)
            self._reported = time.monotonic()


class KeepShaping(TrainerCallback):  # type: ignore[misc]
    """Keeps with each checkpoint what the shaping has seen: every rank has seen the same."""

    def __init__(self, reward: TRLReward) -> None:
        self._reward = reward

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / SHAPING
        write_json(file, self._reward.state_dict())


def over_all_ranks(record: dict[str, float]) -> dict[str, float]:
    """The record with `NAME/score_std` of all scores behind it, where TRL has the mean of each rank's."""
    squares = {key.removesuffix(SQUARE): value for key, value in record.items() if key.endswith(f"/{SQUARE}")}
    kept = {key: value for key, value in record.items() if not key.endswith(f"/{SQUARE}")}
    variances = {name: square - record[f"{name}score_mean"] ** 2 for name, square in squares.items()}
    stds = {
        # Ranks' figures come in float32: below that there is nothing but rounding.
        f"{name}score_std": math.sqrt(variance) if variance > 1e-6 * squares[name] else 0.0
        for name, variance in variances.items()
    }
    return {**kept, **stds}


def shares_of_versions(record: dict[str, float]) -> dict[str, float]:
    """`NAME/version/<version>` as shares that add up to 1 for each reward.

    TRL averages what a reward logs over those ranks that logged it: a version that any rank met reads 1.
    """
    totals: dict[str, float] = {}
    for key, value in record.items():
        if "/version/" in key:
            name = key.split("/version/")[0]
            totals[name] = totals.get(name, 0.0) + value
    return {
        key: value / totals[key.split("/version/")[0]] for key, value in record.items() if "/version/" in key
    }


def last_checkpoint(output_dir: Path, *, with_shaping: bool) -> Path | None:
    """The latest whole checkpoint: the trainer's state is written last, what the shaping saw after it."""
    needed = ["trainer_state.json", *([SHAPING] if with_shaping else [])]
    found = [
        (int(place.name.removeprefix("checkpoint-")), place)
        for place in output_dir.glob("checkpoint-*")
        if place.name.removeprefix("checkpoint-").isdigit()
        and all((place / name).is_file() for name in needed)
    ]
    return max(found)[1] if found else None


def write_json(file: Path, content: Any) -> None:
    """Write JSON that is there whole or not at all."""
    with writing(file):
        replace_text(file, json.dumps(content, indent=1))
