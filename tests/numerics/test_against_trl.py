"""Law 1 against TRL: the same pairs in the same order give TRL's losses, gradients and metrics.

Both trainers get raw rows, so tokenization, the EOS rule, margins, centering, the schedule, clipping and the
names and meanings of the metrics are compared along the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rayrm import RewardConfig, RewardTrainer
from rayrm.data.order import Order
from rayrm.data.packing import pack_rows
from rayrm.data.preference import parse_row
from rayrm.data.tokenize import TokenizedRow, tokenize_rows
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import Layout
from rayrm.model.loss import row_losses
from rayrm.objective import Objective
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.ray
trl = pytest.importorskip("trl")

# Both compute in float32, in other orders: 1e-7 a step. The tolerance is the law's.
TOLERANCE = 1e-4
NUM_STEPS = 20
PAIRS_PER_STEP = 8
CENTER = 0.01
# TRL averages an evaluation's extremes over its batches; ours are the set's.
EVALUATED = ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward")
LOGGED = (
    "loss", "grad_norm", "learning_rate", "epoch", "num_tokens",
    "accuracy", "margin", "mean_reward", "min_reward", "max_reward",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison: which rows, which optimizer."""

    conversational: bool
    explicit_prompt: bool
    settings: dict[str, Any]

    def rows(self, count: int, seed: int = 5) -> list[dict[str, Any]]:
        return tiny_rows(
            count,
            seed=seed,
            margin=True,
            conversational=self.conversational,
            explicit_prompt=self.explicit_prompt,
        )


ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 3}
SGD = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}
CASES = {
    "standard-adamw": Case(False, True, {**ADAMW, "logging_steps": 1}),
    "standard-sgd": Case(False, False, {**SGD, "logging_steps": 1}),
    "conversational-adamw": Case(True, False, {**ADAMW, "logging_steps": 5}),
    "conversational-sgd": Case(True, True, {**SGD, "logging_steps": 1}),
}


class _FirstGradients(TrainerCallback):
    """Keeps every parameter's gradient as the first optimizer step sees it."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            parameters = kwargs["model"].named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in parameters}


@dataclass(frozen=True)
class Runs:
    """Both trainers' logs, and TRL's gradients at step 1."""

    case: Case
    theirs: list[dict[str, Any]]
    ours: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor]


def settings_of(case: Case) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "max_steps": NUM_STEPS,
        "center_rewards_coefficient": CENTER,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 10,
        "disable_tqdm": True,
        "report_to": "none",
        **case.settings,
    }


@pytest.fixture(scope="module", params=CASES)
def runs(request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    # 100 pairs: the 13th step has 4, and the second epoch begins.
    train, evaluation = case.rows(100), case.rows(16, seed=6)
    first = _FirstGradients()
    settings = settings_of(case)
    theirs = trl.RewardTrainer(
        model=tiny_model(seed=1),
        args=trl.RewardConfig(str(root / "theirs"), **settings),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(evaluation),
        processing_class=tiny_tokenizer(bos=True),
        callbacks=[first],
    )
    theirs.train()
    ours = RewardTrainer(
        tiny_model(seed=1),
        RewardConfig(str(root / "ours"), **settings),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(bos=True),
    )
    ours.train()
    return Runs(case, theirs.state.log_history, ours.state.log_history, first.gradients)


def column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    """The values of one metric, in the order they were logged."""
    kind = "eval_loss" if key.startswith("eval_") else "grad_norm"
    return np.array([record[key] for record in records if kind in record], dtype=np.float64)


def test_every_logged_metric_is_trl_s(runs: Runs) -> None:
    steps = NUM_STEPS // runs.case.settings["logging_steps"]
    for key in LOGGED:
        theirs, ours = column(runs.theirs, key), column(runs.ours, key)
        assert len(theirs) == len(ours) == steps
        if key == "grad_norm":
            theirs, ours = np.ones(steps), ours / theirs
        # TRL's console rounds nothing in `log_history`, except the epoch.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=key)


def test_the_trajectory_moves(runs: Runs) -> None:
    losses = column(runs.theirs, "loss")
    assert np.ptp(losses) > 100 * TOLERANCE


def test_evaluation_metrics_are_trl_s(runs: Runs) -> None:
    for key in EVALUATED:
        theirs, ours = column(runs.theirs, key), column(runs.ours, key)
        assert len(theirs) == len(ours) == 2
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=key)


def test_every_parameter_s_first_gradient_is_trl_s(runs: Runs) -> None:
    model = tiny_model(seed=1)
    tokenizer = tiny_tokenizer(bos=True)
    rows = runs.case.rows(100)
    first = Order(len(rows), PAIRS_PER_STEP, RewardConfig().seed).epoch_rows(0)[:PAIRS_PER_STEP]
    pairs = tokenize_rows(tokenizer, [parse_row(rows[place]) for place in first], 1024)
    kept = [pair for pair in pairs if isinstance(pair, TokenizedRow)]
    assert len(kept) == PAIRS_PER_STEP
    batch = to_device(pack_rows(kept, tokenizer.pad_token_id), torch.device("cpu"), "loop")
    loss = row_losses(PackedScorer(model, Layout("shared"))(batch), batch, Objective(CENTER)).sum()
    (loss / PAIRS_PER_STEP).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == runs.gradients.keys()
    # TRL's callback sees gradients after clipping.
    norm = torch.nn.utils.get_total_norm([gradient for gradient in ours.values() if gradient is not None])
    clip = runs.case.settings.get("max_grad_norm", 1.0)
    scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
    for name, theirs in runs.gradients.items():
        gradient = ours[name]
        assert gradient is not None
        assert float((scale * gradient - theirs).norm()) <= TOLERANCE * float(theirs.norm()), name


def test_a_row_takes_the_same_place_in_both(runs: Runs) -> None:
    """`num_tokens` grows by the same amount each step: the order and the tokens of every step are TRL's."""
    np.testing.assert_array_equal(column(runs.ours, "num_tokens"), column(runs.theirs, "num_tokens"))
