"""Load and save reward models: `AutoModelForSequenceClassification` with one label, in transformers' files.

A saved directory loads in stock transformers and gives the same scores there. Beside the usual files it holds
`rayrm.json`: the text form and the objective the model was trained on, and its pad id. Weights are
safetensors, in and out.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rayrm.errors import ModelError
from rayrm.model.adapters import ADAPTER_CONFIG, is_adapted, open_adapter, settings_of
from rayrm.model.head import is_of_head, is_of_language_model
from rayrm.model.layout import unwrapped
from rayrm.model.quantization import quantization_from
from rayrm.model.saving import FACTS, TextForm, quiet_transformers
from rayrm.model.text_only import check_classifies, check_text_only

logger = logging.getLogger("rayrm.model")
_OTHER_TASKS = re.compile(
    "For(AudioClassification|ImageClassification|TokenClassification|QuestionAnswering|MultipleChoice)$"
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A saved reward model, ready to score: adapters merged, in eval mode.

    `max_positions` is the longest sequence in tokens that the model's positions allow (None: no limit);
    `objective` has the settings of what it was trained on, where they are not the usual ones.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text_form: TextForm
    pad_token_id: int | None
    max_positions: int | None
    objective: Mapping[str, Any] = field(default_factory=dict)


def _check_source(name: str) -> None:
    """A path-like name that is no model directory would reach the hub as a repository name: say it here."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if not looks_local:
        return
    if not path.is_dir():
        raise ModelError(f"model `{name}` is not a directory. Pass a directory that holds `config.json`.")
    if not (path / "config.json").exists() and not (path / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"model directory `{name}` has no `config.json`. Pass a directory saved by `save_pretrained`."
        )
    has_safe = any(path.glob("*.safetensors"))
    if not has_safe and any(path.glob("*.bin")):
        raise ModelError(
            f"model directory `{name}` holds pickled weights only (*.bin). rayrm reads safetensors only: "
            "load it in a place you trust and `save_pretrained` it again."
        )


