"""`trainer_state.json` of a checkpoint: where training stands, as transformers' tools read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState

from rayrm.config import RewardConfig
from rayrm.train.checkpoint import TrainState
from rayrm.train.loop import Record, Schedule

TRAINER_STATE = "trainer_state.json"


def trainer_state_json(
    state: TrainState, records: Sequence[Record], config: RewardConfig, schedule: Schedule, output_dir: Path
) -> bytes:
    """The file's content: transformers' `TrainerState`, with everything that was logged."""
    found = TrainerState(
        epoch=state.epoch,
        global_step=state.step,
        max_steps=schedule.num_steps,
        logging_steps=config.interval("logging", schedule.num_steps),
        eval_steps=config.interval("eval", schedule.num_steps),
        save_steps=config.interval("save", schedule.num_steps),
        train_batch_size=config.per_device_train_batch_size,
        num_train_epochs=int(-(-config.num_train_epochs // 1)),
        num_input_tokens_seen=state.num_tokens,
        log_history=[dict(record) for record in records],
        best_metric=state.best_metric,
        best_model_checkpoint=state.best_checkpoint and str(output_dir / state.best_checkpoint),
    )
    return (json.dumps(dataclasses.asdict(found), indent=2, sort_keys=True) + "\n").encode()
