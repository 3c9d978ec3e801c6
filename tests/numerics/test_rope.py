"""Rotation in three operations is the modelling file's own, forward and backward, and is taken back."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from rayrm.model import rope
from rayrm.model.forward import PackedScorer
from rayrm.model.layout import Layout
from rayrm.model.rope import fuse_rope
from tests.tiny import tiny_model

FILES = [modeling_llama, modeling_qwen3, modeling_gpt_neox, modeling_cohere]


@pytest.fixture(autouse=True)
def files_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of other tests may be using our function."""
    monkeypatch.setattr(rope, "_users", Counter())
    for file in FILES:
        rotate: Any = file.apply_rotary_pos_emb  # type: ignore[attr-defined]
        monkeypatch.setattr(file, "apply_rotary_pos_emb", getattr(rotate, "original", rotate))


def model_of(file: ModuleType) -> torch.nn.Module:
    """A module whose class was defined in a modelling file; nothing else of it matters here."""

    class Inside(torch.nn.Module):
        __module__ = file.__name__

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    return Inside()


def rotated(rotate: Callable[..., Any], head_size: int, turned: int) -> list[torch.Tensor]:
    """Queries and keys, rotated in their first `turned` channels, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    # As projections give them: tokens before heads in memory.
    query = torch.randn(2, 5, 4, head_size, generator=generator).transpose(1, 2).requires_grad_()
    key = torch.randn(2, 5, 2, head_size, generator=generator).transpose(1, 2).requires_grad_()
    angles = torch.randn(1, 5, turned // 2, generator=generator).repeat(1, 1, 2)
    found = rotate(query, key, angles.cos(), angles.sin())
    (found[0].pow(3).sum() + found[1].pow(3).sum()).backward()
    return [*found, query.grad, key.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rsplit("_", 1)[-1])
@pytest.mark.parametrize("turned", [8, 4])
def test_a_rotation_is_the_files_own(file: Any, turned: int) -> None:
    stock = file.apply_rotary_pos_emb
    head_size = 8 if "neox" in file.__name__ else turned
    wanted = rotated(stock, head_size, turned)
    undo = fuse_rope(model_of(file))
    # Cohere turns neighbouring channels: another rotation, which stays.
    assert (file.apply_rotary_pos_emb is stock) == (file is modeling_cohere)
    for one, other in zip(rotated(file.apply_rotary_pos_emb, head_size, turned), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    undo()
    assert file.apply_rotary_pos_emb is stock


def test_the_last_model_of_a_file_takes_the_function_back() -> None:
    stock = modeling_llama.apply_rotary_pos_emb
    undo_one, undo_other = fuse_rope(tiny_model()), fuse_rope(tiny_model(seed=1))
    undo_one()
    assert modeling_llama.apply_rotary_pos_emb is not stock
    undo_other()
    assert modeling_llama.apply_rotary_pos_emb is stock


def test_a_scorer_that_is_dropped_gives_the_function_back() -> None:
    stock = modeling_llama.apply_rotary_pos_emb
    scorer = PackedScorer(tiny_model(), Layout("shared"))
    assert modeling_llama.apply_rotary_pos_emb is not stock
    del scorer
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is stock
