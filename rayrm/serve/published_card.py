"""The card (README.md) of a published version: what it is, how to score by it, what its run knew of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayrm.model.card import CARD, SECTIONS_BEGIN


def published_card(manifest: Mapping[str, Any], source: Path, *, has_run: bool) -> str:
    """The card of a version with this manifest, published from the directory `source`."""
    lines = [
        "---",
        "tags: [reward-trainer, rayrm]",
        "---",
        f"# {manifest['name']} {manifest['version']}",
        "",
        "A reward model: one score for a (prompt, completion); higher is better. Read-only.",
        "",
        f"- text form: {manifest['text_form']}",
        f"- from: `{manifest['source']}`, published {manifest['created']}",
    ]
    if has_run:
        lines.append("- trained with the settings in `run.toml`")
    if manifest["evaluation"]:
        lines += ["", "| evaluation | |", "|---|---|"]
        lines += [f"| {key} | {value:.6g} |" for key, value in manifest["evaluation"].items()]
    lines += ["", "```python", "from rayrm import RewardModel", ""]
    question = '["What is 2+2?"], ["4"]'
    if manifest["text_form"] == "conversational":
        question = '[[{"role": "user", "content": "2+2?"}]], [[{"role": "assistant", "content": "4"}]]'
    lines += [f"RewardModel.from_pretrained(PATH).score({question})", "```"]
    if manifest["is_adapter"]:
        loading = "AutoPeftModelForSequenceClassification.from_pretrained(PATH, num_labels=1)"
        lines += ["", f"This is a LoRA adapter; in PEFT: `{loading}`."]
    return "\n".join(lines) + "\n" + _known_of(source)


def _known_of(source: Path) -> str:
    """What the run that trained it wrote of the model on its card."""
    file = source / CARD
    _, begin, known = (file.read_text(encoding="utf-8") if file.is_file() else "").partition(SECTIONS_BEGIN)
    return f"\n{begin}{known}" if begin else ""
