"""A step never waits for the device: it runs whole on one whose values cannot be read.

On torch's `meta` device tensors have shapes and no values: whatever would make a GPU's host wait (`item`,
`nonzero`, `bool(tensor)`, a copy to the CPU) raises there. The engine treats it as it does a GPU; on the CPU
it keeps the embedding's gradient by touched row. The padded layout is left out: the forward is transformers'
own there, which asks whether the mask has padding at all. Tests marked `gpu` ask torch itself, on a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrm.config import RewardConfig
from rayrm.data.packing import pack_rows
from rayrm.model.attention import AttentionPath
from rayrm.model.forward import PackedScorer
from rayrm.model.host_copy import copied
from rayrm.model.layout import Layout
from rayrm.objective import Objective
from rayrm.train.build import ModelSource, build_model
from rayrm.train.engine import TorchEngine
from rayrm.train.loop import Interval
from rayrm.train.optimizer import make_optimizer, make_scheduler
from rayrm.train.precision import Precision
from rayrm.train.step import StepTotals, train_step
from tests.numerics.ranks import tokenized
from tests.numerics.test_objectives import OBJECTIVES, ROWS
from tests.tiny import tiny_model, tiny_tokenizer

META = torch.device("meta")


@pytest.fixture
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # It knows no meta device, also where it is only turned off or asked about.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def engine_on(
    device: torch.device, layout: Layout, path: AttentionPath, precision: Precision = "fp32", **settings: Any
) -> TorchEngine:
    config = RewardConfig(bf16=False, **settings)
    # Heads of 16: the smallest that FlexAttention takes on a GPU.
    model = build_model(ModelSource(tiny_model(hidden_size=64)), config, tiny_tokenizer()).to(device)
    module = PackedScorer(model, layout, path=path)
    optimizer = make_optimizer(module, config, None)
    return TorchEngine(
        module,
        optimizer,
        make_scheduler(optimizer, config, 10),
        device=device,
        world_size=1,
        max_grad_norm=config.max_grad_norm,
        precision=precision,
    )


def step(engine: TorchEngine, layout: Layout) -> StepTotals:
    """A step of two micro-batches."""
    batch = pack_rows(tokenized(4), 0, share=layout.name == "shared")
    return train_step(engine, [batch, batch], 8, objective=Objective(center=0.01))


def two_steps(layout: Layout, path: AttentionPath = "loop", **settings: Any) -> StepTotals:
    """The totals of the second step on the device without values."""
    engine = engine_on(META, layout, path, **settings)
    step(engine, layout)
    return step(engine, layout)


# Of the paths, "tiled" is the CPU's own, and FlexAttention refuses this device; of the optimizers the
# default, `adamw_torch_fused`, has no kernel for it.
@pytest.mark.usefixtures("_no_autocast")
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("path", ["loop", "varlen", "dense"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_step_reads_nothing_from_the_device(
    layout: Any, path: AttentionPath, checkpointing: bool, optim: str
) -> None:
    totals = two_steps(Layout(layout), path, optim=optim, gradient_checkpointing=checkpointing)
    assert totals.sums.device == totals.extremes.device == totals.grad_norm.device == META


@pytest.mark.usefixtures("_no_autocast")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_rows_of_all_kinds_reads_nothing_from_the_device(name: str) -> None:
    engine = engine_on(META, Layout("shared"), "loop", optim="sgd")
    batch = pack_rows(ROWS, 0, objective=OBJECTIVES[name])
    totals = train_step(engine, [batch, batch], 2 * len(ROWS), objective=OBJECTIVES[name])
    assert totals.sums.device == totals.extremes.device == META


@pytest.mark.usefixtures("_no_autocast")
def test_what_is_logged_is_read() -> None:
    # The counterpart: a device without values does raise where one is read.
    interval = Interval()
    interval.add(two_steps(Layout("shared"), optim="sgd"), 1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        interval.reduce()


@pytest.mark.parametrize("reads", [torch.Tensor.item, torch.Tensor.nonzero, bool, torch.Tensor.cpu])
def test_every_way_to_read_raises_on_this_device(reads: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        reads(torch.ones((), device=META))


@contextlib.contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """torch's own watch over calls that wait for the GPU: an "error" or a "warn"ing at each."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("path", ["varlen", "flex", "loop"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_step_never_waits_for_a_gpu(layout: Any, path: AttentionPath, optim: str) -> None:
    chosen = Layout(layout)
    engine = engine_on(torch.device("cuda"), chosen, path, "bf16", optim=optim)
    step(engine, chosen)  # kernels are compiled and state is made, once
    with sync_debug("error"):
        totals = step(engine, chosen)
    assert bool(torch.isfinite(totals.grad_norm))


@pytest.mark.gpu
def test_of_a_padded_step_only_transformers_waits_for_a_gpu() -> None:
    chosen = Layout("padded")
    engine = engine_on(torch.device("cuda"), chosen, "loop", "bf16")
    step(engine, chosen)
    with warnings.catch_warnings(record=True) as caught, sync_debug("warn"):
        warnings.simplefilter("always")
        step(engine, chosen)
    assert [str(warning.filename) for warning in caught if "rayrm" in Path(warning.filename).parts] == []


@pytest.mark.gpu
def test_torch_tells_of_a_host_that_waits_for_a_gpu() -> None:
    with sync_debug("error"), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device="cuda").item()


def test_a_copy_to_a_device_keeps_values_and_type() -> None:
    for array in (np.arange(5, dtype=np.int32), [1, 2, 3], torch.ones(2, 3, dtype=torch.bool)):
        found = copied(array, torch.device("cpu"))
        assert torch.equal(found, torch.as_tensor(array))
        assert found.dtype == torch.as_tensor(array).dtype
