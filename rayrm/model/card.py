"""The card (README.md) of a saved reward model: what it is, and code that loads it in stock transformers."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

CARD = "README.md"
TAGS = ("reward-trainer", "rayrm")
"""Of a model that was trained here, on the hub."""
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
    directory: Path, *, base_model: str | None, is_adapter: bool, text_form: str, is_quantized: bool = False
) -> None:
    """Write README.md. `base_model`: what was trained, by name; None: not known."""
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
        f"---\n{facts.to_yaml()}\n---\n\n# {directory.name}\n\nThis is {what}"
        + (f", trained from `{base_model}`" if base_model else "")
        + ", by rayrm. It gives a text one number, the higher the better; only "
        f"differences between scores of answers to one prompt mean something. It was trained on {texts}.\n\n"
        f"```python\n{code.format(place=directory.name)}```\n\n"
        + (rounded if is_quantized else "")
        + "The same scores, batched: "
        "`rayrm score DIRECTORY answers.jsonl`, or `rayrm.RewardModel.from_pretrained(DIRECTORY)`.\n",
        encoding="utf-8",
    )
