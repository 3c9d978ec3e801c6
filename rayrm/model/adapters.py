"""Adapters on a reward model, by PEFT: put on, taken as given, opened from a directory, saved.

Whatever the adapter is, the reward head is trained and saved with it, and so are the embeddings of tokens
that the run adds. PEFT is imported where it is used: without adapters nothing needs it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from rayrm.errors import ModelError
from rayrm.model.head import head_parts
from rayrm.model.layout import unwrapped

logger = logging.getLogger("rayrm.model")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEADS = ("score", "classifier", "classification_head")
_ON_FEW_BITS = (True, False, "gaussian", "eva")
"""`init_lora_weights` that neither change the base nor take its weights in pieces."""
_NOT_REPEATED = {
    "pissa_niter_": "directions drawn at random, which are drawn anew when it is loaded",
    "corda": "what `preprocess_corda` found in texts, which is not saved",
    "lora_ga": "gradients, which are not saved",
}
"""How `init_lora_weights` begins -> by what it changes the base."""


def is_adapted(model: Any) -> bool:
    """Whether the model has adapters."""
    return hasattr(model, "peft_config")


def head_name(model: torch.nn.Module) -> str:
    """The attribute that holds the reward head."""
    inner = unwrapped(model)
    for name in HEADS:
        if hasattr(inner, name):
            return name
    raise ModelError(f"{type(inner).__name__} has no head that rayrm knows ({', '.join(HEADS)}).")


def settings_of(directory: str | Path) -> Any:
    """The `PeftConfig` of a directory that holds an adapter. Raises ModelError where it names no base."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(directory))
    if not config.base_model_name_or_path:
        raise ModelError(
            f"adapter `{directory}` does not say its base model (`base_model_name_or_path`). Write the "
            f"base's directory or hub name into its `{ADAPTER_CONFIG}`."
        )
    return config


def active_adapter(model: Any) -> str:
    """The name of the one adapter that is active. Raises ModelError for several, and for none."""
    names = model.active_adapters
    names = names() if callable(names) else names  # transformers' own adapters: a method
    if len(names) != 1:
        raise ModelError(
            f"the model has {len(names)} active adapters ({', '.join(names)}), and one is trained. Type "
            "`model.set_adapter(NAME)` before."
        )
    return str(names[0])


def check_given(model: Any) -> None:
    """Raise ModelError for a model with adapters whose trained head could not be saved."""
    if not hasattr(model, "get_base_model"):
        raise ModelError(
            "the model's adapter was put on by `model.add_adapter`, which saves no reward head. Put it on by "
            '`peft.get_peft_model(model, config)`, with `task_type="SEQ_CLS"`.'
        )
    name = active_adapter(model)
    check_settings(model.peft_config[name], f"the model's adapter `{name}`")
    head = getattr(unwrapped(model), head_name(model))
    if hasattr(head, "base_layer"):
        raise ModelError(
            f"the model's adapter `{name}` is also on the reward head (`{head_name(model)}`), so that the "
            f"head itself would not be saved. Put it on with `modules_to_save=[{head_name(model)!r}]`, and "
            "without the head in `target_modules`."
        )


def check_settings(config: Any, named: str) -> None:
    """Raise ModelError for a method that trains and saves nothing but its own weights: the head is beside."""
    if not hasattr(config, "modules_to_save"):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ModelError(
            f"{named}: {kind} has no `modules_to_save`, by which the reward head is trained and saved. Use "
            "LoRA (which has `trainable_token_indices` for tokens), IA3 or another method that has it."
        )
    check_init(config, named)


def check_init(config: Any, named: str, *, quantized: bool = False) -> None:
    """Raise ModelError where LoRA begins in a way that cannot be repeated when the adapter is loaded.

    PEFT 0.21 saves the adapter's weights alone, and begins again on the base before it reads them: one that
    changes the base must change it alike. `quantized`: the base is in 4 or 8 bits.
    """
    init = getattr(config, "init_lora_weights", True)
    if quantized and init == "loftq":
        raise ModelError(
            f"{named}: LoftQ (`init_lora_weights`) rounds the base itself, from weights in full precision, "
            "and these are in 4 or 8 bits already. Leave the quantization out, or set "
            "`init_lora_weights=True`."
        )
    if quantized and init not in _ON_FEW_BITS:
        raise ModelError(
            f"{named}: `init_lora_weights` ({init!r}) needs the base's weights in full precision, and these "
            "are in 4 or 8 bits: what it leaves of them, rounded anew, would not be there when the adapter "
            "is loaded. Set `init_lora_weights=True`, or leave the quantization out."
        )
    for kind, reason in _NOT_REPEATED.items():
        if isinstance(init, str) and init.startswith(kind):
            raise ModelError(
                f"{named}: `init_lora_weights` ({init!r}) changes the base's weights by {reason}: the saved "
                'adapter would not have the scores of training. Set it to "pissa", "olora" or True, or '
                "convert the adapter (PEFT: `path_initial_model_for_weight_conversion`)."
            )


