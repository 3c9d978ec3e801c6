"""A step never waits for the device: it runs whole on one whose values cannot be read.

On torch's `meta` device tensors have shapes and no values: whatever would make a GPU's host wait (`item`,
`nonzero`, `bool(tensor)`, a copy to the CPU) raises there. The engine treats it as it does a GPU; on the CPU
it keeps the embedding's gradient by touched row. The padded layout is left out: the forward is transformers'
own there, which asks whether the mask has padding at all.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from rayrm.config import RewardConfig
from rayrm.data.packing import pack_rows
from rayrm.model.attention import AttentionPath
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import Layout
from rayrm.train.build import ModelSource, build_model
from rayrm.train.engine import TorchEngine
from rayrm.train.loop import Interval
from rayrm.train.optimizer import make_optimizer, make_scheduler
from rayrm.train.step import StepTotals, train_step
from tests.numerics.ranks import tokenized
from tests.tiny import tiny_model, tiny_tokenizer

META = torch.device("meta")


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # It knows no meta device, also where it is only turned off or asked about.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def two_steps(layout: Layout, path: AttentionPath = "loop", **settings: Any) -> StepTotals:
    """Two steps of two micro-batches; the totals of the second."""
    config = RewardConfig(bf16=False, **settings)
    model = build_model(ModelSource(tiny_model()), config, tiny_tokenizer()).to(META)
    module = PackedScorer(model, layout, path=path)
    optimizer = make_optimizer(module, config, None)
    engine = TorchEngine(
        module,
        optimizer,
        make_scheduler(optimizer, config, 10),
        device=META,
        world_size=1,
        max_grad_norm=config.max_grad_norm,
    )
    batch = pack_rows(tokenized(4), 0, share=layout.name == "shared")
    train_step(engine, [batch, batch], 8, center_rewards_coefficient=0.01)
    return train_step(engine, [batch, batch], 8, center_rewards_coefficient=0.01)


# Of the paths, "tiled" is the CPU's own, and FlexAttention refuses this device; of the optimizers the
# default, `adamw_torch_fused`, has no kernel for it.
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("path", ["loop", "varlen", "dense"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_step_reads_nothing_from_the_device(
    layout: Any, path: AttentionPath, checkpointing: bool, optim: str
) -> None:
    totals = two_steps(Layout(layout), path, optim=optim, gradient_checkpointing=checkpointing)
    assert totals.sums.device == totals.extremes.device == totals.grad_norm.device == META


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
