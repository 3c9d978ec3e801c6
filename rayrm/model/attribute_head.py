"""Heads that foretell ratings by attribute, and the gate that makes one reward of them, while a model trains.

With H the hidden size and A attributes: weights W `[A, H]`, offsets b `[A]` and a gate u `[A]`. From the
hidden state h of a text's pooled token

    rating foretold of attribute a:   w_a . h + b_a
    reward:                           sum_a g_a w_a . h   with   g = softmax(sqrt(H) u)

The gate does not depend on the text, so the reward is linear in h, and exactly the model's own head with
weights W^T g: so it is saved, and loads anywhere as a classifier with one label. ArmoRM's gate
(https://arxiv.org/abs/2406.12845) depends on the prompt; no stock class could load that. sqrt(H): by a step
of Adam the gate would else move as little as one weight of thousands, and stay where it began.

While a model trains, `AttributeHead` computes in the place of its own head. It is kept beside the model, as
no part of it, and in `attributes/heads.safetensors` of a saved one: not among its weights, where servers that
load every safetensors file of a directory would find it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from rayrm.errors import ModelError
from rayrm.model.adapters import active_adapter, head_name
from rayrm.model.layout import unwrapped
from rayrm.model.replaced_forward import replace_forward
from rayrm.model.sharded import is_sharded

HEADS_FILE = "attributes/heads.safetensors"
_BESIDE = "attribute_head"


@dataclass(frozen=True, slots=True)
class AttributeWeights:
    """Whole copies on the host: `of_heads` by the names of `AttributeHead`'s parameters, and `of_reward`: the
    model's own head that they make, by the model's names of its parameters."""

    names: tuple[str, ...]
    of_heads: dict[str, torch.Tensor]
    of_reward: dict[str, torch.Tensor]

    def save(self, directory: Path) -> None:
        """Write what training goes on from, beside a saved model."""
        file = directory / HEADS_FILE
        file.parent.mkdir(exist_ok=True)
        save_file(self.of_heads, file, {"format": "pt", "attributes": json.dumps(self.names)})


class AttributeHead(torch.nn.Module):
    """`weight` `[A, H]`, `offset` `[A]`, `gate` `[A]`; `bias` `[1]` where the model's own head has one."""

    def __init__(self, names: Sequence[str], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` `[A, H]`; the gate begins even."""
        super().__init__()
        self.names = tuple(names)
        self.weight = torch.nn.Parameter(weight.clone())
        self.offset = torch.nn.Parameter(weight.new_zeros(len(names)))
        self.gate = torch.nn.Parameter(weight.new_zeros(len(names)))
        self.bias = None if bias is None else torch.nn.Parameter(bias.clone())

    @classmethod
    def around(
        cls,
        names: Sequence[str],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        spread: float,
        seed: int,
    ) -> AttributeHead:
        """Heads apart by normal numbers of deviation `spread`, whose reward is that of `weight` `[1, H]`."""
        noise = torch.randn(
            (len(names), weight.shape[1]), generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        )
        apart = (noise - noise.mean(dim=0)).to(weight) * spread
        return cls(names, weight + apart, bias)

    def gate_weights(self) -> torch.Tensor:
        """g `[A]`, which adds up to 1."""
        return torch.softmax(self.gate * math.sqrt(self.weight.shape[1]), dim=0)

    def folded(self) -> torch.Tensor:
        """The weights `[1, H]` of the one head that gives the reward."""
        return (self.gate_weights() @ self.weight)[None]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[.., 1 + A]`: the reward, then each attribute's rating, as foretold; in the weights' precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.weight.dtype)
            reward = F.linear(hidden, self.folded(), self.bias)
            return torch.cat([reward, F.linear(hidden, self.weight, self.offset)], dim=-1)

    def copies(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.named_parameters()}


