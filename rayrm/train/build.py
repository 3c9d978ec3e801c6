"""The model that a run trains: loaded or given, with its adapter, pad id, dropout and checkpointing set.

Seed before calling: the head that a base model lacks is drawn here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import resolved_stage
from rayrm.errors import ConfigError, MissingExtraError, ModelError
from rayrm.model.adapters import (
    ADAPTER_CONFIG,
    active_adapter,
    add_adapter,
    adopt_adapter,
    check_given,
    check_init,
    check_settings,
    is_adapted,
    settings_of,
)
from rayrm.model.layout import disable_dropout, unwrapped
from rayrm.model.precision import bf16_usable
from rayrm.model.quantization import bitsandbytes_config, check_quantization, compute_exactly, is_quantized
from rayrm.model.reward_model import (
    check_name,
    check_num_labels,
    check_router,
    check_scores_texts,
    load_adapted,
    load_model,
    read_facts,
    set_pad_token,
)
from rayrm.model.saving import add_tags
from rayrm.model.sharded import whole_shape
from rayrm.model.text_only import check_text_only
from rayrm.train.attributes import check_head, give_attributes
from rayrm.train.rank import Rank
from rayrm.train.sequence import check_heads
from rayrm.train.zero_init import check_zero_init_of

logger = logging.getLogger("rayrm.train")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to train: a name or directory to load, or a model in memory; and the adapter to put on it.

    `quantization`: of a model that is loaded, transformers' or a run file's. `new_tokens`: the ids of tokens
    that the run adds to the tokenizer.
    """

    model: str | torch.nn.Module
    peft_config: Any = None
    quantization: Any = None
    new_tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.place or type(self.model).__name__

    @property
    def place(self) -> str | None:
        """The directory or hub name that it is loaded from; that a model in memory came from, if any."""
        if isinstance(self.model, str):
            return self.model
        return str(getattr(unwrapped(self.model).config, "_name_or_path", "")) or None

    @property
    def adapter_directory(self) -> Path | None:
        """The directory that `model` names, where it holds an adapter to go on with."""
        named = Path(self.model) if isinstance(self.model, str) else None
        return named if named is not None and (named / ADAPTER_CONFIG).exists() else None

    @property
    def adapter(self) -> Any:
        """The configuration of the adapter that is trained; None where all of the model is."""
        if self.peft_config is not None:
            return self.peft_config
        if (directory := self.adapter_directory) is not None:
            return settings_of(directory)
        given: Any = self.model
        return given.peft_config[active_adapter(given)] if is_adapted(given) else None


def trains_tokens(source: ModelSource, config: RewardConfig, tokenizer: Any) -> bool:
    """Whether an adapter that is put on the model would train the embeddings of single tokens (PEFT)."""
    adapter = source.peft_config
    if adapter is None or not isinstance(source.model, str):
        return False
    if getattr(adapter, "trainable_token_indices", None) or source.new_tokens:
        return True
    found = check_name(
        source.model, config.model_init_kwargs or {}, trust_remote_code=config.trust_remote_code
    )
    return len(tokenizer) > int(found.get_text_config().vocab_size)


def build_model(source: ModelSource, config: RewardConfig, tokenizer: Any) -> torch.nn.Module:
    """The model ready to be wrapped by an engine, in train mode, on the CPU or where it was given."""
    model = source.model
    if isinstance(model, str):
        model = _load(source, config)
    elif config.model_init_kwargs is not None:
        logger.warning("`model_init_kwargs` is ignored: the model was passed as an object")
    check_num_labels(model)
    inner = unwrapped(model)
    if adapted := is_adapted(model):
        adopt_adapter(model)
    new_tokens = _grow(inner, tokenizer, source, adapted=adapted)
    set_pad_token(model, tokenizer.pad_token_id)
    add_tags(model)
    template = config.chat_template_path
    takes_eos = template is not None and not template.endswith((".jinja", ".j2"))  # of another tokenizer
    if config.eos_token is not None or (takes_eos and tokenizer.eos_token_id is not None):
        inner.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning(
            "pad and EOS are one token (%s): scores are pooled at the last token that is neither, and a "
            "server that pools the last token would disagree. "
            "Set `pad_token` to a token that texts do not hold.",
            tokenizer.pad_token,
        )
    if source.peft_config is not None:
        loaded = isinstance(source.model, str)
        revision = (config.model_init_kwargs or {}).get("revision") if loaded else None
        model = add_adapter(inner, source.peft_config, new_tokens, revision=revision)
        adapted = True
    give_attributes(model, config, source.place)
    if config.disable_dropout:
        _zero_dropouts(model)
    if config.gradient_checkpointing:
        _checkpoint_gradients(model, config, adapted=adapted)
    return model.train()


