"""What a trainer is given, checked and resolved before anything is read: its arguments and its tokenizer."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset

from rayrm.config import RewardConfig
from rayrm.data.tokenize import prepare_tokenizer
from rayrm.errors import ConfigError
from rayrm.model.reward_model import load_tokenizer
from rayrm.train.build import ModelSource, trains_tokens
from rayrm.train.rundir import check_writable
from rayrm.train.storage import check_storage
from rayrm.train.trackers import check_trackers
from rayrm.train.zero_init import check_tokens_in_parts


def absolute(name: Any) -> Any:
    """A local path as every worker understands it, whatever its current directory; all else as it is."""
    if isinstance(name, Path) or (isinstance(name, str) and Path(name).expanduser().exists()):
        return str(Path(name).expanduser().absolute())
    return name


def check_types(model: Any, args: Any, scaling_config: Any) -> None:
    """Raise ConfigError for a config of another library, for what is no model or no `ScalingConfig`, and
    without one where a launcher has started several processes: each would train alone."""
    if not isinstance(model, str | torch.nn.Module):
        raise ConfigError(
            f"`model` is a {type(model).__name__}. Pass a directory or hub name, or a model that "
            "`AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1)` made."
        )
    if args is not None and not isinstance(args, RewardConfig):
        raise ConfigError(
            f"`args` is a {type(args).__module__}.{type(args).__qualname__}. Import it from here: "
            "`from rayrm import RewardConfig`."
        )
    if scaling_config is not None and not hasattr(scaling_config, "num_workers"):
        raise ConfigError(
            f"`scaling_config` is a {type(scaling_config).__name__}. Pass "
            "`ray.train.ScalingConfig(num_workers=2)`."
        )
    launched = os.environ.get("WORLD_SIZE", "")
    if scaling_config is None and launched.isdigit() and int(launched) > 1:
        raise ConfigError(
            f"`WORLD_SIZE` is {launched}: a launcher (torchrun, accelerate, deepspeed) has started this "
            "script as often, and each process would train alone. Start it once, with `python`, and pass "
            f"`scaling_config=ray.train.ScalingConfig(num_workers={launched}, use_gpu=True)`: Ray starts the "
            "workers. Where it was started once, unset WORLD_SIZE."
        )


def resolved_args(args: RewardConfig | None, source: ModelSource, train_dataset: Any) -> RewardConfig:
    """The config (TRL's default is named after the model), with what the data decides of it."""
    args = args or RewardConfig(f"{source.name.rsplit('/', 1)[-1]}-Reward")
    if args.shuffle is None:
        own_order = args.train_sampling_strategy == "sequential" or isinstance(train_dataset, IterableDataset)
        args = dataclasses.replace(args, shuffle=not own_order)
    if isinstance(args.deepspeed, str):
        args = dataclasses.replace(args, deepspeed=absolute(args.deepspeed))
    return args


def with_collator(args: RewardConfig, collator: Any, tokenizer: Any) -> RewardConfig:
    """The config, with what TRL's own collator says of padding. Raises ConfigError for any other collator.

    Rows are packed here by rules that a collator cannot change (`data/packing.py`); TRL's pads, no more.
    """
    if collator is None:
        return args
    kind = type(collator)
    if kind.__name__ != "DataCollatorForPreference" or not kind.__module__.startswith("trl."):
        raise ConfigError(
            f"`data_collator` ({kind.__name__}) is not supported: rayrm packs batches itself. Leave it out, "
            "and change the rows before."
        )
    if collator.pad_token_id != tokenizer.pad_token_id:
        raise ConfigError(
            f"`data_collator` pads with {collator.pad_token_id}, and the tokenizer's pad token is "
            f"{tokenizer.pad_token_id}: scores are pooled by that. Leave the collator out, or set "
            "`pad_token`."
        )
    multiple = collator.pad_to_multiple_of
    return args if multiple is None else dataclasses.replace(args, pad_to_multiple_of=multiple)


def warn_of_old_columns(sets: Iterable[Any]) -> None:
    """Warn the caller's caller of the old names of token ids, where a set tells its columns.

    Whatever reads the rows warns too, but in another process.
    """
    for source in sets:
        parts = source.values() if isinstance(source, dict) else [source]
        if any("chosen_input_ids" in (getattr(part, "column_names", None) or ()) for part in parts):
            warnings.warn(
                "`chosen_input_ids`/`rejected_input_ids` are the old names of `chosen_ids`/`rejected_ids`: "
                "rename the columns, the old names will go",
                FutureWarning,
                stacklevel=3,
            )
            return


def tokenizer_of(
    processing_class: Any, source: ModelSource, args: RewardConfig
) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer that was passed, else the model's; with the tokens and the template that `args` names.

    And the ids of the tokens that it had not before.
    """
    if processing_class is not None and not hasattr(processing_class, "get_vocab"):
        raise ConfigError(
            f"`processing_class` is a {type(processing_class).__name__}, and text is tokenized here. Pass "
            "its tokenizer (`processor.tokenizer`)."
        )
    init = args.model_init_kwargs or {}
    tokenizer = processing_class or load_tokenizer(
        _tokenizer_place(source),
        trust_remote_code=args.trust_remote_code,
        revision=init.get("revision"),
        token=init.get("token"),
    )
    before = set(tokenizer.get_vocab().values())
    prepared = prepare_tokenizer(
        tokenizer,
        eos_token=args.eos_token,
        pad_token=args.pad_token,
        chat_template_path=args.chat_template_path,
    )
    return prepared, tuple(sorted(set(prepared.get_vocab().values()) - before))


def check_tokens(source: ModelSource, args: RewardConfig, tokenizer: Any, scaling_config: Any) -> None:
    """Raise ConfigError where workers could not make an adapter's part of new tokens' embeddings."""
    num_workers = 0 if scaling_config is None else int(scaling_config.num_workers or 0)
    if args.zero_init and num_workers > 1:
        check_tokens_in_parts(
            args,
            trains_tokens=trains_tokens(source, args, tokenizer),
            on_cpu=args.use_cpu or not scaling_config.use_gpu,
        )


def check_places(args: RewardConfig, output_dir: Path) -> None:
    """Raise where the run's directory, its object store or a tracker cannot be written to."""
    check_writable(output_dir)
    check_storage(args, output_dir)
    check_trackers(args.report_to)


def _tokenizer_place(source: ModelSource) -> str:
    """Where the model's tokenizer is: an adapter's directory may have none of its own."""
    directory = source.adapter_directory
    if directory is None or (directory / "tokenizer_config.json").exists():
        return source.name
    return str(source.adapter.base_model_name_or_path)
