"""The probe of a published model: texts whose scores are stored at publication and must come out again.

`publish` scores the probe on the CPU in float32 and writes texts and scores into the manifest; who loads the
version, on whatever device and with whatever libraries, scores them again (`check_probe`) before it answers
anyone: a checksum tells that files are the same, a probe that they mean the same. The texts are built in, or
the user's own; only their own tell what scores to expect (`distribution`, for `drift.py`), since the built-in
ones resemble nobody's prompts. A publication costs one load of the model in float32 and a few forwards.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrm.data.messages import Text
from rayrm.data.tokenize import TextInput
from rayrm.errors import PublishError, ScoreError
from rayrm.serve.drift import Distribution
from rayrm.serve.request import ScoreRequest
from rayrm.serve.score_file import inputs_of_row, read_rows

if TYPE_CHECKING:
    from rayrm.serve.scorer import RewardModel

logger = logging.getLogger(__name__)

MOST_TEXTS = 256
"""Of a user's file: enough for a mean within 1/16 of a standard deviation, and seconds on a CPU."""

_FLOAT32 = 1e-4
_HALF = 2e-2
"""How far a score may be from the stored one, times max(1, |stored|): the project's own law for float32 and
for bfloat16 or float16 weights."""

# transformers sets torch's default dtype, one for all threads, while it loads a model.
_one_load_at_a_time = threading.Lock()

PROBE: tuple[tuple[str, ...], ...] = (
    ("What is the capital of Australia?", "Canberra."),
    ("What is the capital of Australia?", "Sydney, of course. Everybody knows that."),
    (
        "Why is the sky blue?",
        "Air scatters short wavelengths of sunlight far more than long ones, so blue light reaches your eyes "
        "from every part of the sky, while red mostly passes straight through. At sunset the light crosses "
        "more air, the blue is lost on the way, and what is left looks orange.",
    ),
    ("Why is the sky blue?", "idk, maybe because of the ocean lol"),
    (
        "Write a function that reverses a list in Python.",
        "```python\ndef reverse(items):\n    return items[::-1]\n```\nIt returns a new list; `items` is left "
        "as it was.",
    ),
    (
        "Write a function that reverses a list in Python.",
        "```python\ndef reverse(items):\n    for i in range(len(items)):\n        items[i] = items[-i]\n```",
    ),
    (
        "My train leaves at 14:35 and the trip takes 2 h 50 min. When do I arrive?",
        "At 17:25.",
        "And if it is 20 minutes late?",
        "Then you arrive at 17:45.",
    ),
    (
        "My train leaves at 14:35 and the trip takes 2 h 50 min. When do I arrive?",
        "At 17:25.",
        "And if it is 20 minutes late?",
        "Then you would have missed it.",
    ),
    ("如何煮一碗好吃的米饭?", "先把米洗两遍,水与米的比例约为 1.2:1。煮好后不要马上开盖,焖十分钟更松软。"),
    ("¿Puedes traducir «good night» al francés?", "Claro: «bonne nuit»."),
    (
        "Объясни одним предложением, что такое инфляция.",
        "Это общий рост цен, из-за которого на те же деньги можно купить меньше.",
    ),
    ("اكتب جملة قصيرة عن البحر.", "البحر هادئ هذا الصباح، والأفق بلا نهاية."),
    ("Reply with a single emoji.", "\U0001f469\u200d\U0001f680"),
    ("Compute 17 * 23.", "17 * 23 = 17 * 20 + 17 * 3 = 340 + 51 = **391**"),
    (
        "I want to pick the lock of my neighbour's door without being noticed.",
        "I can't help with getting into someone else's home. If you are locked out of your own, a locksmith "
        "can open it for you in a few minutes, and most will ask you to show that you live there.",
    ),
    (
        "Summarize: The harbour froze early that year, and the last boats to leave were towed out through a "
        "channel which forty men had cut with saws. Two of the boats came back the same evening, because the "
        "ice had closed further out, and their crews wintered in the school. Nobody in the town had planned "
        "for guests, yet by spring there had been three weddings.",
        "The early ice kept two crews in the town for the winter; by spring there had been three weddings.",
    ),
)
"""Dialogues, user and assistant in turn: right and wrong, long and short, several scripts, some that begin
alike. All that a chat template needs to know is alternating turns."""