def add_adapter(
    model: PreTrainedModel,
    peft_config: Any,
    new_tokens: Sequence[int] = (),
    *,
    revision: str | None = None,
) -> torch.nn.Module:
    """Put an adapter on the model; the reward head is trained and saved with it without being asked.

    `new_tokens`: ids that the run adds to the vocabulary, whose embeddings are trained and saved too.
    `revision`: the model's, which the adapter's files name beside it.
    """
    from peft import get_peft_model

    head_name(model)
    peft_config = copy.deepcopy(peft_config)  # PEFT writes the modules it finds into it
    saved = list(peft_config.modules_to_save or [])
    if head := [part for part in head_parts(model) if part not in saved]:
        peft_config.modules_to_save = [*saved, *head]
        logger.info("the reward head `%s` is trained and saved with the adapter", "`, `".join(head))
    if getattr(peft_config, "task_type", None) is None:
        peft_config.task_type = "SEQ_CLS"
    if new_tokens:
        _train_tokens(model, peft_config, new_tokens)
    try:
        adapted: torch.nn.Module = get_peft_model(model, peft_config, revision=revision)
    except (ValueError, TypeError) as error:
        raise ModelError(f"`peft_config` does not fit {type(model).__name__}: {error}") from error
    _warn_of_a_base_in_memory(adapted)
    return adapted


def adopt_adapter(model: Any) -> None:
    """Make a given `PeftModel`, checked by `check_given`, one whose head is trained and saved.

    Its other adapters are left as they are.
    """
    from peft.utils.other import ModulesToSaveWrapper, _set_trainable

    name = active_adapter(model)
    config = model.peft_config[name]
    new, frozen, layered = [], [], []
    for part in head_parts(model) or [head_name(model)]:
        held = _part(model, part)
        if isinstance(held, ModulesToSaveWrapper) and name in held.modules_to_save:
            if not any(parameter.requires_grad for parameter in held.modules_to_save[name].parameters()):
                held.modules_to_save[name].requires_grad_(True)
                frozen.append(part)
        elif any(hasattr(module, "base_layer") for module in held.modules()):
            layered.append(part)
        else:
            new.append(part)
    if new:
        # As PEFT does for `task_type="SEQ_CLS"`; where the task was another, or a part has another name.
        config.modules_to_save = [*(config.modules_to_save or []), *new]
        _set_trainable(model, name, new, inference_mode=False)
    for parts, message in (
        (new, "the reward head `%s` was no part of the adapter `%s`: now it is trained and saved with it"),
        (frozen, "the reward head `%s` of the adapter `%s` was frozen: now it is trained"),
        (
            layered,
            "of `%s`, a part of the reward head, only what the adapter `%s` puts on it is trained and saved: "
            "its own weights must be in the base model's files",
        ),
    ):
        if parts:
            logger.warning(message, "`, `".join(parts), name)
    if getattr(config.task_type, "value", config.task_type) != "SEQ_CLS":
        logger.info("adapter `%s`: its `task_type` (%s) is now SEQ_CLS", name, config.task_type)
        config.task_type = "SEQ_CLS"
    others = set(model.peft_config) - {name}
    for path, parameter in model.named_parameters():
        if others & set(path.split(".")):
            parameter.requires_grad_(False)
    _warn_of_a_base_in_memory(model)


def _part(model: Any, part: str) -> torch.nn.Module:
    """One of `head_parts`: a child of the model, or the pooler of its base model."""
    inner = unwrapped(model)
    found: torch.nn.Module = getattr(inner, part) if hasattr(inner, part) else getattr(inner.base_model, part)
    return found


