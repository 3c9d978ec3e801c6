"""fp16 under every engine: the trajectory of torch's own `GradScaler`, its left-out steps included. And bf16.

A CPU computes half precision slowly, and as a GPU does. Gradients are clipped to a fraction of their norm,
under plain gradient descent, so that clipping what is still multiplied by the loss scale would show. The
scale grows every other step, where torch waits for 2,000, so that gradients overflow by themselves.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrm.train import loss_scale, rank_model
from rayrm.train.engine import TorchEngine
from tests.numerics.ranks import GATHERED, Variant, outcome_of, run_variants, tokenized
from tests.numerics.test_same_gradients import untimed

pytestmark = pytest.mark.timeout(600)
NUM_STEPS, GROWS_EVERY = 12, 2
STEP: dict[str, Any] = {
    "optim": "sgd",
    # Above that rounding alone grows from step to step.
    "learning_rate": 0.03,
    "max_grad_norm": 0.2,
    "per_device_train_batch_size": 4,
    "max_steps": NUM_STEPS,
}
OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "offloaded": {"deepspeed": OFFLOADED},
    "zero3": GATHERED,
}

# Of eleven bits; float32's rounding turns the last of some product, by which norms were off by 8e-5.
NEAR = 5e-4
BF16 = ("torch", "zero1", "zero2", "zero3")


class ScaledByTorch(TorchEngine):
    """The reference: `GradScaler` around torch's optimizer, as PyTorch's documentation writes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grad_scaler = torch.amp.GradScaler("cpu", growth_interval=GROWS_EVERY)
        # Dense gradients, as torch makes them by itself.
        self.module.model.get_input_embeddings().sparse = False

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(self._grad_scaler.scale(loss))

    def step(self) -> torch.Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._grad_scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        scale = self._grad_scaler.get_scale()
        self._grad_scaler.step(self.optimizer)
        self._grad_scaler.update()
        if self._grad_scaler.get_scale() >= scale:
            self.scheduler.step()
        self.optimizer.zero_grad()
        return norm


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank each: every engine's run, the reference's, and one in float32."""
    root = tmp_path_factory.mktemp("fp16")
    rows = tokenized(38)
    longest = max(len(row.ids) for row in rows)
    # Two micro-batches a step.
    variants = [Variant(name, {**STEP, **chosen}, max_tokens=2 * longest) for name, chosen in ENGINES.items()]
    with pytest.MonkeyPatch.context() as patch:
        run_variants([replace(variants[0], name="fp32")], root, rows)
        patch.setattr(rank_model, "resolve_precision", lambda *_: "bf16")
        by_name = {variant.name: variant for variant in variants}
        run_variants([replace(by_name[name], name=f"{name}-bf16") for name in BF16], root, rows)
        patch.setattr(loss_scale, "_INTERVAL", GROWS_EVERY)
        patch.setattr(rank_model, "resolve_precision", lambda *_: "fp16")
        with pytest.MonkeyPatch.context() as its_own:
            its_own.setattr("rayrm.train.build_engine.TorchEngine", ScaledByTorch)
            run_variants([replace(variants[0], name="reference")], root, rows)
        run_variants(variants, root, rows)
        adamw = {**STEP, "optim": "adamw_torch_fused", "save_strategy": "steps", "save_steps": 2}
        for name in ("torch", "zero0", "zero2", "zero3"):
            kept = Variant(f"{name}-adamw", {**adamw, **ENGINES[name]}, max_tokens=2 * longest)
            run_variants([kept, replace(kept, name=f"{name}-resumed", stop_in=9)], root, rows)
    return root


def rates(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record["learning_rate"] for line in lines if "loss" in (record := json.loads(line))]


def test_the_reference_clips_and_leaves_steps_out(runs: Path) -> None:
    norms = outcome_of(runs / "reference").norms
    left_out = ~np.isfinite(norms)
    assert len(norms) == NUM_STEPS
    assert 2 <= left_out.sum() <= NUM_STEPS / 2
    assert (norms[~left_out] > 2 * STEP["max_grad_norm"]).all()


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_takes_the_steps_of_grad_scaler(runs: Path, name: str) -> None:
    ours, reference = outcome_of(runs / name), outcome_of(runs / "reference")
    sound = np.isfinite(reference.norms)
    assert np.array_equal(np.isfinite(ours.norms), sound)
    # A step that was left out is none of the schedule either.
    assert rates(runs / name) == rates(runs / "reference")
    np.testing.assert_allclose(ours.losses, reference.losses, rtol=NEAR)
    np.testing.assert_allclose(ours.norms[sound], reference.norms[sound], rtol=NEAR)
    for key, weight in reference.weights.items():
        assert float((ours.weights[key] - weight).norm() / weight.norm()) <= NEAR, key


def test_until_a_step_is_left_out_the_trajectory_is_that_of_float32(runs: Path) -> None:
    half, whole = outcome_of(runs / "torch"), outcome_of(runs / "fp32")
    first = int(np.isfinite(half.norms).argmin())
    assert first >= 2
    # Eleven bits keep three digits.
    np.testing.assert_allclose(half.losses[: first + 1], whole.losses[: first + 1], rtol=1e-2)
    np.testing.assert_allclose(half.norms[:first], whole.norms[:first], rtol=1e-2)


@pytest.mark.parametrize("name", BF16[1:])
def test_gradients_are_averaged_in_float32(runs: Path, name: str) -> None:
    """DeepSpeed by itself averages those of linear layers in 16 bits: norms were off by 2e-4."""
    ours, reference = (outcome_of(runs / f"{which}-bf16") for which in (name, "torch"))
    # Before rounding, which grows from step to step, turns a bit of a product.
    np.testing.assert_allclose(ours.norms[:3], reference.norms[:3], rtol=1e-5)
    np.testing.assert_allclose(ours.losses[:3], reference.losses[:3], rtol=1e-5)


@pytest.mark.parametrize("name", ["torch", "zero0", "zero2", "zero3"])
def test_a_resumed_run_goes_on_with_the_scale_it_had(runs: Path, name: str) -> None:
    assert not np.isfinite(outcome_of(runs / f"{name}-adamw").norms).all()
    assert untimed(runs / f"{name}-adamw") == untimed(runs / f"{name}-resumed")
    whole, resumed = (outcome_of(runs / f"{name}-{kind}").weights for kind in ("adamw", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
