"""What a (query, key) pair costs beside a token: what counting a model's operations says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from rayrm.model.cost import attention_weight_of
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    "shape",
    [{}, {"num_hidden_layers": 3, "hidden_size": 64}, {"head_dim": 24}],
    ids=["tiny", "deeper and wider", "heads wider than the hidden size"],
)
def test_the_weight_of_attention_is_what_a_models_operations_say(shape: dict[str, Any]) -> None:
    """Stock attention computes all n x n pairs: the operations are linear x n + pair x n^2."""
    model = tiny_model(**shape)
    model.set_attn_implementation("eager")
    counted = {}
    for length in (32, 64):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.arange(3, 3 + length)[None])
        counted[length] = counter.get_total_flops()
    pair = (counted[64] - 2 * counted[32]) / (64**2 - 2 * 32**2)
    linear = counted[32] / 32 - 32 * pair
    # The norms' parameters, less than 1%, are part of no matrix product.
    assert attention_weight_of(model) == pytest.approx(pair / linear, rel=0.01)


def test_the_model_inside_an_adapter_is_read() -> None:
    plain = attention_weight_of(tiny_model())
    adapted = get_peft_model(tiny_model(), LoraConfig(r=1, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert attention_weight_of(adapted) == pytest.approx(plain, rel=0.02)


def test_a_model_that_tells_no_heads_is_balanced_by_tokens_alone() -> None:
    model = torch.nn.Linear(2, 1)
    model.config = PreTrainedConfig()
    assert attention_weight_of(model) == 0.0
