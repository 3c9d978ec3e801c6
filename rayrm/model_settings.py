"""[model] of a run file: the model, its adapter ([model.lora]) and quantization ([model.quantization])."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayrm.settings import Count, ModelName, none_word, settings


def _init_word(value: Any) -> Any:
    """The command line has no types of its own: "true" and "false" are switches here."""
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _names_or_none(value: Any) -> Any:
    return [] if none_word(value) is None else value


@settings
class LoraConfig:
    """An adapter on the base model; the score head is always trained and saved too."""

    kind: Literal["lora", "ia3"] = "lora"
    """The method. "ia3" rescales activations (`k_proj`, `v_proj`, `down_proj` or their like), which is far
    less to train than "lora"; of the fields below it has `target_modules`, `feedforward_modules` and
    `modules_to_save` only. For PEFT's others pass `peft_config` in Python."""
    r: Count = 16
    """The adapters' rank."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Updates are scaled by alpha / r; with `use_rslora` by alpha / sqrt(r)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input, with `disable_dropout=false` only. Above 0 prefixes are then not
    shared."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter, or "all-linear" (with "ia3": PEFT's choice for the model)."""
    feedforward_modules: Annotated[list[str], BeforeValidator(_names_or_none)] = dataclasses.field(
        default_factory=list
    )
    """With "ia3": which of `target_modules` are rescaled where they take their input, not their output."""
    modules_to_save: Annotated[list[str], BeforeValidator(_names_or_none)] = dataclasses.field(
        default_factory=list
    )
    """Names of further modules that are trained and saved whole, beside the head."""
    use_dora: bool = False
    """DoRA: learn the length of each weight's columns apart from their direction. Slower."""
    use_rslora: bool = False
    """Scale updates by alpha / sqrt(r), which keeps high ranks learning."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained: of no layer, of all, of those with an adapter."""
    init_lora_weights: Annotated[
        bool | Literal["gaussian", "olora", "orthogonal", "pissa"], BeforeValidator(_init_word)
    ] = True
    """How adapters begin. True, "gaussian": as no change of the model. "pissa", "olora": from the weights'
    largest directions, which are taken out of the base. "orthogonal": at random, but orthogonal."""

    def __post_init__(self) -> None:
        ours = {"kind", "target_modules", "modules_to_save", "feedforward_modules"}
        if self.kind == "ia3":
            made = {field.name: field.default for field in dataclasses.fields(self) if field.name not in ours}
            strange = [name for name, default in made.items() if getattr(self, name) != default]
            if strange:
                raise ValueError(
                    f'`{strange[0]}` ({getattr(self, strange[0])}) is LoRA\'s, and `kind` is "ia3", which '
                    "has none. Delete it."
                )
        elif self.feedforward_modules:
            raise ValueError(
                f'`feedforward_modules` ({self.feedforward_modules}) is IA3\'s, and `kind` is "lora". '
                'Delete it, or type `kind="ia3"`.'
            )


@settings
class QuantizationConfig:
    """The frozen base model's weights in 4 or 8 bits (QLoRA), by the names of `BitsAndBytesConfig`."""

    load_in_4bit: bool = False
    """Weights in 4 bits."""
    load_in_8bit: bool = False
    """Weights in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """What the 16 values of 4 bits are."""
    bnb_4bit_use_double_quant: bool = False
    """Quantize the scales too, which saves 0.4 bits a weight."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What 4-bit weights become for a product. "auto": what the run computes in."""

    def __post_init__(self) -> None:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError(
                f"`load_in_4bit` ({self.load_in_4bit}) and `load_in_8bit` ({self.load_in_8bit}): one of them "
                "must be true. Type `model.quantization.load_in_4bit=true`."
            )


@settings
class ModelConfig:
    """The model that becomes a reward model."""

    name: ModelName
    """A directory (relative to the current directory) or a hub name; a directory that holds an adapter goes
    on training that."""
    lora: Annotated[LoraConfig | None, BeforeValidator(none_word)] = None
    """Train adapters only. None: train every parameter."""
    quantization: Annotated[QuantizationConfig | None, BeforeValidator(none_word)] = None
    """Hold the base model in few bits while an adapter is trained. None: as it is."""
