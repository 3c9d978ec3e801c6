"""What callers give as a text -> the text that becomes ids: the chat template, the last EOS, the first BOS.

Each text is rendered as if it were alone, and one that cannot be is a `ScoreError` in its place. The chat
template is applied to a batch in one call, which is faster and gives the same. No ids here: see `tokenize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError

from rayrm.data.messages import Message, Text, check_roles, check_text, parse_text
from rayrm.errors import ConfigError, RowError, ScoreError

TextForm = Literal["standard", "conversational"]
# What a chat template can raise on messages it was not written for: jinja's own errors, and Python's from
# the expressions inside the template.
_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class TextInput:
    """One text to encode: a completion and the prompt before it, both strings or both message lists.

    `prompt` None: the completion is the whole text. `rendered`: the strings hold the chat template's output
    already (or the model has none). `complete_turn`, beside it: a text that ends with an end-of-turn token,
    as a policy stops, gets what the template writes after it (a newline after `<|im_end|>`), as in training.
    """

    prompt: Text | None
    completion: Text
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    rendered: bool = False
    complete_turn: bool = False


def render(
    tokenizer: Any, text_form: TextForm, inputs: Sequence[TextInput], *, checked: bool = False
) -> list[str | ScoreError]:
    """The text of each input, or why it has none. `checked`: texts are as `parse_row` gives them.

    Raises `ConfigError` where the tokenizer has no chat template for messages.
    """
    if not inputs:
        return []
    texts: list[str | ScoreError] = []
    dialogues: dict[int, list[Message]] = {}
    for place, entry in enumerate(inputs):
        text: str | list[Message] | ScoreError
        try:
            text = _text_or_messages(tokenizer, text_form, entry, checked)
        except ScoreError as error:
            text = error
        if isinstance(text, list):
            dialogues[place] = text
            text = ""
        texts.append(text)
    for place, rendered in _templated(tokenizer, inputs, dialogues).items():
        texts[place] = rendered if checked else _whole(rendered)
    plain = text_form == "standard"
    if plain or any(entry.rendered for entry in inputs):
        opening = _opening_token(tokenizer, plain)
        for place, (known, entry) in enumerate(zip(texts, inputs, strict=True)):
            if isinstance(known, str) and (plain or entry.rendered):
                texts[place] = _open_once(known, opening, in_text=not plain)
    if not plain and any(entry.rendered and entry.complete_turn for entry in inputs):
        ending, least = _turn_ending(tokenizer)
        for place, (known, entry) in enumerate(zip(texts, inputs, strict=True)):
            if isinstance(known, str) and entry.rendered and entry.complete_turn:
                texts[place] = _end_turn(known, ending, least)
    return texts


def _text_or_messages(
    tokenizer: Any, text_form: TextForm, entry: TextInput, checked: bool
) -> str | list[Message]:
    texts = _texts_of(entry) if checked else _parsed(entry)
    kinds = {isinstance(text, str) for text in texts}
    if len(kinds) > 1:
        raise ScoreError(
            f"the prompt is {_kind(texts[0])} and the completion {_kind(texts[1])}; both must be strings or "
            "both message lists; write the string as [{'role': ..., 'content': ...}]"
        )
    messages = kinds == {False}
    if entry.rendered and messages:
        raise ScoreError(
            "`rendered` (True) with message lists; rendered text is the chat template's output, a string; "
            "pass messages with rendered=False, or the strings"
        )
    if messages and text_form == "standard":
        raise ScoreError(
            "message lists given to a model trained on plain text (text_form 'standard'): it has seen no "
            "chat template; pass strings, or rendered=True with text you templated"
        )
    if not messages and text_form == "conversational" and not entry.rendered:
        raise ScoreError(
            f"plain strings ({texts[-1][:40]!r}) given to a model trained on messages (text_form "
            "'conversational'); pass message lists [{'role': 'user', 'content': ...}], or rendered=True with "
            "text that went through the chat template already"
        )
    if not messages:
        if not checked:
            _check_no_template(entry)
        return _plain_text(tokenizer, text_form, entry)
    if not tokenizer.chat_template and "chat_template" not in entry.chat_template_kwargs:
        raise ConfigError(
            f"the tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has no chat template, "
            "which message lists need; set `chat_template_path` to a .jinja file, or to a tokenizer with one"
        )
    dialogues = [text for text in texts if not isinstance(text, str)]
    if not checked:
        try:
            explicit = any(dialogues[:-1])
            check_roles("completion", dialogues[-1], explicit_prompt=explicit, may_await=True)
        except RowError as error:
            raise ScoreError(str(error)) from None
    return [message for dialogue in dialogues for message in dialogue]


def _texts_of(entry: TextInput) -> list[Text]:
    return [entry.completion] if entry.prompt is None else [entry.prompt, entry.completion]


def _parsed(entry: TextInput) -> list[Text]:
    """The prompt, if there is one, and the completion, whatever callers gave as such."""
    try:
        before = [] if entry.prompt is None else [parse_text("prompt", entry.prompt)]
        return [*before, parse_text("completion", entry.completion)]
    except RowError as error:
        raise ScoreError(str(error)) from None


def _check_no_template(entry: TextInput) -> None:
    for name in ("tools", "chat_template_kwargs"):
        if getattr(entry, name):
            raise ScoreError(
                f"`{name}` beside a string: only the chat template reads it, and no string goes through it; "
                f"remove `{name}`, or pass messages to a model that was trained on messages"
            )


def _whole(text: str | ScoreError) -> str | ScoreError:
    """Whatever of a message the template wrote: names and tool calls are not looked at before."""
    if isinstance(text, ScoreError):
        return text
    try:
        return check_text("the rendered text", text)
    except RowError as error:
        return ScoreError(str(error))


def _plain_text(tokenizer: Any, text_form: TextForm, entry: TextInput) -> str:
    prompt, completion = entry.prompt or "", entry.completion
    assert isinstance(prompt, str)
    assert isinstance(completion, str)
    eos = tokenizer.eos_token
    if text_form == "standard" and eos and not completion.endswith(eos):
        completion += eos
    return prompt + completion


def _templated(
    tokenizer: Any, inputs: Sequence[TextInput], dialogues: Mapping[int, list[Message]]
) -> dict[int, str | ScoreError]:
    """The dialogues, by their input's place, through the chat template."""
    texts: dict[int, str | ScoreError] = {}
    # An empty one among others would not be refused.
    alike = [
        place
        for place, dialogue in dialogues.items()
        if dialogue and inputs[place].tools is None and not inputs[place].chat_template_kwargs
    ]
    try:
        rendered = tokenizer.apply_chat_template([dialogues[place] for place in alike], tokenize=False)
        texts.update(zip(alike, rendered, strict=True))
    except _TEMPLATE_FAILURES:
        texts.clear()  # one by one then, so that each gets its own reason
    for place in dialogues.keys() - texts.keys():
        texts[place] = _templated_alone(tokenizer, inputs[place], dialogues[place])
    for place, dialogue in dialogues.items():
        for message in dialogue:
            if isinstance(message["content"], list) and _shows(message["content"], texts[place]):
                texts[place] = ScoreError(
                    "the chat template prints content as it is, and here it is a list of parts "
                    "[{'type': 'text', ...}]; pass the text as one string, or a template that takes parts"
                )
    return texts


