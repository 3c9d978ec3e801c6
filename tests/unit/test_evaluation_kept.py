"""Which evaluation of a run its directory keeps: the newest, or that of the model which will be saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rayrm.config import RewardConfig
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.objective import Objective
from rayrm.train.checkpoint import TrainState
from rayrm.train.evaluation_record import read_evaluation
from rayrm.train.rank_evaluation import Evaluated, keep_evaluation
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(("loads_best", "kept"), [(True, 2), (False, 3)])
def test_the_record_is_of_the_model_that_will_be_saved(tmp_path: Path, loads_best: bool, kept: int) -> None:
    config = RewardConfig(
        str(tmp_path), eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=loads_best
    )
    job: Any = SimpleNamespace(config=config, output_dir=tmp_path, tokenizer=tiny_tokenizer())
    pair = TokenizedRow.pair(np.array([1, 2], np.int32), np.array([1, 3], np.int32))
    one = Evaluated(TokenizedSet.from_rows([pair]), np.array([1.0, 0.0]), {})
    best = np.inf
    for step, loss in enumerate((0.7, 0.5, 0.6), start=1):
        best = min(best, loss)
        value = loss if loads_best else None
        keep_evaluation(job, {"": one}, Objective(), TrainState(step=step, best_metric=best), value)
    assert read_evaluation(tmp_path / "evaluation").step == kept
