"""What a trained model's card (README.md) says beside how to load it: data, figures, serving, limits, terms.

Written by rank 0 when a run ends, under the lines of `model/card.py`; a published version takes it over. It
names sources as the run file does, and of a path its last part only: cards are uploaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from rayrm.data.tokenized_set import IngestReport
from rayrm.errors import writing
from rayrm.model.card import CARD, SECTIONS_BEGIN
from rayrm.train.evaluation_record import EVALUATION, EvaluationRecord, read_evaluation

_COLUMNS: Mapping[str, tuple[str, str]] = {
    "pairs": ("num_pairs", "{num_pairs:.0f}"),
    "accuracy": ("accuracy", "{accuracy:.3f}"),
    "95% interval": ("accuracy", "{accuracy_low:.3f} to {accuracy_high:.3f}"),
    "longer wins": ("length_baseline_accuracy", "{length_baseline_accuracy:.3f}"),
    "length-controlled": ("length_controlled_accuracy", "{length_controlled_accuracy:.3f}"),
    "calibration error": ("ece", "{ece:.3f}"),
    "temperature": ("temperature", "{temperature:.2f}"),
    "margin ~ length": ("length_margin_correlation", "{length_margin_correlation:+.2f}"),
}
_LIMITS = (
    "A score compares answers to one prompt. Scores of different prompts, and of other models, mean nothing "
    "beside each other.",
    "It has learned whom its data prefers, with the errors and tastes in it; it does not know what is true.",
    "A policy that is trained on it finds what it overrates: watch answers that people read, and length.",
)


def complete_card(
    output_dir: Path, *, base_model: str, report: IngestReport | None, max_length: int | None
) -> None:
    """Add its sections to the card in `output_dir`. `report`: of the training set; None: of a stream."""
    file = output_dir / CARD
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8").partition(SECTIONS_BEGIN)[0].rstrip()
    found = output_dir / "evaluation"
    record = read_evaluation(found) if (found / EVALUATION).is_file() else None
    parts = [
        _of_data(report, max_length),
        _of_evaluation(record),
        _of_serving(output_dir.name),
        _of_limits(record, max_length),
        _of_licence(base_model),
    ]
    with writing(file):
        file.write_text("\n\n".join([text, SECTIONS_BEGIN, *filter(None, parts)]) + "\n", encoding="utf-8")


def _of_data(report: IngestReport | None, max_length: int | None) -> str:
    if report is None:
        return "## Data\n\nIt was trained on a stream of preference rows."
    refused = sum(report.refused.values())
    lines = [
        "## Data",
        "",
        f"{report.num_accepted:,} preference rows with {report.num_completions:,} completions, "
        f"{report.num_tokens / max(1, report.num_completions):,.0f} tokens each on average"
        + (f" and at most {max_length:,}" if max_length else "")
        + ".",
    ]
    if refused:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.refused.items())
        lines += ["", f"Left out: {refused:,} of {report.num_rows:,} rows read ({reasons})."]
    lines += ["", f"Fingerprint of the rows in order: `{report.fingerprint[:16]}`."]
    return "\n".join(lines)


def _of_evaluation(record: EvaluationRecord | None) -> str:
    if record is None:
        return "## How good it is\n\nNothing was held out in its training: evaluate it before you use it."
    figures = {name: one.metrics for name, one in record.sets.items()}
    shown = {
        title: form for title, form in _COLUMNS.items() if any(form[0] in found for found in figures.values())
    }
    rows = [
        [name, *(form.format(**found) if needed in found else "" for needed, form in shown.values())]
        for name, found in figures.items()
    ]
    lines = [
        "## How good it is",
        "",
        f"On held-out pairs, at step {record.step}; intervals are Wilson's, of 95%. `longer wins`: what "
        "length alone foretells.",
        "",
        f"| set | {' | '.join(shown)} |",
        "|---" * (len(shown) + 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    if found := [f"- {name}: {said}" for name, one in record.sets.items() for said in one.findings]:
        lines += ["", "To know before using it:", "", *found]
    return "\n".join(lines)


def _of_serving(name: str) -> str:
    return f"""## Serving

```bash
rayrm publish {name} --name reward && rayrm serve reward    # HTTP, and a handle for actors on Ray
```

A policy's trainer calls `rayrm.RewardClient("reward")(prompts=..., completions=...)`."""


def _of_limits(record: EvaluationRecord | None, max_length: int | None) -> str:
    lines = ["## Limits", "", *(f"- {said}" for said in _LIMITS)]
    if max_length:
        lines.append(f"- It has seen no text above {max_length:,} tokens.")
    return "\n".join(lines)


def _of_licence(base_model: str) -> str:
    licence = _licence_of(base_model)
    said = f"its card says `{licence}`" if licence else "its card says none that could be read here"
    return (
        "## Licence\n\nThese weights come of the base model's, and their use is bound by its licence "
        f"({said}) and by the terms of the data. Neither was checked."
    )


def _licence_of(base_model: str) -> str | None:
    """What the card beside a local base model says."""
    file = Path(base_model) / CARD
    if not file.is_file():
        return None
    try:
        facts: dict[str, Any] = ModelCard.load(file).data.to_dict()
    except (ValueError, OSError):
        return None
    licence = facts.get("license")
    return str(licence) if licence else None