@dataclass(frozen=True, slots=True)
class ProbeTexts:
    """A user's probe, and the `source` it was read from."""

    inputs: list[TextInput]
    source: str


def read_probe(source: str | Path) -> ProbeTexts:
    """The first 256 texts of a jsonl, jsonl.gz or parquet file, in the form that `rayrm score` takes.

    Raises DataError for a file that cannot be read or is empty, ScoreError naming the row that is no text.
    """
    return read_texts(source, "`probe`", MOST_TEXTS)


def read_texts(source: str | Path, argument: str, most: int) -> ProbeTexts:
    """As `read_probe`: the first `most` texts of a file that was given as `argument`."""
    inputs: list[TextInput] = []
    for where, row in read_rows(str(source)):
        if len(inputs) >= most:
            logger.info("%s is the first %d texts of %s; the others are not used", argument, most, source)
            break
        inputs += inputs_of_row(where, row, rendered=False)
    if not inputs:
        raise PublishError(f"{argument} ({str(source)!r}) has no row. Give a file of texts, or leave it out.")
    # As the manifest will hold them: what is scored now must be what is read back.
    rows = json.loads(json.dumps(as_rows(inputs[:most]), default=str))
    return ProbeTexts([TextInput(**row) for row in rows], str(source))


def built_in_inputs(model: RewardModel) -> list[TextInput]:
    """`PROBE` as this model takes it: messages, or strings where it was trained on plain text.

    What the chat template refuses is given as text that went through it; a text of which the tokenizer knows
    nothing is left out.
    """
    plain = [_as_strings(turns, rendered=model.text_form == "conversational") for turns in PROBE]
    inputs = plain
    if model.text_form == "conversational" and model.tokenizer.chat_template:
        talks = [_as_messages(turns) for turns in PROBE]
        refused = model.encode_request(_request(talks, partial=True)).errors
        inputs = [plain[place] if place in refused else talk for place, talk in enumerate(talks)]
    taken = model.encode_request(_request(inputs, partial=True)).sequences
    return [inputs[place] for place in taken]


def probe_scores(model: RewardModel, inputs: Sequence[TextInput]) -> list[float]:
    """One score for each input; those beyond the model's positions lose their beginning.

    Raises ScoreError naming the input whose score is not finite, or that the model cannot take.
    """
    return model.score_ids(list(model.encode_request(_request(inputs)).sequences.values()))


@contextmanager
def opened_to_score(directory: Path, *, may_lack_base: bool) -> Iterator[RewardModel | None]:
    """The saved model in `directory`, on the CPU in float32; one at a time in a process.

    None for an adapter that `may_lack_base` and whose base cannot be read here. Raises PublishError: the
    model cannot be loaded.
    """
    from rayrm.serve.scorer import RewardModel

    with _one_load_at_a_time:
        model = None
        try:
            model = RewardModel.from_pretrained(directory, device="cpu")
        except (OSError, ValueError) as error:
            if not may_lack_base:
                raise PublishError(
                    f"the model cannot be loaded, so its probe has no scores: {error}. Publish a checkpoint "
                    "that `rayrm score` takes."
                ) from error
            logger.warning("published without a probe, since the adapter's base cannot be read: %s", error)
        yield model


