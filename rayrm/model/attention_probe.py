"""What a model asks of its attention, seen in one forward over two tokens.

A config does not tell whether a layer's attention can be replaced: whether it goes through transformers'
interface, and once; whether the layer hands on the keywords and the mask that it was given; whether more than
a softmax is wanted. The forward tells, for any architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

_PROBE = "rayrm_probe"


@dataclass(slots=True)
class _Probe:
    """What the calls of one forward were given; the model was given `mask`, and its config says `softcap`."""

    mask: torch.Tensor
    softcap: float | None
    modules: list[torch.nn.Module] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def see(self, module: torch.nn.Module, mask: torch.Tensor | None, options: dict[str, Any]) -> None:
        if any(module is earlier for earlier in self.modules):
            self.complaints.append("calls attention more than once")
        self.modules.append(module)
        if mask is None or mask.shape != self.mask.shape or not torch.equal(mask, self.mask):
            self.complaints.append("changes the attention mask")
        if options.get("s_aux") is not None:
            self.complaints.append("has attention sinks")
        if options.get("softcap") != self.softcap:
            self.complaints.append("soft-caps its attention logits otherwise than its config says")
        if getattr(module, "is_causal", True) is False:
            self.complaints.append("attends in both directions")


def softcap_of(config: Any) -> float | None:
    """The c of attention logits that become c tanh(x / c), or None."""
    return getattr(config, "attn_logit_softcapping", None)


def attention_obstacle(model: PreTrainedModel) -> str:
    """Why a forest cannot take the place of `model`'s attention, or an empty string.

    `model` is a classifier whose base model is a decoder with `layers`.
    """
    layers = len(model.base_model.layers)
    device = model.get_input_embeddings().weight.device
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device).tril()
    probe = _Probe(mask, softcap_of(model.config.get_text_config()))
    before = model.config._attn_implementation
    model.config._attn_implementation = _PROBE
    try:
        # Routers add noise in training: what comes after must not depend on this forward.
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.base_model(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=device),
                attention_mask=probe.mask,
                position_ids=torch.arange(2, device=device)[None],
                use_cache=False,
                forest=probe,
            )
    finally:
        model.config._attn_implementation = before
    name = type(model).__name__
    if probe.complaints:
        return f"{name} {probe.complaints[0]}"
    if len(probe.modules) != layers:
        return f"attention can be replaced in {len(probe.modules)} of the {layers} layers of {name}"
    return ""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    forest: _Probe | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if forest is not None:
        forest.see(module, attention_mask, kwargs)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_PROBE, _attention)
AttentionMaskInterface.register(_PROBE, sdpa_mask)
