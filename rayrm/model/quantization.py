"""A frozen base model in 4 or 8 bits, under an adapter (QLoRA, https://arxiv.org/abs/2305.14314).

bitsandbytes computes with such weights, on GPUs and on CPUs. What is trained, adapter and head, stays in
float32 and is computed as always here; TRL rounds it to bfloat16, in which small updates are lost.
"""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from typing import Any

from rayrm.config import QuantizationConfig
from rayrm.errors import ConfigError, MissingExtraError
from rayrm.model.adapters import HEADS

# The reward head, and what is new beside it in a model that was no classifier.
_NOT_CONVERTED = (*HEADS, "pooler", "head")


def is_quantized(model: Any) -> bool:
    """Whether transformers loaded the model in few bits."""
    return getattr(model, "quantization_method", None) is not None


def check_quantization(quantization: Any) -> None:
    """Raise ConfigError for what is no configuration of bitsandbytes, MissingExtraError without it."""
    from transformers import BitsAndBytesConfig

    if not isinstance(quantization, BitsAndBytesConfig | QuantizationConfig):
        raise ConfigError(
            f"`quantization_config` is a {type(quantization).__name__}. Pass "
            "`transformers.BitsAndBytesConfig(load_in_4bit=True)`, or with `load_in_8bit=True`."
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError('quantization needs bitsandbytes. Type: pip install "rayrm[quantization]"')


def quantization_from(table: dict[str, Any]) -> Any:
    """The configuration that `to_dict` gave. Raises MissingExtraError without bitsandbytes."""
    from transformers import BitsAndBytesConfig

    made = BitsAndBytesConfig.from_dict(table)
    check_quantization(made)
    return made


def compute_exactly(model: Any) -> None:
    """Let a CPU multiply by 4-bit weights in the type that the configuration says, in evaluation too.

    bitsandbytes would change the weights' layout there and multiply in bfloat16: scores would not be those of
    training, and DoRA, which reads the weights, would read nonsense.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # In 8 bits it says of every product that its input is rounded to float16 first.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def bitsandbytes_config(quantization: Any, *, compute_dtype: str) -> Any:
    """transformers' configuration, with the reward head left out. `compute_dtype`: what "auto" means."""
    from transformers import BitsAndBytesConfig

    if isinstance(quantization, QuantizationConfig):
        chosen = quantization.bnb_4bit_compute_dtype
        made = BitsAndBytesConfig(
            load_in_4bit=quantization.load_in_4bit,
            load_in_8bit=quantization.load_in_8bit,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=compute_dtype if chosen == "auto" else chosen,
        )
    else:
        made = copy.deepcopy(quantization)
    kept = list(made.llm_int8_skip_modules or [])
    made.llm_int8_skip_modules = [*kept, *(name for name in _NOT_CONVERTED if name not in kept)]
    return made
