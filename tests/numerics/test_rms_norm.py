"""RMSNorm by blocks is the module's own formula, forward and backward, and nothing else is replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rayrm.model import rms_norm
from rayrm.model.rms_norm import block_norms


def outputs_and_gradients(module: torch.nn.Module, hidden: torch.Tensor) -> list[torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    module.zero_grad()
    out = module(hidden)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = [hidden.grad, module.weight.grad]
    assert None not in gradients
    return [out.detach(), *gradients]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_blocks_compute_the_modules_formula(
    kind: type[torch.nn.Module], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rms_norm, "_BLOCK_ELEMENTS", 40)  # 5 rows a block: the last is shorter
    torch.manual_seed(rows)
    module = kind(8)
    torch.nn.init.normal_(module.weight)
    hidden = torch.randn(2, rows, 8) * torch.tensor([1e-3, 10.0])[:, None, None]
    theirs = outputs_and_gradients(module, hidden)
    undo = block_norms(module)
    ours = outputs_and_gradients(module, hidden)
    assert "forward" in vars(module)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm())
    undo()
    assert "forward" not in vars(module)
    assert torch.equal(outputs_and_gradients(module, hidden)[0], theirs[0])


@pytest.mark.parametrize(
    "module",
    [Gemma2RMSNorm(8), torch.nn.LayerNorm(8), torch.nn.BatchNorm1d(8), LlamaRMSNorm(8).bfloat16()],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_is_left_alone(module: torch.nn.Module) -> None:
    block_norms(module)
    assert "forward" not in vars(module)


def test_autocast_and_other_precisions_stay_the_modules_own() -> None:
    module = LlamaRMSNorm(8)
    stock = copy.deepcopy(module)
    block_norms(module)
    hidden = torch.randn(3, 8)
    assert torch.equal(module(hidden.bfloat16()), stock(hidden.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(hidden), stock(hidden))
