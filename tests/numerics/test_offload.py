"""Law 1 with optimizer or parameters offloaded and with ZeRO++'s partition: where state lies changes nothing.

Each run saves checkpoints, and is run once more, stopped in the middle and resumed, which gives its bits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm.errors import ConfigError
from rayrm.train.worker import train_rank
from rayrm.train.zero import DeepSpeedEngine
from tests.numerics.ranks import GATHERED, Variant, job_of, outcome_of, run_variants, tokenized
from tests.numerics.test_same_gradients import differences, untimed

# Training and its repetition for all forms in one fixture.
pytestmark = pytest.mark.timeout(1200)
CPU = {"device": "cpu"}
THREE = GATHERED["deepspeed"]["zero_optimization"]
FORMS: dict[str, dict[str, Any]] = {
    "optimizer_1": {"stage": 1, "offload_optimizer": CPU},
    "optimizer_2": {"stage": 2, "offload_optimizer": CPU},
    "optimizer_3": {**THREE, "offload_optimizer": CPU},
    "parameters": {**THREE, "offload_param": CPU},
    "all": {**THREE, "offload_optimizer": CPU, "offload_param": CPU},
    "hpz": {**THREE, "zero_hpz_partition_size": 2},
}
RESUMED = ["optimizer_1", "optimizer_2", "all", "hpz"]
NUM_STEPS = 11
# AdamW has state to lose; the norm before clipping tells a gradient that is wrong by a factor.
STEP: dict[str, Any] = {
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "max_steps": NUM_STEPS,
    "save_strategy": "steps",
    "save_steps": 3,
}


def forms(rows: list[Any]) -> list[Variant]:
    longest = max(len(row.ids) for row in rows)
    whole = [
        Variant(
            form,
            {**STEP, "deepspeed": {"zero_optimization": zero}},
            max_tokens=longest,
            num_ranks=2,
            lora=form == "optimizer_2",
        )
        for form, zero in FORMS.items()
    ]
    again = [variant for variant in whole if variant.name in RESUMED]
    return whole + [replace(variant, name=f"{variant.name}_resumed", stop_in=8) for variant in again]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    rows = tokenized(38)
    reference = Variant("reference", {**STEP, "per_device_train_batch_size": 4}, padded=True)
    run_variants([reference, replace(reference, name="lora", lora=True), *forms(rows)], root, rows)
    return root


@pytest.mark.parametrize("form", FORMS)
def test_where_state_lies_does_not_change_the_trajectory(runs: Path, form: str) -> None:
    outcome = outcome_of(runs / form)
    assert len(outcome.losses) == NUM_STEPS
    reference = outcome_of(runs / ("lora" if form == "optimizer_2" else "reference"))
    assert differences(outcome, reference) == []


@pytest.mark.parametrize("form", RESUMED)
def test_a_resumed_run_gives_the_bits_of_one_that_was_not_interrupted(runs: Path, form: str) -> None:
    assert untimed(runs / form) == untimed(runs / f"{form}_resumed")
    whole, resumed = outcome_of(runs / form).weights, outcome_of(runs / f"{form}_resumed").weights
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_offloaded_optimizer_keeps_copies_and_its_state_apart_from_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    step = DeepSpeedEngine.step

    def watched(engine: Any) -> torch.Tensor:
        zero = engine._engine.optimizer
        seen.append(bool(zero.cpu_offload) and type(zero.optimizer) is torch.optim.AdamW)
        return step(engine)

    monkeypatch.setattr(DeepSpeedEngine, "step", watched)
    settings = {**STEP, "max_steps": 1, "deepspeed": {"zero_optimization": FORMS["optimizer_2"]}}
    train_rank(job_of(Variant("run", settings), tmp_path, tokenized(8)), lambda record: None)
    assert seen == [True]


def test_zero_plus_plus_partitions_must_divide_the_workers(tmp_path: Path) -> None:
    settings = {**STEP, "deepspeed": {"zero_optimization": FORMS["hpz"]}}
    with pytest.raises(ConfigError, match=r"`.*zero_hpz_partition_size` \(2\) must divide"):
        train_rank(job_of(Variant("run", settings), tmp_path, tokenized(8)), lambda record: None)


QUANTIZED = {**THREE, "zero_quantized_weights": True, "zero_quantized_gradients": True}


def test_quantized_communication_is_refused_on_a_cpu_by_name() -> None:
    settings = {**STEP, "deepspeed": {"zero_optimization": QUANTIZED}}
    with pytest.raises(ConfigError, match=r"`.*zero_quantized_weights` \(true\) needs a GPU"):
        job_of(Variant("run", settings), Path("unused"), tokenized(8))


@pytest.mark.gpu
def test_quantized_communication_stays_near_the_trajectory_on_a_gpu(tmp_path: Path) -> None:
    """Weights in 8 bits, gradients in 4: law 1 does not hold, training does."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = tokenized(38)
    quantized = {"deepspeed": {"zero_optimization": QUANTIZED}, "use_cpu": False}
    variants = [Variant("plain", STEP), Variant("quantized", {**STEP, **quantized})]
    run_variants(variants, tmp_path, rows)
    losses, reference = outcome_of(tmp_path / "quantized").losses, outcome_of(tmp_path / "plain").losses
    assert abs(losses - reference).max() < 0.1