def _shows(parts: list[Any], text: str | ScoreError) -> bool:
    """Whether parts stand in the text as Python prints them."""
    return bool(parts) and isinstance(text, str) and str(parts) in text


def _templated_alone(tokenizer: Any, entry: TextInput, dialogue: list[Message]) -> str | ScoreError:
    try:
        options = {"tools": entry.tools, **entry.chat_template_kwargs}
        rendered: str = tokenizer.apply_chat_template(dialogue, tokenize=False, **options)
    except _TEMPLATE_FAILURES as error:
        roles = ", ".join(str(message["role"]) for message in dialogue)
        said = str(error).encode("utf-8", "backslashreplace").decode("utf-8")  # it may quote half characters
        refusal = ScoreError(
            f"the chat template refuses these messages (roles: {roles}): {said}; change the messages, or "
            "the template with `chat_template_path`"
        )
        refusal.__cause__ = error
        return refusal
    return rendered


def _opening_token(tokenizer: Any, plain: bool) -> str | None:
    """The special token that every training text of this form begins with, or None.

    Plain text: the one the tokenizer puts in front. Conversational: BOS, if the chat template writes it.
    """
    if plain:
        framed = tokenizer("a", add_special_tokens=True)["input_ids"]
        opens = len(framed) > 1 and framed[0] in tokenizer.all_special_ids
        return str(tokenizer.convert_ids_to_tokens(framed[0])) if opens else None
    bos, template = tokenizer.bos_token, tokenizer.chat_template
    if not bos or not template:
        return None
    try:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except _TEMPLATE_FAILURES:
        return None
    return bos if shown.startswith(bos) else None


def _open_once(text: str, opening: str | None, *, in_text: bool) -> str:
    """`text` without the opening token the tokenizer will add, or with exactly one where nobody adds it."""
    if not opening:
        return text
    bare = text
    while bare.startswith(opening):
        bare = bare[len(opening) :]
    return opening + bare if in_text else bare


def _turn_ending(tokenizer: Any) -> tuple[str, int]:
    """What the chat template writes after an assistant's content, and up to where its end-of-turn token goes.

    ("", 0) where there is no template, or it writes no token of the tokenizer's added ones there.
    """
    if not tokenizer.chat_template:
        return "", 0
    said = "rayrm-content"
    dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    try:
        _, found, ending = str(tokenizer.apply_chat_template(dialogue, tokenize=False)).rpartition(said)
    except _TEMPLATE_FAILURES:
        return "", 0
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} - {""}
    ends = [(ending.index(token), -len(token)) for token in added if token in ending]
    if not found or not ends:
        return "", 0
    first, length = min(ends)  # of those that begin at one place the longest, as the tokenizer takes it
    return ending, first - length


def _end_turn(text: str, ending: str, least: int) -> str:
    """`text` with the rest of `ending`, if it ends with `least` characters of that or more."""
    if not ending:
        return text
    for known in range(len(ending), least - 1, -1):
        if text.endswith(ending[:known]):
            return text + ending[known:]
    return text


def _kind(text: Text) -> str:
    return "a string" if isinstance(text, str) else "a message list"