def check_name(name: str, init: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Refuse a model by its name and config alone, without loading weights; its config, but an adapter's."""
    _check_source(name)
    if init.get("num_labels", 1) != 1:
        raise ModelError(
            f"`model_init_kwargs` asks for `num_labels={init['num_labels']}`, but reward models require "
            "`num_labels=1`. Remove it."
        )
    if "use_auth_token" in init:
        raise ModelError("`model_init_kwargs` has `use_auth_token`, whose name is `token` now. Rename it.")
    if (Path(name) / ADAPTER_CONFIG).exists():
        return None
    try:
        config = AutoConfig.from_pretrained(
            name,
            trust_remote_code=trust_remote_code,
            revision=init.get("revision") or "main",
            token=init.get("token"),
        )
    except (OSError, ValueError, KeyError) as error:
        here = "" if Path(name).is_dir() else f"there is no directory `{name}` here, and as a hub name: "
        raise ModelError(
            f"model `{name}` has no readable config: {here}{error}. Pass a directory that `save_pretrained` "
            "wrote, or a hub name that this machine can reach."
        ) from error
    _check_config(name, config)
    return config


def check_router(name: str, config: Any, init: Mapping[str, Any]) -> None:
    """Refuse a mixture of experts whose routers' auxiliary loss would have to be added to ours.

    It is of all tokens of a batch at once, so it would depend on how a step is cut into micro-batches.
    """
    asked = {
        key: init.get(key, getattr(config, key, None))
        for key in ("output_router_logits", "router_aux_loss_coef")
    }
    if asked["output_router_logits"] and asked["router_aux_loss_coef"]:
        raise ModelError(
            f"model `{name}` asks for its routers' auxiliary loss (`output_router_logits=True`, "
            f"`router_aux_loss_coef={asked['router_aux_loss_coef']}`), which is no part of a "
            'reward model\'s loss. Pass `model_init_kwargs={"output_router_logits": False}`, or set it so in '
            "the model's config."
        )


def _check_config(name: str, config: Any) -> None:
    """Refuse what is no text classifier, one of several labels, and special tokens outside the vocabulary."""
    check_text_only(name, config)
    check_classifies(name, config)
    classifies = any("ForSequenceClassification" in kind for kind in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise ModelError(
            f"model `{name}` is a classifier with `num_labels={config.num_labels}`, but reward models "
            "require `num_labels=1`. Start from its base model, or from a model with one label."
        )
    text = config.get_text_config()
    for key in ("pad_token_id", "eos_token_id"):
        token = getattr(text, key, None)
        size = getattr(text, "vocab_size", None)
        if isinstance(token, int) and size is not None and not -size <= token < size:
            raise ModelError(
                f"model `{name}`: `{key}` ({token}) of its `config.json` is outside the vocabulary ({size} "
                "tokens). Correct it there, or set `eos_token` and `pad_token` and save the model again."
            )


def load_model(name: str, *, new_head: bool = True, **init: Any) -> PreTrainedModel:
    """Load `name` (a directory or `org/model`) as a reward model, in float32 unless `init` says otherwise.

    `init` goes to `from_pretrained`. A head that the checkpoint lacks is drawn at random: seed before
    calling; `new_head=False` leaves that unsaid where another head replaces it. Raises ModelError for
    anything that is not loadable, or loads with more than the head missing.
    """
    init = {"dtype": "float32", **init}
    check_name(name, init, trust_remote_code=init.get("trust_remote_code", False))
    init["num_labels"] = 1
    init.setdefault("use_safetensors", True)
    if isinstance(init["dtype"], str) and init["dtype"] != "auto":
        init["dtype"] = _dtype(init["dtype"])
    try:
        with quiet_transformers():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True, **init
            )
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in init:
            raise
        raise ModelError(
            f"`model_init_kwargs` has `{unknown[1]}`, which neither `from_pretrained` nor the config of "
            f"model `{name}` knows. Leave it out, or correct its name."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model `{name}` could not be loaded: {error}. If its files are damaged, copy or save them again."
        ) from error
    missing = sorted(key for key in found["missing_keys"] if not is_of_head(model, key))
    if missing:
        raise ModelError(
            f"model `{name}` lacks weights that are not the reward head: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Its files do not fit its `config.json`; save it again."
        )
    if found["missing_keys"] and new_head:
        logger.info("the reward head of %s is new: drawn at random with the run's seed", name)
    unexpected = sorted(key for key in found["unexpected_keys"] if not is_of_language_model(key))
    if unexpected and "num_hidden_layers" not in init:
        logger.warning(
            "weights of %s that its classifier has no use for: %s", name, ", ".join(unexpected[:5])
        )
    check_num_labels(model)
    return model


def hollow_model(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The classifier with one label that a configuration makes, without its weights; nothing is drawn."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    trusted = {"trust_remote_code": True} if trust_remote_code else {}
    with torch.device("meta"), torch.random.fork_rng([]):
        made: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, **trusted)
    return made


def saved_form(facts: Mapping[str, Any], tokenizer: Any) -> TextForm:
    """The text form of a saved model; where it says none, by whether its tokenizer has a chat template."""
    form: TextForm = facts.get("text_form") or (
        "conversational" if getattr(tokenizer, "chat_template", None) else "standard"
    )
    return form


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise ModelError(f'`dtype` ({name}) is not known. Use "float32", "bfloat16", "float16" or "auto".')
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_scores_texts(model: torch.nn.Module) -> None:
    """Raise ModelError for a language model, which scores tokens, and for a model of another task."""
    inner = unwrapped(model)
    task = _OTHER_TASKS.search(type(inner).__name__)
    if task is not None:
        raise ModelError(
            f"{type(inner).__name__} is for another task ({task[0]}). Load the model with "
            "`AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1)`, or pass its name."
        )
    embeddings = getattr(inner, "get_output_embeddings", lambda: None)()
    if embeddings is None:
        return
    adapted = "Peft" if is_adapted(model) else ""
    raise ModelError(
        f"{type(inner).__name__} is a language model: it gives numbers for tokens, and a reward model one "
        f"for a text. Load it with `Auto{adapted}ModelForSequenceClassification.from_pretrained(NAME, "
        f"num_labels=1{', is_trainable=True' if adapted else ''})`, or pass its name."
    )


def check_num_labels(model: torch.nn.Module) -> None:
    """Raise ModelError unless the model gives one number per sequence."""
    num_labels = getattr(unwrapped(model).config, "num_labels", None)
    if num_labels != 1:
        raise ModelError(
            f"the model has `num_labels={num_labels}`, but reward models require `num_labels=1`. Load it "
            "with `num_labels=1`, or pass its name and let rayrm do so."
        )


def load_tokenizer(
    name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Any:
    """The tokenizer saved with `name`; `token` is the hub's."""
    _check_source(name)
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, revision=revision or "main", token=token
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from `{name}`: {error}. Pass `processing_class`, or save the "
            "tokenizer into the model's directory."
        ) from error


def set_pad_token(model: torch.nn.Module, pad_token_id: int) -> None:
    """Pooling reads the rightmost id that is not this one; it must be in the saved config."""
    unwrapped(model).config.get_text_config().pad_token_id = pad_token_id


def load_saved(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "float32",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a saved or published model for scoring; an adapter is merged into its base.

    A directory that rayrm did not save is taken as conversational where its tokenizer has a chat template.
    `trust_remote_code`: run the Python code that a model brings.
    """
    directory = Path(path)
    name = str(directory)
    if not directory.is_dir():
        raise ModelError(
            f"there is no model directory `{name}`. Pass a run's or a published model's directory."
        )
    init: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    facts = read_facts(directory)
    if (directory / ADAPTER_CONFIG).exists():
        model = load_adapted(directory, quantized=facts.get("quantization"), **init).merge_and_unload()
    else:
        model = load_model(name, **init)
    pad_token_id = facts.get("pad_token_id", model.config.get_text_config().pad_token_id)
    if pad_token_id is not None:
        set_pad_token(model, pad_token_id)
    text_form = saved_form(facts, tokenizer)
    if "text_form" not in facts:
        logger.info("%s does not say its text form: taken as %s", name, text_form)
    model = model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))).eval()
    objective = facts.get("objective") or {}
    return LoadedModel(model, tokenizer, text_form, pad_token_id, position_limit(model), objective)


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest sequence in tokens that the model's positions allow; None where nothing says so."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if limit is not None and padding is not None and name.endswith("position_embeddings"):
            # RoBERTa and its kin count positions from the pad id on.
            return limit - int(padding) - 1
    return limit


def read_facts(directory: Path) -> dict[str, Any]:
    """What `rayrm.json` says; empty where a directory has none."""
    file = directory / FACTS
    if not file.exists():
        return {}
    try:
        facts = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"`{file}` is not JSON ({error}). Save or publish the model again.") from error
    if not isinstance(facts, dict) or facts.get("text_form") not in ("standard", "conversational"):
        raise ModelError(f"`{file}` names no known `text_form`. Save or publish the model again.")
    return facts


def grow_to(base: PreTrainedModel, tokenizer: Any) -> None:
    """Give each token of an adapter an embedding: where it added some, what is trained of them is its own."""
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer))


def load_adapted(
    directory: Path, *, trainable: bool = False, quantized: dict[str, Any] | None = None, **init: Any
) -> Any:
    """The `PeftModel` saved in `directory`, on its base, which `init` goes to the loading of.

    `quantized`: how the base was rounded when the adapter was trained. It is rounded alike, and then held in
    its own type, so that scores are those of training.
    """
    if quantized is not None:
        init |= {"quantization_config": quantization_from(quantized), "device_map": {"": "cpu"}}
    settings = settings_of(directory)
    if settings.revision:
        init.setdefault("revision", settings.revision)
    base = load_model(settings.base_model_name_or_path, new_head=False, **init)
    if quantized is not None:
        with quiet_transformers():
            base = base.dequantize(dtype=base.dtype)
    if (directory / "tokenizer_config.json").exists():
        grow_to(base, load_tokenizer(str(directory), trust_remote_code=init.get("trust_remote_code", False)))
    return open_adapter(base, directory, trainable=trainable)