def split_outputs(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A scorer's outputs as rewards `[N]` and ratings foretold `[N, A]`; None without attributes."""
    return (outputs, None) if outputs.dim() == 1 else (outputs[:, 0], outputs[:, 1:])


def attribute_head_of(model: torch.nn.Module) -> AttributeHead | None:
    """The heads that were put beside the model."""
    found: AttributeHead | None = vars(unwrapped(model)).get(_BESIDE)
    return found


def put_beside(model: torch.nn.Module, head: AttributeHead | None) -> None:
    """Keep `head` with the model, out of its parameters, in the place of what was there."""
    vars(unwrapped(model)).pop(_BESIDE, None)
    if head is not None:
        vars(unwrapped(model))[_BESIDE] = head


def own_layer(model: torch.nn.Module) -> torch.nn.Linear:
    """The layer that is the model's own head. Raises ModelError where that is more than one linear layer."""
    name = head_name(model)
    found: Any = getattr(unwrapped(model), name)
    if hasattr(found, "modules_to_save"):  # an adapter's own copy
        found = found.modules_to_save[active_adapter(model)]
    if type(found) is not torch.nn.Linear or found.out_features != 1:
        raise ModelError(
            f"`attributes` need a head of one linear layer, into which they are folded when the model is "
            f"saved, and `{name}` of {type(unwrapped(model)).__name__} is a {type(found).__name__}. Train "
            "without `attributes`, or start from another model."
        )
    return found


def compute_instead(model: torch.nn.Module, head: AttributeHead) -> Callable[[], None]:
    """Let `head` compute in the place of the model's own head, which is not trained meanwhile.

    Returns what undoes it, and leaves the reward in the model's own head where the weights are whole.
    """
    layer = own_layer(model)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)

    def forward(hidden: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return head(hidden)

    restore = replace_forward(getattr(unwrapped(model), head_name(model)), forward)

    def undo() -> None:
        restore()
        if not any(map(is_sharded, (*layer.parameters(), *head.parameters()))):
            put_reward(layer, reward_of(head))
        for parameter in trained:
            parameter.requires_grad_(True)

    return undo


def reward_of(head: AttributeHead) -> dict[str, torch.Tensor]:
    """The model's own head that these heads make: its `weight` `[1, H]` and, if any, its `bias` `[1]`."""
    with torch.no_grad():
        return {"weight": head.folded()} | ({} if head.bias is None else {"bias": head.bias.detach().clone()})


def put_reward(layer: torch.nn.Linear, reward: Mapping[str, torch.Tensor]) -> None:
    """New tensors, since a checkpoint that is being written may still read those of before."""
    for name, value in reward.items():
        parameter: torch.nn.Parameter = getattr(layer, name)
        parameter.data = value.to(parameter)


def heads_file(name: str, **where: Any) -> Path | None:
    """The heads saved with a model: in its directory, or of a hub name in the cache, once they are fetched.

    None where it has none, or where the hub is not reached and the cache has none. `where`: `revision`,
    `token`, `cache_dir` and their kin, as `from_pretrained` takes them. Raises OSError as that does.
    """
    found = cached_file(name, HEADS_FILE, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else Path(found)


def read_heads(file: Path) -> AttributeHead:
    """The heads of a file, on the CPU, in the type in which they were saved."""
    with safe_open(str(file), framework="pt") as stored:
        names = tuple(json.loads((stored.metadata() or {})["attributes"]))
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    head = AttributeHead(names, tensors["weight"], tensors.get("bias"))
    head.load_state_dict(tensors)
    return head


def makes_reward_of(head: AttributeHead, layer: torch.nn.Linear) -> bool:
    """Whether the reward that the heads make is the layer's, but for the rounding of their types."""
    rounds = 64 * max(torch.finfo(weight.dtype).eps for weight in (head.weight, layer.weight))
    largest = head.weight.detach().abs().max().item()
    made, own = reward_of(head), dict(layer.named_parameters())
    return made.keys() == own.keys() and all(
        value.shape == own[name].shape
        and (value.float().cpu() - own[name].detach().float().cpu()).abs().max().item() <= rounds * largest
        for name, value in made.items()
    )
