"""What a saved reward model's directory holds: its content files and its text form, or why it is refused.

Reads JSON and safetensors headers only: no weight is loaded and no torch imported, so a wrong directory is
refused in milliseconds, before any cluster or replica starts. Loading is
`rayrm.model.reward_model.load_saved`.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rayrm.errors import PublishError

FACTS = "rayrm.json"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class SavedFiles:
    """A saved model: `content` names its files in `directory`, sorted; `facts` is its rayrm.json."""

    directory: Path
    content: tuple[str, ...]
    is_adapter: bool
    text_form: str
    facts: Mapping[str, Any]


def saved_files(directory: str | Path) -> SavedFiles:
    """Look at a saved model without loading it.

    Raises:
        PublishError: the directory is missing, has no (or broken) safetensors, or is no one-label model.
    """
    root = Path(directory)
    if not root.is_dir():
        raise PublishError(
            f"model ({str(directory)!r}) is not a directory. Pass a published model (registry/<name>) or a "
            "saved one: a run's `output_dir` or its `checkpoint-<step>`."
        )
    is_adapter = (root / "adapter_config.json").is_file()
    if is_adapter:
        if not (root / "adapter_model.safetensors").is_file():
            raise PublishError(_no_weights(root, "adapter_model.safetensors"))
        task = read_json(root / "adapter_config.json").get("task_type")
        if task != "SEQ_CLS":
            raise PublishError(
                f"{str(root)!r} is an adapter for task_type={task!r}: a reward model's is 'SEQ_CLS'. "
                "Train one with `rayrm train` and `[model.lora]`."
            )
        weights = ["adapter_config.json", "adapter_model.safetensors"]
    else:
        _check_config(root)
        weights = ["config.json", *_weight_files(root)]
    for name in weights:
        if name.endswith(".safetensors"):
            _check_safetensors(root / name)
    # Code of models loaded with trust_remote_code travels with the weights it belongs to.
    extras = [path.name for path in root.glob("*.py")]
    templates = [p.relative_to(root).as_posix() for p in root.glob("additional_chat_templates/*.jinja")]
    tokenizer = [name for name in _TOKENIZER_FILES if (root / name).is_file()]
    if not tokenizer:
        raise PublishError(
            f"{str(root)!r} has no tokenizer files, and a score begins with text. "
            "Save it there with `tokenizer.save_pretrained(...)`."
        )
    content = tuple(sorted({*weights, *extras, *templates, *tokenizer}))
    facts = read_json(root / FACTS) if (root / FACTS).is_file() else {}
    return SavedFiles(root, content, is_adapter, str(facts.get("text_form") or _guess_form(root)), facts)


def check_base(directory: str | Path) -> None:
    """Raise PublishError for an adapter whose base cannot be read here; a base by its hub name passes."""
    file = Path(directory) / "adapter_config.json"
    base = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    if not isinstance(base, str):
        return
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1
    if looks_local and not (Path(base) / "config.json").is_file():
        raise PublishError(
            f"adapter {str(directory)!r} needs its base model, and {base!r} (`base_model_name_or_path` in "
            "its adapter_config.json) holds none here. Put the base there, on every node, or publish the "
            "adapter merged (without `--keep-adapter`)."
        )


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; PublishError naming the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PublishError(
            f"{str(path)!r} cannot be read as JSON ({error}). Save the model again."
        ) from error
    if not isinstance(value, dict):
        raise PublishError(f"{str(path)!r} must hold a JSON object, not {type(value).__name__}.")
    return value


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def training_records(checkpoint: Path) -> tuple[str | None, dict[str, float]]:
    """`run.toml` as text (None when there is none) and the last evaluation in `metrics.jsonl`, of all sets.

    They lie in the checkpoint or, for `checkpoint-<step>`, in the run directory above it; what was evaluated
    after that step is of other weights. A last line that was cut off by a kill is left out.
    """
    prefix, _, number = checkpoint.name.rpartition("-")
    is_step = prefix == "checkpoint" and number.isdigit()
    step = int(number) if is_step else _best_step(checkpoint)
    run_text: str | None = None
    evaluation: dict[str, float] = {}
    for place in [checkpoint, checkpoint.parent] if is_step else [checkpoint]:
        if run_text is None and (place / "run.toml").is_file():
            run_text = (place / "run.toml").read_text(encoding="utf-8")
        if not evaluation and (place / "metrics.jsonl").is_file():
            for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
                row = json.loads(line) if line.endswith("\n") and line.strip() else {}
                found = {
                    k: float(v) for k, v in row.items() if k.startswith("eval_") and type(v) in (int, float)
                }
                if found and "step" in row and (step is None or row["step"] <= step):
                    of_other_sets = evaluation if evaluation.get("step") == row["step"] else {}
                    evaluation = {**of_other_sets, "step": float(row["step"]), **found}
    return run_text, evaluation


def _best_step(run: Path) -> int | None:
    """The step of the weights in a run's own directory, where it ended with its best checkpoint's."""
    settings, standing = run / "run.toml", run / "progress.json"
    if not (settings.is_file() and standing.is_file()):
        return None
    try:
        loads_best = tomllib.loads(settings.read_text(encoding="utf-8"))["reward"]["load_best_model_at_end"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None  # it is kept as it is, and not read otherwise
    best = read_json(standing).get("best_checkpoint") if loads_best else None
    return int(str(best).rpartition("-")[2]) if best else None


def _check_config(root: Path) -> None:
    if not (root / "config.json").is_file():
        raise PublishError(
            f"{str(root)!r} is not a saved model: there is no config.json. "
            "Pass a run's `output_dir` or its `checkpoint-<step>`."
        )
    config = read_json(root / "config.json")
    architectures = [str(name) for name in config.get("architectures") or []]
    if not any("SequenceClassification" in name for name in architectures):
        raise PublishError(
            f"{str(root)!r} holds {', '.join(architectures) or 'no architecture'}: a reward model is a "
            "...ForSequenceClassification with one label. Train one with `rayrm train`."
        )
    # transformers writes id2label for any number of labels but its default, two.
    num_labels = int(config.get("num_labels") or len(config.get("id2label") or (0, 1)))
    if num_labels != 1:
        raise PublishError(
            f"{str(root)!r} has num_labels={num_labels}: a reward model has one score. "
            "Train with `num_labels=1` (`rayrm train` does)."
        )


def _weight_files(root: Path) -> list[str]:
    if (root / _INDEX).is_file():
        named = read_json(root / _INDEX).get("weight_map")
        if not isinstance(named, dict):
            raise PublishError(f"{str(root / _INDEX)!r} has no object `weight_map`. Save the model again.")
        shards = sorted({str(name) for name in named.values()})
        for name in shards:
            if Path(name).name != name:
                raise PublishError(
                    f"{str(root / _INDEX)!r} names the shard {name!r}, which must be a file of that "
                    "directory. Save the model again."
                )
        missing = [name for name in shards if not (root / name).is_file()]
        if missing:
            raise PublishError(
                f"{str(root / missing[0])!r} is named by {_INDEX} and missing. Copy or save the model again."
            )
        return [_INDEX, *shards]
    if not (root / "model.safetensors").is_file():
        raise PublishError(_no_weights(root, "model.safetensors"))
    return ["model.safetensors"]


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = tensors.keys()
    except (SafetensorError, OSError) as error:
        raise PublishError(
            f"{str(path)!r} is not a readable safetensors file ({error}): it is corrupt or cut short. "
            "Save or copy the model again."
        ) from error
    if not names:
        raise PublishError(f"{str(path)!r} holds no tensor. Save the model again.")


def _no_weights(root: Path, expected: str) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in root.glob(pattern))
    if pickles:
        return (
            f"{str(root)!r} has its weights only as pickles ({pickles[0]}), which run code when loaded. "
            "Convert "
            "once: AutoModelForSequenceClassification.from_pretrained(DIR, "
            "num_labels=1).save_pretrained(DIR)."
        )
    return f"{str(root)!r} has no {expected}. Pass a run's `output_dir` or its `checkpoint-<step>`."


def _guess_form(root: Path) -> str:
    """Conversational when the tokenizer has a chat template: the rule for models that rayrm did not save."""
    if (root / "chat_template.jinja").is_file() or (root / "chat_template.json").is_file():
        return "conversational"
    config = root / "tokenizer_config.json"
    has_template = config.is_file() and bool(read_json(config).get("chat_template"))
    return "conversational" if has_template else "standard"