def _load(source: ModelSource, config: RewardConfig) -> torch.nn.Module:
    """The model that `source` names, or the adapter in the directory that it names, to be trained on."""
    init = {"trust_remote_code": config.trust_remote_code, **(config.model_init_kwargs or {})}
    if (quantization := quantization_of(source, config)) is not None:
        device = Rank.here(use_cpu=config.use_cpu).device
        usable = config.bf16 and bf16_usable(use_cpu=device.type == "cpu")[0]
        computes = "float16" if config.fp16 else "bfloat16" if usable else "float32"
        init["quantization_config"] = bitsandbytes_config(quantization, compute_dtype=computes)
        init["device_map"] = {"": device}  # weights in few bits stay where they were made
    directory = source.adapter_directory
    if directory is not None and quantization is None and read_facts(directory).get("quantization"):
        logger.warning(
            "adapter `%s` was trained on weights in 4 or 8 bits, and goes on here on the weights in full "
            "precision: its scores begin elsewhere. Pass the same `quantization_config` to go on from them.",
            directory,
        )
    loaded: torch.nn.Module = (
        load_model(source.name, **init)
        if directory is None
        else load_adapted(directory, trainable=True, **init)
    )
    if quantization is not None:
        compute_exactly(loaded)
    return loaded


def _grow(inner: Any, tokenizer: Any, source: ModelSource, *, adapted: bool) -> list[int]:
    """Give every token an embedding; returns the ids that the base model never saw."""
    before = whole_shape(inner.get_input_embeddings().weight)[0]
    if len(tokenizer) > before:
        if adapted:
            raise ModelError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {before} embeddings. Resize it "
                "(`model.resize_token_embeddings`) before the adapter is put on, with the new tokens in "
                "`trainable_token_indices`."
            )
        logger.info("embeddings resized to the tokenizer's %d tokens", len(tokenizer))
        inner.resize_token_embeddings(len(tokenizer))
    return sorted({*source.new_tokens, *range(before, len(tokenizer))})