def _train_tokens(model: PreTrainedModel, peft_config: Any, tokens: Sequence[int]) -> None:
    """As TRL: only the rows of new tokens are trained and saved, unless the whole embedding is."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding).rsplit(".", 1)[-1]
    if name in peft_config.modules_to_save:
        return
    if not hasattr(peft_config, "trainable_token_indices"):
        kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
        raise ModelError(
            f"`chat_template_path` adds {len(tokens)} tokens to the vocabulary, and {kind} cannot train "
            f"single tokens. Train all of them (`modules_to_save=[{name!r}]`), or use LoRA."
        )
    asked = peft_config.trainable_token_indices or {}
    if not isinstance(asked, dict):
        asked = {name: asked}
    peft_config.trainable_token_indices = {**asked, name: sorted({*asked.get(name, ()), *tokens})}
    logger.info("the embeddings of %d new tokens are trained and saved with the adapter", len(tokens))


def _warn_of_a_base_in_memory(model: Any) -> None:
    config = model.peft_config[active_adapter(model)]
    if not config.base_model_name_or_path:
        logger.warning(
            "the base model was made in memory, so the saved adapter will not say which it is "
            "(`base_model_name_or_path`), and cannot be loaded by itself. Save the base first and pass its "
            "directory, or save it with the adapter (`merge_on_save=True`)."
        )


def open_adapter(base: PreTrainedModel, directory: Path, *, trainable: bool = False) -> Any:
    """A `PeftModel` of `base` with the adapter saved in `directory`."""
    from peft import PeftModel

    check_init(settings_of(directory), f"adapter `{directory}`")
    own = {name for name, _ in base.named_parameters()}
    try:
        adapted = PeftModel.from_pretrained(base, str(directory), is_trainable=trainable)
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(_no_fit(directory, " ".join(str(error).split())[:400])) from error
    # Some models' layers have had other names, by which PEFT finds them.
    if (file := directory / ADAPTER_WEIGHTS).exists() and not getattr(
        base, "_checkpoint_conversion_mapping", None
    ):
        with safe_open(str(file), framework="numpy") as tensors:
            stored = set(tensors.keys())
        if said := misfit(adapted, stored, own):
            raise ModelError(_no_fit(directory, said))
    return adapted


def misfit(adapted: Any, stored: set[str], own: set[str]) -> str | None:
    """What of an adapter's file, which `stored` are the names of, found no place, or which places no weights.

    PEFT lets both pass: a base with fewer layers, or a head that stays random, would score otherwise. `own`:
    weights of the base itself that the file may bring too.
    """
    from peft import get_peft_model_state_dict

    # The base's own are known by name, and asking PEFT for them may ask the hub.
    places = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    left = {name for name in stored - places if name_in_base(name) not in own}
    for names, said in ((left, "it has no place for"), (places - stored, "the adapter has no weights for")):
        if names:
            return f"{said} {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}"
    return None


def name_in_base(stored: str) -> str:
    """What the base calls a weight that an adapter's file holds; no name of the base where it has none."""
    return stored.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _no_fit(directory: Path, said: str) -> str:
    return (
        f"adapter `{directory}` does not fit its base model: {said}. Is its base (in its `{ADAPTER_CONFIG}`) "
        "the one that it was trained on?"
    )


def embedding_is_saved(model: Any) -> bool:
    """Whether an adapter's files hold the base's whole input embedding: it grew, not only by trained rows.

    One that is trained whole (`modules_to_save`) is the adapter's own, and saved as that.
    """
    config = model.peft_config[active_adapter(model)]
    base = config.base_model_name_or_path
    if hasattr(unwrapped(model).get_input_embeddings(), "modules_to_save"):
        return False
    if not base or getattr(config, "trainable_token_indices", None):
        return False
    try:
        before = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    except (OSError, ValueError, KeyError):
        return False
    return bool(unwrapped(model).config.get_text_config().vocab_size != before)


def needs_frozen(model: Any) -> bool:
    """Whether weights that are not trained are among those that `save_model` writes."""
    return not is_adapted(model) or embedding_is_saved(model)


def save_adapter(
    model: Any, directory: Path, *, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Save the active adapter in `directory` itself, whatever its name."""
    name = active_adapter(model)
    model.save_pretrained(
        str(directory),
        selected_adapters=[name],
        state_dict=state_dict,
        save_embedding_layers=embedding_is_saved(model),
    )
    aside = directory / name
    if name != "default":
        for file in aside.iterdir():
            file.replace(directory / file.name)
        aside.rmdir()
