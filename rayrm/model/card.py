"""The card (README.md) of a saved reward model: what it is, and code that loads it in stock transformers."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

CARD = "README.md"
TAGS = ("reward-trainer", "rayrm")
"""Of a model that was trained here, on the hub."""
SECTIONS_BEGIN = "<!-- what is known of it -->"
"""Behind this line stands what a run adds when it ends."""
_TITLE = "# {place}"
_LOADS = {
    "transformers": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{place}", num_labels=1)
tokenizer = AutoTokenizer.from_pretrained("{place}")
""",
    "peft": """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained("{place}", num_labels=1)
tokenizer = AutoTokenizer.from_pretrained("{place}")
model.config.pad_token_id = tokenizer.pad_token_id
""",
}
_SCORES = {
    "conversational": """messages = [
    {{"role": "user", "content": "Why is the sky blue?"}},
    {{"role": "assistant", "content": "Air scatters blue light most."}},
]
text = tokenizer.apply_chat_template(messages, tokenize=False)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
""",
    "standard": """text = "Why is the sky blue?" + " Air scatters blue light most."
inputs = tokenizer(text + tokenizer.eos_token, return_tensors="pt")
""",
}


def write_card(
    directory: Path,
    *,
    place: Path,
    base_model: str | None,
    is_adapter: bool,
    text_form: str,
    is_quantized: bool = False,
) -> None:
    """Write README.md into `directory`, which is to lie at `place`.

    `base_model`: what was trained, by name; None: not known.
    """
    library = "peft" if is_adapter else "transformers"
    facts = ModelCardData(
        base_model=base_model or None,
        library_name=library,
        pipeline_tag="text-classification",
        tags=list(TAGS),
    )
    code = _LOADS[library] + _SCORES[text_form] + "score = model.eval()(**inputs).logits[0, 0].item()\n"
    what = "an adapter of a reward model" if is_adapter else "a reward model"
    texts = (
        "dialogues, written by the chat template of its tokenizer"
        if text_form == "conversational"
        else "plain text, each with the end-of-sequence token"
    )
    rounded = (
        "Its base model was in few bits when it was trained (`quantization` in `rayrm.json`): loaded as "
        "above, without a `quantization_config`, its scores are near those of training and not the same.\n\n"
    )
    (directory / CARD).write_text(
        f"---\n{facts.to_yaml()}\n---\n\n{_TITLE.format(place=shown(place))}\n\nThis is {what}"
        + (f", trained from `{base_model}`" if base_model else "")
        + ", by rayrm. It gives a text one number, the higher the better; only "
        f"differences between scores of answers to one prompt mean something. It was trained on {texts}.\n\n"
        f"```python\n{code.format(place=shown(place))}```\n\n"
        + (rounded if is_quantized else "")
        + "The same scores, batched: "
        "`rayrm score DIRECTORY answers.jsonl`, or `rayrm.RewardModel.from_pretrained(DIRECTORY)`.\n",
        encoding="utf-8",
    )


def shown(place: Path) -> str:
    """A model's directory as its card names it: a run by its name, a checkpoint by its run's too.

    What lies above is nobody else's business: cards are uploaded.
    """
    return f"{place.parent.name}/{place.name}" if place.name.startswith("checkpoint-") else place.name


def move_card(directory: Path, before: str, after: str) -> None:
    """Have the card in `directory` name the model, which it calls `before`, by `after`."""
    text = (directory / CARD).read_text(encoding="utf-8")
    for line in (_TITLE + "\n", 'from_pretrained("{place}"'):
        text = text.replace(line.format(place=before), line.format(place=after))
    (directory / CARD).write_text(text, encoding="utf-8")