def on_first_rank() -> bool:
    """Every rank builds the model; one of them speaks of it."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _zero_dropouts(model: torch.nn.Module) -> None:
    """Zero all dropouts, and say so where the user asked for one."""
    adapters = getattr(model, "peft_config", {}).values()
    asked = max((getattr(adapter, "lora_dropout", 0.0) for adapter in adapters), default=0.0)
    if asked and on_first_rank():
        logger.warning(
            "`lora_dropout` (%s; `model.lora.dropout` in a run file) is set to zero by `disable_dropout` "
            "(True), as in TRL. Type `disable_dropout=false` to train with it, or set it to 0.",
            asked,
        )
    disable_dropout(model)


def _checkpoint_gradients(model: torch.nn.Module, config: RewardConfig, *, adapted: bool) -> None:
    inner = unwrapped(model)
    adapted_zero3 = adapted and resolved_stage(config) == 3
    # As TRL and PEFT advise: ZeRO-3 gathers weights in hooks, which reentrant recomputation runs again.
    kwargs = {"use_reentrant": adapted_zero3, **(config.gradient_checkpointing_kwargs or {})}
    if adapted_zero3 and not kwargs["use_reentrant"] and on_first_rank():
        logger.info(
            "`use_reentrant` (False) is kept, as `gradient_checkpointing_kwargs` sets it; for an adapter "
            "under ZeRO-3 the default is True"
        )
    inner.config.use_cache = False
    # transformers renamed the method; both names are within the supported range.
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    try:
        enable(kwargs)
    except ValueError as error:
        if on_first_rank():
            logger.warning("`gradient_checkpointing` (True) is off: %s", error)
        return
    if adapted or any(not p.requires_grad for p in inner.parameters()):
        # The first layer's input must require gradients, or nothing would flow to adapters behind it.
        inner.enable_input_require_grads()


def check_source(source: ModelSource, config: RewardConfig) -> None:
    """Refuse, before anything is loaded or started, a model that cannot become a reward model."""
    check_peft(source)
    check_zero_init_of(source.model if isinstance(source.model, str) else None, config)
    if isinstance(source.model, str):
        init = config.model_init_kwargs or {}
        found = check_name(source.model, init, trust_remote_code=config.trust_remote_code)
        if (directory := source.adapter_directory) is not None:
            adapter = settings_of(directory)
            _check_tuner(adapter, f"adapter `{directory}`")
            check_settings(adapter, f"adapter `{directory}`")
            base = adapter.base_model_name_or_path
            found = check_name(base, init, trust_remote_code=config.trust_remote_code)
        if found is not None:
            check_router(source.model, found, init)
            check_heads(found, config)
        check_head(found, config)
        _check_quantized(source, config, found)
    else:
        check_text_only(source.name, source.model.config)
        given: Any = source.model
        check_scores_texts(given)
        check_num_labels(given)
        check_router(source.name, given.config, {})
        check_heads(given.config, config)
        _check_quantized(source, config, given.config)
        if is_adapted(given):
            name = active_adapter(given)
            _check_tuner(given.peft_config[name], f"the model's adapter `{name}`")
            check_given(given)
        check_head(given, config)
        frozen = not any(parameter.requires_grad for parameter in given.parameters())
        if frozen and source.peft_config is None:
            raise ModelError(
                "no parameter of the model is trained: all have `requires_grad=False`. Load an adapter with "
                "`is_trainable=True`, or unfreeze what should learn."
            )


def quantization_of(source: ModelSource, config: RewardConfig) -> Any:
    """How the model is to be quantized when it is loaded; None: not, or it says so itself."""
    if not isinstance(source.model, str):
        return None
    return source.quantization or (config.model_init_kwargs or {}).get("quantization_config")


def _check_quantized(source: ModelSource, config: RewardConfig, found: Any) -> None:
    """Refuse a quantization given twice or that nothing could be trained with. `found`: its config."""
    in_init = (config.model_init_kwargs or {}).get("quantization_config")
    if not isinstance(source.model, str):
        if source.quantization is not None:
            logger.warning("`quantization_config` is ignored: the model was passed as an object")
        quantized = is_quantized(unwrapped(source.model))
    else:
        if source.quantization is not None and in_init is not None:
            raise ConfigError(
                "`quantization_config` is given twice: as an argument and in `model_init_kwargs`. Leave one "
                "out, preferably the latter."
            )
        if (quantization := quantization_of(source, config)) is not None:
            check_quantization(quantization)
        quantized = quantization is not None or getattr(found, "quantization_config", None) is not None
    if config.merge_on_save and (quantized or source.adapter is None):
        raise ConfigError(
            "`merge_on_save` (True) adds an adapter to the base model, and "
            + (
                "weights in 4 or 8 bits cannot take it. `rayrm publish` adds it to them in float32."
                if quantized
                else "all of this model is trained. Set it to false, or train an adapter (`model.lora.r=16`)."
            )
        )
    if not quantized:
        return
    if source.adapter is None:
        raise ConfigError(
            "weights in 4 or 8 bits cannot be trained: only an adapter on them can. Pass `peft_config` (for "
            "example `peft.LoraConfig()`; in a run file type `model.lora.r=16`)."
        )
    check_init(source.adapter, "the adapter", quantized=True)
    if resolved_stage(config) == 3:
        raise ConfigError(
            "ZeRO stage 3 cuts weights in pieces, which those in 4 or 8 bits do not allow. Type "
            "`zero_stage=2`: every worker then holds the whole quantized model."
        )


def _check_tuner(config: Any, named: str) -> None:
    """Refuse what needs more of PEFT than layers inside the model: the packed step calls nothing else."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    reason = None
    if getattr(config, "is_prompt_learning", False):
        reason = "learns tokens before the text, and a prefix that two completions share has none of its own"
    elif tuner is None or not issubclass(tuner, BaseTuner) or tuner.forward is not BaseTuner.forward:
        reason = "computes outside the model's layers"
    elif hasattr(tuner, "update_and_allocate") and getattr(config, "use_asa", True):
        reason = "changes its ranks between steps, by calls that this loop does not make"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "turns on at a token of each text, and packed texts are one"
    if reason is not None:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(
            f"{named}: {kind} {reason}; it would train wrongly here. Use LoRA (DoRA, rsLoRA, ...), IA3 or "
            "another of PEFT's methods that change layers."
        )


def check_peft(source: ModelSource) -> None:
    """Refuse an adapter configuration that is none, one on top of another, or one without peft."""
    if source.peft_config is None:
        return
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise MissingExtraError("`peft_config` needs peft. Type: pip install peft") from error
    if not isinstance(source.peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` must be a `peft.PeftConfig` (for example `peft.LoraConfig`), got "
            f"{type(source.peft_config).__name__}."
        )
    task = getattr(source.peft_config, "task_type", None)
    if task is not None and getattr(task, "value", task) != "SEQ_CLS":
        raise ConfigError(
            f"`peft_config` has `task_type={getattr(task, 'value', task)!r}`, but a reward model is a "
            'sequence classifier. Set `task_type="SEQ_CLS"`.'
        )
    _check_tuner(source.peft_config, "`peft_config`")
    check_settings(source.peft_config, "`peft_config`")
    if getattr(source.peft_config, "init_lora_weights", None) == "eva":
        raise ConfigError(
            '`peft_config` has `init_lora_weights="eva"`, which begins from texts that PEFT is shown by '
            "`initialize_lora_eva_weights`. Make the `PeftModel` yourself, call that, and pass the model."
        )
    if source.adapter_directory is not None:
        raise ModelError(
            f"model directory `{source.model}` holds an adapter, and `peft_config` (`model.lora`) would put "
            "another on it. Leave that out to go on training this one, or merge it first (`rayrm publish`)."
        )
    if is_adapted(source.model):
        raise ModelError(
            "a `PeftModel` was passed together with a `peft_config`. Merge the adapter first "
            "(`model.merge_and_unload()`), or leave `peft_config` out."
        )