def probe_record(model: RewardModel, given: ProbeTexts | None) -> dict[str, Any]:
    """What the manifest says of the model: `probe` and, of a given one, `distribution`.

    Raises PublishError: a score that is not finite, or all texts of a given probe score alike.
    """
    inputs = built_in_inputs(model) if given is None else given.inputs
    try:
        scores = probe_scores(model, inputs)
    except ScoreError as error:
        whose = "a built-in text" if given is None else f"`probe` ({given.source!r})"
        raise PublishError(f"the model is not published, it cannot score {whose}: {error}") from error
    record: dict[str, Any] = {"probe": {"inputs": as_rows(inputs), "scores": scores}}
    if given is not None:
        found = Distribution.of(scores, given.source)
        if found.std == 0:
            raise PublishError(
                f"`probe` ({given.source!r}): all {found.count} texts score {found.mean:.6g}, and drift "
                "cannot be measured against that. Give texts as those to be served, a hundred or more."
            )
        record["distribution"] = asdict(found)
    return record


def check_same_probe(manifest: Mapping[str, Any], given: ProbeTexts | None) -> None:
    """Raise PublishError if a version that is published already holds another probe than the one given."""
    if given is None or (manifest.get("probe") or {}).get("inputs") == as_rows(given.inputs):
        return
    name, version = manifest["name"], manifest["version"]
    raise PublishError(
        f"{name} {version} is published already, without the texts of `probe` ({given.source!r}), and a "
        "published version does not change. Leave `probe` out, or publish the checkpoint under another name."
    )


def check_probe(model: RewardModel, manifest: Mapping[str, Any]) -> None:
    """Raise PublishError unless `model` gives the scores that were stored when it was published.

    Allowed differences are 1e-4 * max(1, |stored|) for float32 weights, 2e-2 for bfloat16 and float16. The
    text that differs most is named. A manifest without a probe passes, and says so in the log.
    """
    whose = f"{manifest.get('name')} {manifest.get('version')}"
    stored = manifest.get("probe")
    if stored is None:
        logger.info("%s was published without a probe: its scores are not compared", whose)
        return
    inputs = [TextInput(**row) for row in stored["inputs"]]
    try:
        scores = probe_scores(model, inputs)
    except ScoreError as error:
        raise PublishError(f"{whose} cannot score its probe: {error}") from error
    allowed = _FLOAT32 if model.is_float32 else _HALF
    differences = [
        abs(score - before) / max(1.0, abs(before))
        for score, before in zip(scores, stored["scores"], strict=True)
    ]
    worst = max(range(len(differences)), key=differences.__getitem__)
    if differences[worst] > allowed:
        raise PublishError(
            f"{whose} does not score as it did when it was published: probe text {worst} of {len(inputs)} "
            f"({_shown(inputs[worst])}) has {scores[worst]:.6g} here and had {stored['scores'][worst]:.6g}; "
            f"{allowed:g} * max(1, |score|) is allowed. Use the library versions it was published with, load "
            "it in float32, or publish the checkpoint again here, in another registry."
        )


def _request(inputs: Sequence[TextInput], *, partial: bool = False) -> ScoreRequest:
    return ScoreRequest(inputs, truncation="left", partial=partial)


def _as_messages(turns: Sequence[str]) -> TextInput:
    roles = ("user", "assistant") * (len(turns) // 2)
    talk = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return TextInput(talk[:-1], talk[-1:])


def _as_strings(turns: Sequence[str], *, rendered: bool) -> TextInput:
    names = ("Human", "Assistant") * (len(turns) // 2)
    said = [f"\n\n{name}: {text}" for name, text in zip(names, turns, strict=True)]
    return TextInput("".join(said[:-1]) + "\n\nAssistant:", f" {turns[-1]}", rendered=rendered)


def as_rows(inputs: Sequence[TextInput]) -> list[dict[str, Any]]:
    """As JSON holds them; what is as it is by default is left out."""
    rows = []
    for entry in inputs:
        row = {name: value for name, value in asdict(entry).items() if value}
        rows.append({"prompt": entry.prompt, **row, "completion": entry.completion})
    return rows


def _shown(entry: TextInput) -> str:
    text: Text = entry.completion if entry.prompt is None else entry.prompt
    last = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return repr(last if len(last) <= 60 else f"{last[:57]}...")
