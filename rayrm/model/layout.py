"""How a model may compute a batch: prefixes shared, padding-free, or padded; and why not better.

Sharing needs a causal decoder with plain or soft-capped attention whose result for a token depends on that
token's own ancestors and positions alone. What a model cannot do is read off its class, its config and one
forward over two tokens, and said once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from transformers import GPTNeoXForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from rayrm.model.attention_probe import attention_obstacle, softcap_of
from rayrm.model.scaling_rope import ScalingRope

LayoutName = Literal["shared", "packed", "padded"]
_READ_IN_FORWARD: Final = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "hidden_dropout",
)
"""Dropouts that forwards of transformers' classifiers read from the config; others are copied when the model
is made."""
_DROPOUT: Final = re.compile(r"drop(?:out)?(?:_p|_prob|_rate)?$")
"""How models call their copies: `attention_dropout`, `layerdrop`, `resid_pdrop`, `dropout_prob`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`shared`: common prefixes computed once; `packed`: no padding; `padded`: the stock forward.

    `reason` says why it is not `shared`; empty where it is.
    """

    name: LayoutName
    reason: str = ""

    def __str__(self) -> str:
        """A line for the log."""
        what = {
            "shared": "what texts of a micro-batch begin with is computed once, without padding",
            "packed": "rows are packed without padding, nothing is shared",
            "padded": "rows are padded, nothing is shared",
        }[self.name]
        return f"layout: {what}" + (f" ({self.reason})" if self.reason else "")


def choose_layout(
    model: torch.nn.Module, *, share_prefix: bool = True, longest: int | None = None, train: bool = True
) -> Layout:
    """The best layout that computes the same scores as the stock forward.

    `longest` is the longest sequence in tokens that will come (None: the model's position limit); a sliding
    window at least as long is no window. Dropout matters only in training.
    """
    inner = unwrapped(model)
    obstacle = _obstacle(inner, longest)
    if obstacle:
        return Layout("padded", obstacle)
    if train and (name := active_dropout(model)):
        return Layout("padded", f"dropout is active ({name}): shared masks would correlate the two sides")
    if not share_prefix:
        return Layout("packed", "`share_prefix` is False")
    return Layout("shared")


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    inner: PreTrainedModel = get_base_model() if get_base_model is not None else model
    return inner


def active_dropout(model: torch.nn.Module) -> str | None:
    """The name of a dropout, or of a router's noise, that would act in training, or None."""
    name: str
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            return name
    for config in _configs(model):
        for key in _READ_IN_FORWARD:
            if getattr(config, key, None):
                return f"config.{key}"
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_noise = _DROPOUT.search(key) or key.endswith("jitter_noise")
            if is_noise and isinstance(value, float) and value > 0:
                return f"{name}.{key}"
    return None


def disable_dropout(model: torch.nn.Module) -> None:
    """Zero every `nn.Dropout` and the dropouts that models read from their config or attributes, of whole
    layers (`layerdrop`) too."""
    for config in _configs(model):
        for key in _READ_IN_FORWARD:
            if getattr(config, key, None):
                setattr(config, key, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if _DROPOUT.search(key) and isinstance(value, float):
                setattr(module, key, 0.0)


def _configs(model: torch.nn.Module) -> list[Any]:
    """The configurations that the model's modules read: its own, and that of each model within."""
    found = [unwrapped(model).config]
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not any(config is other for other in found):
            found.append(config)
    return found


def plain_reach(model: torch.nn.Module) -> int | None:
    """The longest text that no window cuts and no scaling of positions reaches; None where every text is.

    Texts of at most this length may share what longer ones cannot: `choose_layout(model, longest=...)` says.
    """
    config = unwrapped(model).config.get_text_config()
    rope = ScalingRope.of(config)
    ends = [end for end in (_window(config), None if rope is None else rope.limit) if end is not None]
    return min(ends, default=None)


def _window(config: Any) -> int | None:
    """The sliding window of some layer, or None."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    return window if used else None


def _obstacle(inner: PreTrainedModel, longest: int | None) -> str:
    """Why a model must take the padded path, or an empty string."""
    config = inner.config.get_text_config()
    if not isinstance(inner, (GenericForSequenceClassification, GPTNeoXForSequenceClassification)):
        return f"{type(inner).__name__} is not one of transformers' generic decoder classifiers"
    if not hasattr(inner.base_model, "layers"):
        return f"{type(inner.base_model).__name__} is more than a decoder"
    if not getattr(inner, "_supports_attention_backend", False):
        return f"{type(inner).__name__} does not take its attention from transformers' attention interface"
    if softcap_of(config) is not None and inner.config._attn_implementation == "sdpa":
        return (
            "attention logits are soft-capped (`attn_logit_softcapping`), and the model was loaded with sdpa"
        )
    if getattr(config, "use_bidirectional_attention", False):
        return "attention is bidirectional"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"layers of kind {', '.join(sorted(other))}"
    reach = longest or getattr(config, "max_position_embeddings", None)
    window, rope = _window(config), ScalingRope.of(config)
    if window is not None and (reach is None or window < reach):
        return f"a sliding window ({window}) shorter than the longest row ({reach})"
    if rope is not None and (reach is None or rope.limit < reach):
        return f"rope of type {rope.kind} scales with the longest position of a batch"
    if getattr(config, "alibi", False):
        return "ALiBi positions"
    return attention_obstacle(inner)
