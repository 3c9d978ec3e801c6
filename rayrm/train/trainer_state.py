"""transformers' `TrainerState` of a run: what callbacks see, and what transformers' tools read in
`trainer_state.json`, of each checkpoint and of the run when it has ended."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState

from rayrm.config import RewardConfig
from rayrm.train.checkpoint import TrainState, step_of
from rayrm.train.loop import Record, Schedule

TRAINER_STATE = "trainer_state.json"


def trainer_state(
    state: TrainState, records: Sequence[Record], config: RewardConfig, schedule: Schedule, output_dir: Path
) -> TrainerState:
    """Where training stands, with everything that was logged."""
    found = TrainerState(
        max_steps=schedule.num_steps,
        logging_steps=config.interval("logging", schedule.num_steps),
        eval_steps=config.interval("eval", schedule.num_steps),
        stateful_callbacks=dict(state.callbacks),
        save_steps=config.interval("save", schedule.num_steps),
        train_batch_size=config.per_device_train_batch_size,
        num_train_epochs=_epochs(config, schedule),
        log_history=[dict(record) for record in records],
    )
    stand(found, state, output_dir)
    return found


def stand(found: TrainerState, state: TrainState, output_dir: Path) -> None:
    """Bring `found` to where training stands now."""
    found.global_step, found.epoch = state.step, state.epoch
    found.num_input_tokens_seen = state.num_tokens
    found.best_metric, best = state.best_metric, state.best_checkpoint
    found.best_global_step = step_of(Path(best)) if best else None
    found.best_model_checkpoint = str(output_dir / best) if best else None


def state_json(found: TrainerState) -> str:
    """The content of `trainer_state.json`."""
    return json.dumps(dataclasses.asdict(found), indent=2, sort_keys=True) + "\n"


def log_history(checkpoint: Path) -> list[Record]:
    """The logging events of a run up to its checkpoint; none where that does not say them."""
    file = checkpoint / TRAINER_STATE
    return list(json.loads(file.read_text())["log_history"]) if file.exists() else []


def _epochs(config: RewardConfig, schedule: Schedule) -> int:
    """How many epochs training enters; transformers' word for a stream is a number without end."""
    if config.max_steps < 1:
        return math.ceil(config.num_train_epochs)
    if schedule.steps_per_epoch is None:
        return sys.maxsize
    return math.ceil(schedule.num_steps / schedule.steps_per_epoch)
