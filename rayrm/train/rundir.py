"""What an output directory holds, and whether this run may use it: begin, resume, or refuse. Never overwrite.

A run is known by its identity: the settings that shape its trajectory and the fingerprint of its data. How
often it logs, evaluates or saves may change between a start and a resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import shaping
from rayrm.errors import CheckpointError, ConfigError, RunDirectoryError
from rayrm.runfile import dump_run, read_run, without_secrets
from rayrm.settings import switch_word
from rayrm.train.checkpoint import IDENTITY, MANIFEST, RUN, checkpoints, read_state, verify_checkpoint
from rayrm.train.holding import LOCK, holding
from rayrm.train.records import METRICS, PROGRESS, replace_text, write_records
from rayrm.train.storage import FAILURES, storage_environment, storage_of
from rayrm.train.trainer_state import log_history

RUN_TOML = "run.toml"
Resume = bool | str | PathLike[str] | None
"""`resume_from_checkpoint`, as scripts and command lines give it."""
logger = logging.getLogger("rayrm.train")
_BUDGET = "max_tokens_per_microbatch"
_ORIGIN = "origin"
# What a run writes into its directory: a file of one of these names that is not ours would be lost.
_WRITTEN = (
    METRICS, PROGRESS, IDENTITY, RUN_TOML, "quarantine.jsonl", "rows-*.jsonl", "tensorboard", "checkpoint-*",
    "trackers.json", "mlflow.db",
    "README.md", "config.json", "adapter_*", "*.safetensors*", "rayrm.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "additional_chat_templates", "attributes", "trainer_state.json", "evaluation",
    "report.html", "report.md", "report.json", "card-*.svg",
)  # fmt: skip
_FREE = {
    "output_dir", "run_name", "report_to", "disable_tqdm", "resume_from_checkpoint", "dataset_num_proc",
    "project", "storage_path",
    "do_train", "do_eval", "do_predict", "remove_unused_columns", "max_bad_row_fraction",
    "restore_callback_states_from_checkpoint",
    "logging_strategy", "logging_steps", "logging_first_step",
    "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size",
    "eval_delay", "save_strategy", "save_steps", "save_total_limit",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_revision",
    # The same numbers, kept elsewhere or in other parts; and what `shuffle` says.
    "zero_stage", "activation_offloading", "train_sampling_strategy",
    # Until a loss is not finite, both values do the same.
    "nonfinite_loss",
    "log_rows",
    "zero_init",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    # Named by what they make together: rows_per_step.
    "per_device_train_batch_size", "gradient_accumulation_steps",
    # As the number of workers, which it divides.
    "sequence_parallel_size",
    # Decided once and then kept: see `RunStart.max_tokens`.
    _BUDGET,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunStart:
    """How a run begins: from `resume` (None: at its first step), with the token budget chosen before.

    `origin`: the checkpoint of another directory that its first start went on from, if it did.
    """

    resume: Path | None
    max_tokens: int | None
    origin: Path | None = None


ORDER = "torch.randperm of seed + epoch"
"""Of rows: a run that began by another order of this library goes on by none."""


def identity_of(
    config: RewardConfig,
    *,
    model: str,
    adapter: Any,
    data: str,
    rows_per_step: int,
    quantization: Any = None,
    optimizer: tuple[type, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What must be equal for two starts to be one run."""
    settings = {key: _told(value) for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    return {
        "model": model,
        "adapter": None if adapter is None else _plain(adapter.to_dict()),
        "quantization": None if quantization is None else _plain(_table(quantization)),
        "data": data,
        "rows_per_step": rows_per_step,
        "order": ORDER,
        "optimizer": None if optimizer is None else f"{optimizer[0].__qualname__} {_plain(optimizer[1])}",
        **_plain({**settings, "deepspeed": shaping(config)}),
    }


def _told(value: Any) -> Any:
    """A setting without its secrets; one that was nothing else is none."""
    if not isinstance(value, dict):
        return value
    told = without_secrets(value)
    return None if value and not told else told


def _table(quantization: Any) -> dict[str, Any]:
    """Of a run file, or transformers' own."""
    if dataclasses.is_dataclass(quantization) and not hasattr(quantization, "to_dict"):
        return dataclasses.asdict(quantization)  # type: ignore[arg-type]
    made: dict[str, Any] = quantization.to_dict()
    return made


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """A table as JSON holds it; sets, whose order is another in every process, become sorted lists."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else str(value)

    made: dict[str, Any] = json.loads(json.dumps(table, default=plain))
    return made


def checkpoint_of(resume: Resume) -> Path | bool:
    """What `resume_from_checkpoint` asks for: a checkpoint, True for the newest, False for none.

    A path is absolute, since workers have another current directory.
    """
    word = switch_word(os.fspath(resume) if isinstance(resume, PathLike) else resume)
    return Path(word).expanduser().absolute() if word and word != "true" else bool(word)


def check_resume(resume: Resume) -> None:
    """Raise CheckpointError for a path that is no checkpoint, before anything is read or built."""
    wanted = checkpoint_of(resume)
    # One that is whole by its list is read once, where the run begins.
    if isinstance(wanted, Path) and not (wanted / MANIFEST).is_file():
        verify_checkpoint(wanted)


def bring(
    config: RewardConfig, output_dir: Path, identity: dict[str, Any], *, resume: Resume, automatic: bool
) -> None:
    """Fetch what the store holds of this run where its newest checkpoint is newer than the directory's, or
    raise what to type.

    `resume`, `automatic`: as of `examine`.
    """
    storage = storage_of(config, output_dir, storage_environment(config))
    if storage is None:
        return
    try:
        if not storage.has(IDENTITY):
            return
        _refuse_other(storage.url, json.loads(storage.read(IDENTITY)).get("identity", {}), identity)
        here = checkpoints(output_dir)
        if read_finished(output_dir) or (here and not storage.is_ahead_of(here[-1])):
            return
        if storage.has(PROGRESS) and json.loads(storage.read(PROGRESS)).get("finished"):
            raise finished(storage.url)
        if not checkpoint_of(resume) and not automatic:
            raise RunDirectoryError(
                f"`{storage.url}` holds a run that did not finish. Pass `resume_from_checkpoint=True` to go "
                "on with it, or choose another `output_dir`."
            )
        known = output_dir / IDENTITY
        if known.exists():
            _refuse_other(output_dir, _read(known).get("identity", {}), identity)
        else:
            _refuse_foreign(output_dir)
        storage.fetch()
    except FAILURES as error:
        raise CheckpointError(
            f"the run's copy in {storage.url} cannot be read: {error}. Type the same again, or leave "
            "`storage_path` out to begin anew."
        ) from error


def examine(
    output_dir: Path,
    identity: dict[str, Any],
    *,
    resume: Resume,
    automatic: bool = False,
    may_differ: frozenset[str] = frozenset(),
    own: frozenset[str] = frozenset(),
) -> RunStart:
    """Decide how a run with this identity may use `output_dir`, or raise what to type instead.

    `resume`: as `resume_from_checkpoint`. `automatic`: a run that was cut off goes on without being asked
    (the command line's rule). `may_differ`: settings in which a checkpoint of another directory may
    be another run's (which a sweep asks for, see `leg.py`). `own`: files that this trainer wrote there.
    """
    found = checkpoint_of(resume)
    wanted, asked = (found, True) if isinstance(found, Path) else (None, found)
    known = output_dir / IDENTITY
    if not known.exists():
        _refuse_foreign(output_dir, own)
        if asked and wanted is None:
            raise CheckpointError(
                f"`resume_from_checkpoint` is set, but `{output_dir}` holds no run. "
                "Leave it out to start one."
            )
        if wanted is None:
            return RunStart(None, None)
        # As within its own directory, a run that goes on keeps its budget, and with it its bits.
        budget = read_state(wanted).max_tokens
        _refuse_checkpoint_of_other(wanted, identity, may_differ)
        return RunStart(wanted, budget, wanted)
    before = _read(known)
    _refuse_other(output_dir, before.get("identity", {}), identity)
    if read_finished(output_dir):
        raise finished(output_dir)
    if not asked and not automatic:
        raise RunDirectoryError(
            f"`{output_dir}` holds a run that did not finish. Pass `resume_from_checkpoint=True` to go on "
            "with it, or choose another `output_dir`."
        )
    whole = checkpoints(output_dir)
    newest = whole[-1] if whole else None
    origin = Path(before[_ORIGIN]) if before.get(_ORIGIN) else None
    same = wanted is not None and origin is not None and wanted.resolve() == origin.resolve()
    if wanted is not None and not same and (newest is None or wanted.resolve() != newest.resolve()):
        raise CheckpointError(
            f"`resume_from_checkpoint` ({wanted}) is not the newest checkpoint of `{output_dir}` "
            f"({newest.name if newest else 'none'}). Resume from that one, or copy `{wanted.name}` out and "
            "resume from the copy with another `output_dir`."
        )
    start = newest or origin
    if start is not None:
        verify_checkpoint(start)
    return RunStart(start, before.get(_BUDGET), origin)


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunDirectoryError(
            f"run record `{file}` is damaged ({error}), so this run cannot be told from another. Choose "
            "another `output_dir`, with `resume_from_checkpoint` the newest `checkpoint-<step>` of this one."
        ) from error
    return dict(read)


def finished(output_dir: Path | str) -> RunDirectoryError:
    """The refusal to train a finished run again."""
    return RunDirectoryError(
        f"the run in `{output_dir}` is finished: its model is saved there. To train again, choose "
        "another `output_dir`; to train on from this model, pass it as the model of a new run."
    )


def read_finished(output_dir: Path) -> bool:
    """Whether the run says that it came to its end."""
    file = output_dir / PROGRESS
    # Without content a power loss leaves one that was not synced; the last one of a run is.
    return file.exists() and file.stat().st_size > 0 and bool(_read(file).get("finished"))


@contextmanager
def only_run(output_dir: Path) -> Iterator[None]:
    """Hold the directory for this process; a second run that wants it is refused. A killed holder lets go."""

    def refuse(holder: str) -> None:
        raise RunDirectoryError(
            f"another process is training in `{output_dir}` ({holder}). Wait for it to end, or choose "
            "another `output_dir`."
        )

    try:
        with holding(output_dir / LOCK, refuse):
            yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty: something was written
            output_dir.rmdir()


def check_writable(output_dir: Path) -> None:
    """Raise ConfigError where nothing can be written to `output_dir`; makes nothing but its parents."""
    nearest = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"`output_dir` ({output_dir}): `{nearest}` is a file. Choose a directory.")
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir if output_dir.exists() else output_dir.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"`output_dir` ({output_dir}) cannot be written: {error.strerror}. Choose a directory that can."
        ) from error


def claim(
    output_dir: Path,
    identity: dict[str, Any],
    max_tokens: int | None,
    run_toml: str,
    origin: Path | None = None,
    keeps_records: bool = True,
) -> None:
    """Write what makes the directory this run's: identity, token budget (None: not chosen), resolved run,
    and the checkpoint elsewhere that it goes on from; where it `keeps_records`, those are its own first (a
    leg has other settings, and its own).
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {"identity": identity, _BUDGET: max_tokens}
    if origin is not None:
        kept[_ORIGIN] = str(origin)
    replace_text(output_dir / IDENTITY, json.dumps(kept, indent=2, default=str))
    replace_text(output_dir / RUN_TOML, run_toml)
    if origin is not None and keeps_records and not (output_dir / METRICS).exists():
        write_records(output_dir, log_history(origin))


def recorded_budget(output_dir: Path) -> int | None:
    """The token budget that the run chose before; None where none is written."""
    file = output_dir / IDENTITY
    return _read(file).get(_BUDGET) if file.exists() else None


def record_budget(output_dir: Path, max_tokens: int) -> None:
    """Write the budget where a resume reads it, and into `run.toml`, if the directory is a run's."""
    file, run_toml = output_dir / IDENTITY, output_dir / RUN_TOML
    if not file.exists():
        return
    run = read_run(run_toml)
    run.reward.max_tokens_per_microbatch = max_tokens
    replace_text(run_toml, dump_run(run))
    replace_text(file, json.dumps({**_read(file), _BUDGET: max_tokens}, indent=2))


def _refuse_foreign(output_dir: Path, own: frozenset[str] = frozenset()) -> None:
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise RunDirectoryError(f"`output_dir` ({output_dir}) is a file. Choose a directory.")
    present = sorted({path.name for pattern in _WRITTEN for path in output_dir.glob(pattern)} - own)
    if present:
        raise RunDirectoryError(
            f"`output_dir` ({output_dir}) holds files that are not of a run of rayrm "
            f"({', '.join(present[:3])}), and this run would overwrite them. Choose another `output_dir`."
        )


def _refuse_other(output_dir: Path | str, before: dict[str, Any], now: dict[str, Any]) -> None:
    if differing := differing_in(before, now):
        raise RunDirectoryError(
            f"`output_dir` ({output_dir}) holds another run. They differ in {differing}. Choose another "
            "`output_dir`, or set these back to resume it."
        )


def _refuse_checkpoint_of_other(checkpoint: Path, now: dict[str, Any], may_differ: frozenset[str]) -> None:
    """A checkpoint goes on with its own schedule, order and rows, whatever this run's settings say."""
    places = (checkpoint / RUN, checkpoint.parent / IDENTITY)
    known = next((place for place in places if place.exists()), None)
    if known is None:
        logger.warning("%s does not say which run it is of: it goes on with its own schedule", checkpoint)
    elif differing := differing_in(_read(known).get("identity", {}), now, may_differ):
        raise CheckpointError(
            f"`resume_from_checkpoint` ({checkpoint}) is a checkpoint of another run. They differ in "
            f"{differing}. Set these back to go on with it, or begin a run of its model: type "
            f"`model.name={checkpoint}` in the place of `resume_from_checkpoint`."
        )


def differing_in(
    before: dict[str, Any], now: dict[str, Any], may_differ: frozenset[str] = frozenset()
) -> str:
    """The keys in which two identities differ, with both values; empty where they are one."""
    found = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted({*before, *now} - may_differ)
        if before.get(key) != now.get(key)
    ]
    return "; ".join(found[:5]) + (" ..." if len(found) > 5 else "")
