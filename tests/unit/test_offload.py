"""Activations kept on the host between forward and backward: the same numbers, less on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from rayrm.data.packing import pack_texts
from rayrm.model import offload
from rayrm.model.adapters import add_adapter
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import choose_layout
from rayrm.model.offload import offload_activations
from tests.tiny import tiny_model


def scorer_of(kind: str, device: str = "cpu", **shape: Any) -> PackedScorer:
    model: Any = tiny_model(**shape).to(device)
    if kind == "lora":
        model = add_adapter(model, LoraConfig(r=4, target_modules="all-linear"))
    if kind == "checkpointing":
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    module = PackedScorer(
        model, choose_layout(model) if kind != "padded" else choose_layout(model, longest=10**6)
    )
    return module.train()


def step(module: PackedScorer, *, length: int = 40) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores, and the gradients of the sum of their squares."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 400, (length - n,), generator=generator).int().numpy() for n in range(4)]
    device = next(module.parameters()).device
    shares = module.path is not None
    scores = module(to_device(pack_texts(texts, 0, share=shares), device, module.path))
    scores.square().sum().backward()
    return scores.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["shared", "lora", "checkpointing"])
def test_scores_and_gradients_are_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, gradients = step(scorer_of(kind))
    moved: list[torch.Tensor] = []
    on_host = offload._on_host
    monkeypatch.setattr(offload, "_on_host", lambda tensor: (moved.append(tensor), on_host(tensor))[1])
    module = scorer_of(kind)
    undo = offload_activations(module)
    again, others = step(module)
    assert len(moved) >= 2  # of each layer at least its input
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert not [one for one in moved if one.untyped_storage().data_ptr() in weights]
    assert torch.equal(scores, again)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert max(float(one.abs().max()) for one in gradients.values()) > 1e-3
    count = len(moved)
    with torch.no_grad():
        texts = [torch.arange(3, 40).int().numpy()]
        module(to_device(pack_texts(texts, 0, share=True), torch.device("cpu"), module.path))
    undo()
    step(module)
    assert len(moved) == count


@pytest.mark.gpu
def test_less_is_on_the_gpu_between_forward_and_backward() -> None:
    def held(*, offloads: bool) -> int:
        module = scorer_of("shared", "cuda", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
        if offloads:
            offload_activations(module)
        texts = [torch.randint(3, 400, (400,)).int().numpy() for _ in range(8)]
        before = torch.cuda.memory_allocated()
        scores = module(to_device(pack_texts(texts, 0, share=True), torch.device("cuda"), module.path))
        torch.cuda.synchronize()
        between = torch.cuda.memory_allocated() - before
        scores.sum().backward()
        return between

    assert held(offloads=True) < 0.3 * held(offloads=False)
