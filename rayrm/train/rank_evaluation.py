"""The evaluation sets of a run, scored by all its ranks while it trains, and the record that is kept of them.

Every rank has all scores and computes the same figures; rank 0 alone writes them. In `<run>/evaluation/` lies
what the newest evaluation found, and with `load_best_model_at_end` the best one: that of the saved model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import RayrmError
from rayrm.metrics.attributes import rewards_of
from rayrm.metrics.names import prefix_of
from rayrm.metrics.outcomes import outcomes_of
from rayrm.objective import Objective
from rayrm.train.checkpoint import TrainState
from rayrm.train.engine import Engine
from rayrm.train.evaluation import Scores, score_rows, speed_of
from rayrm.train.evaluation_record import EvaluationRecord, evaluate_set, set_metrics, write_evaluation
from rayrm.train.job import TrainJob
from rayrm.train.loop import Record
from rayrm.train.rank import Rank
from rayrm.train.rank_model import RankModel
from rayrm.train.user_metrics import prefixed

EVALUATION_DIR = "evaluation"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One set of a run: its scores, and what is logged of it."""

    rows: TokenizedSet
    scores: Scores
    record: Record


def evaluated_sets(
    job: TrainJob, engine: Engine, model: RankModel, rank: Rank, objective: Objective, state: TrainState
) -> Iterator[tuple[str, Evaluated]]:
    """Each set by its name, as soon as it is scored. Collective: all ranks run through it together."""
    parts = job.config.sequence_parallel_size
    batch_rows = job.config.per_device_eval_batch_size * (rank.count // parts)
    for name, rows in job.eval_sets.items():
        began = time.time()
        scores = score_rows(
            engine.scores,
            rows,
            layout=model.layout,
            path=model.module.path,
            part=model.module.part,
            pad_token_id=model.pad_token_id,
            max_tokens=model.max_tokens,
            attention_weight=model.attention_weight,
            device=rank.device,
        )
        if bad := int((~np.isfinite(scores)).sum()):
            raise RayrmError(
                f"{bad} of {len(scores)} scores of the evaluation set are not finite after step "
                f"{state.step}: `{name or 'eval'}` has rows that the model cannot score. Look for rows "
                "unlike the others, or train in fp32 (`bf16=false`); the last checkpoint is intact."
            )
        metrics = set_metrics(scores, rows.index, objective)
        prefix = prefix_of(name)
        if job.metrics is not None:
            metrics |= job.metrics.of(rewards_of(scores), rows.index)
        record = prefixed(prefix, metrics) | speed_of(prefix, began, rows.num_rows, batch_rows)
        record |= {f"{prefix}num_tokens": state.num_tokens, "step": state.step, "epoch": state.epoch}
        yield name, Evaluated(rows, scores, record)


def keep_evaluation(
    job: TrainJob, sets: Mapping[str, Evaluated], objective: Objective, state: TrainState, value: float | None
) -> None:
    """Write what an evaluation found, unless the model that will be saved is another one's.

    `value`: that of `metric_for_best_model`, which `state` has taken note of; None: there is none.
    Raises RunDirectoryError where the disk takes no file.
    """
    if job.config.load_best_model_at_end and state.step > 0 and value not in (None, state.best_metric):
        return
    measured = {
        name or "eval": evaluate_set(one.scores, one.rows, objective, job.tokenizer)
        for name, one in sets.items()
    }
    record = EvaluationRecord(job.output_dir.name, measured, step=state.step)
    write_evaluation(record, job.output_dir / EVALUATION_DIR)


def histograms_of(name: str, one: Evaluated) -> dict[str, npt.NDArray[np.float64]]:
    """The scores of a set and the margins of its comparisons, by their names in TensorBoard."""
    outcomes = outcomes_of(rewards_of(one.scores), one.rows.index)
    prefix = f"eval/{name}_" if name else "eval/"
    spread = {"chosen_reward": outcomes.won, "rejected_reward": outcomes.lost, "margins": outcomes.margin}
    return {prefix + key: values for key, values in spread.items() if len(values)}
