"""The training set of a run: read whole before training, or while it trains; which of the two, and why."""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rayrm.config import DataConfig, RewardConfig
from rayrm.data.order import Order
from rayrm.data.sources import check_found
from rayrm.data.steps import IndexedSteps, TrainSteps
from rayrm.data.stream_steps import StreamedSteps
from rayrm.data.streaming import StreamSource
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError

Mode = Literal["indexed", "streaming"]
LARGE_BYTES = 32 * 2**30
"""From here on "auto" streams: some 30 million pairs, whose index would take gigabytes of every rank."""
logger = logging.getLogger("rayrm.train")


def choose_mode(data: DataConfig, source: Any, config: RewardConfig) -> Mode:
    """How the source is read, by `data.mode`; says why. Raises `ConfigError` for what streaming cannot do."""
    mode, why = _decide(data, source, config)
    logger.info("data.mode: %s, since %s", mode, why)
    if mode == "streaming":
        _check_streaming(data, config)
    return mode


def _decide(data: DataConfig, source: Any, config: RewardConfig) -> tuple[Mode, str]:
    if data.mode != "auto":
        return data.mode, "data.mode says so"
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.IterableDataset):
        if config.max_steps > 0:
            return "streaming", "the source is an IterableDataset and `max_steps` is set"
        return "indexed", "`max_steps` is not set; the whole IterableDataset is read first"
    if datasets is not None and isinstance(source, datasets.Dataset):
        return "indexed", "the source is a Dataset (`data.mode=streaming` would start at once)"
    size = local_bytes(source)
    if not size:
        return "indexed", "nothing tells the set's size (`data.mode=streaming` would start at once)"
    if size <= LARGE_BYTES:
        return "indexed", "the set fits an index (`data.mode=streaming` would start at once)"
    if config.max_steps > 0:
        return "streaming", f"the source is large ({size / 2**30:.0f} GiB)"
    return "indexed", (
        f"`max_steps` is not set (the source is large, {size / 2**30:.0f} GiB: with `max_steps` it would be "
        "trained on while it is read)"
    )


def local_bytes(source: Any) -> int:
    """The size of local files that the source names; 0 for what is not known without reading."""
    if isinstance(source, (list, tuple)):
        return sum(local_bytes(entry) for entry in source if not isinstance(entry, dict))
    source = getattr(source, "path", source)
    if isinstance(source, list):
        return local_bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        return 0
    path = Path(source).expanduser()
    if glob.has_magic(str(source)) and not path.exists():
        found = glob.glob(str(path), recursive=True)
        return sum(local_bytes(name) for name in found)
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return path.stat().st_size if path.is_file() else 0


def _check_streaming(data: DataConfig, config: RewardConfig) -> None:
    problems = []
    if data.eval_fraction and data.max_split_pairs is None:
        problems.append(
            f"`data.eval_fraction` ({data.eval_fraction:g}): all held-out pairs of a stream are known when "
            "all of it was read. Type `data.max_eval_pairs=10000` (those among its first rows, this many, "
            "are the evaluation set), or `data.mode=indexed`."
        )
    if config.max_steps < 1:
        problems.append(
            f"`max_steps` ({config.max_steps}): a stream has no known length. Type `max_steps=10000`, or "
            "`data.mode=indexed`."
        )
    if config.max_length is None:
        problems.append(
            "`max_length` (None): the longest row of a stream is not known before it comes. Type "
            "`max_length=1024`, or `data.mode=indexed`."
        )
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        if getattr(config, name) == "epoch":
            problems.append(
                f'`{name}` ("epoch"): nobody knows where an epoch of a stream ends. Type `{name}=steps`.'
            )
    if problems:
        raise ConfigError("\n".join([*problems]))


def check_sources(train: Any, evaluation: Any) -> None:
    """`DataError` for files that are not there, before Ray starts or another set is read."""
    sets = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    for source in (train, *sets):
        check_found(source)


def check_sets(data: DataConfig, config: RewardConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """What can be said against the sets before one of them is read: `ConfigError`, `DataError`."""
    _check_evaluation(data, config, eval_dataset)
    _check_selection(data, train_dataset, eval_dataset)
    check_sources(train_dataset, eval_dataset)


def _check_evaluation(data: DataConfig, config: RewardConfig, eval_dataset: Any) -> None:
    """`ConfigError` where there is to be evaluated and nothing to evaluate on."""
    nothing = eval_dataset is None or (isinstance(eval_dataset, dict) and not eval_dataset)
    if config.eval_strategy != "no" and not data.eval_fraction and nothing:
        raise ConfigError(
            f"`eval_strategy` ({config.eval_strategy}) needs an evaluation set. Pass `eval_dataset` "
            '(a run file: `[data] eval` or `eval_fraction`), or set `eval_strategy="no"`.'
        )


def _check_selection(data: DataConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """What `eval_fraction` and `exclude_prompts_of` cannot be honoured with: `ConfigError`."""
    fraction, excluded = data.eval_fraction, data.exclude_prompts_of
    if fraction and eval_dataset is not None:
        raise ConfigError(
            f"`eval_fraction` ({fraction:g}) and `eval_dataset`: the evaluation set is one of the two. "
            "Leave one out."
        )
    if (fraction or excluded is not None) and isinstance(train_dataset, TokenizedSet):
        named = f"`eval_fraction` ({fraction:g})" if fraction else f"`exclude_prompts_of` ({excluded})"
        raise ConfigError(
            f"{named} goes by the prompts' text, and `train_dataset` is a TokenizedSet, which has none. "
            "Pass `selection` to the `ingest` that makes it."
        )


def identity_of_data(train_set: TokenizedSet | StreamSource, data: DataConfig) -> str:
    """What a run is trained on, in which order: a run with another is another run."""
    if isinstance(train_set, StreamSource):
        return f"stream, window {data.shuffle_window}, {train_set.report.fingerprint}"
    parts = [(part.num_rows, part.weight) for part in train_set.parts]
    return train_set.report.fingerprint + (f", parts {parts}" if parts else "")


@contextmanager
def steps_for(
    train_set: TokenizedSet | StreamSource,
    config: RewardConfig,
    data: DataConfig,
    *,
    num_workers: int,
    quarantine_path: Path,
) -> Iterator[TokenizedSet | StreamedSteps]:
    """What the ranks are given to train on; a stream is read as long as the block lasts."""
    if isinstance(train_set, TokenizedSet):
        yield train_set
        return
    with train_set.started(
        rows_per_step=config.train_batch_rows(num_workers),
        num_ranks=max(1, num_workers),
        seed=config.seed if config.data_seed is None else config.data_seed,
        window=data.shuffle_window,
        shuffle=config.shuffle is not False,
        drop_last=config.dataloader_drop_last,
        quarantine_path=quarantine_path,
        max_bad_row_fraction=config.max_bad_row_fraction,
        max_tasks=config.dataset_num_proc,
    ) as steps:
        yield steps


def train_steps(train_set: TokenizedSet | StreamedSteps, config: RewardConfig, num_ranks: int) -> TrainSteps:
    """The steps of a run: those of a stream, or those that the order of a whole set makes."""
    if isinstance(train_set, StreamedSteps):
        return train_set
    order = Order(
        train_set.num_rows,
        config.train_batch_rows(num_ranks),
        seed=config.seed if config.data_seed is None else config.data_seed,
        shuffle=config.shuffle is not False,
        drop_last=config.dataloader_drop_last,
        parts=train_set.parts,
    )
    return IndexedSteps(train_set, order)
