"""Each wire shape <-> a score request: the service's own `/v1/score`, and which shapes each path takes.

The other shapes are in `protocols_rl.py` (reward calls of RL frameworks) and `protocols_inference.py`
(inference servers). All of them come to one `ScoreRequest`, so a text has one score whatever asks for it.
Callers of the other shapes send rendered text: the chat template's output, or the text of a model that has
none. Only `/v1/score` says more: messages, pins, partial answers, timing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, WithJsonSchema

from rayrm.errors import ScoreError
from rayrm.serve.protocols_inference import (
    SGLANG_CLASSIFY,
    SGLANG_EMBEDDINGS,
    TEI_PREDICT,
    VLLM_CLASSIFY,
    VLLM_POOLING,
    VLLM_SCORE,
)
from rayrm.serve.protocols_rl import LLAMA_FACTORY, OPENRLHF, SLIME
from rayrm.serve.request import Refused, Scorable, ScoreRequest, ScoreResult, Truncation, text_scorables
from rayrm.serve.wire import (
    EXACT,
    WireShape,
    check_template_names,
    finite_or_null,
    read_ids,
)

_MESSAGES = {"type": "array", "items": {"type": "object"}}
TextList = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "string"}, _MESSAGES]}})
]
IdLists = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}})
]


class OwnBody(BaseModel):
    """`/v1/score`: `completions` with their `prompts`, whole texts as `completions` alone, or `ids`."""

    model_config = EXACT

    prompts: TextList = None
    """For each score a string, or a message list. None: each completion is a whole text or dialogue."""
    completions: TextList = None
    """As many as prompts, in the same form."""
    ids: IdLists = None
    """Instead of texts: for each score its token ids, as the model's own tokenizer gives them."""
    tools: list[Any] | None = None
    """Tools that the chat template shows to all of the request's texts."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""
    rendered: bool = False
    """The strings went through the chat template already."""
    model: str | None = None
    """Which of the service's models or ensembles; None: its only one."""
    truncation: Truncation | None = None
    """Which end to cut of a text beyond the model's positions; None: refuse it."""
    version: str | None = None
    """The only version that may answer; None: the current one."""
    partial: bool = False
    """A text that cannot be scored gets null and a line in `errors`, instead of failing the request."""
    details: bool = False
    """Add `num_tokens` of each text, `timing` in seconds, and the version's `calibration` by data set."""


def _own_request(body: OwnBody) -> ScoreRequest:
    return ScoreRequest(_own_inputs(body), body.model, body.truncation, body.version, partial=body.partial)


def _own_inputs(body: OwnBody) -> Sequence[Scorable]:
    if (body.ids is None) == (body.completions is None):
        raise ScoreError(
            "/v1/score needs `completions` (with their `prompts`, or whole texts alone) or `ids`, and not "
            "both. Send one of them."
        )
    if body.ids is not None:
        for name in ("prompts", "tools", "chat_template_kwargs", "rendered"):
            if getattr(body, name):
                raise ScoreError(f"`{name}` beside `ids`: ids are scored as they are. Remove one of the two.")
        return read_ids("ids", body.ids)
    check_template_names(body.chat_template_kwargs)
    extra: dict[str, Any] = {"tools": body.tools, "chat_template_kwargs": body.chat_template_kwargs}
    # Without prompts each completion is the whole text; what is no list is refused below.
    count = len(body.completions) if isinstance(body.completions, list) else 0
    prompts: Any = [None] * count if body.prompts is None else body.prompts
    inputs = text_scorables(prompts, body.completions, **extra, rendered=body.rendered)
    for place, prompt in enumerate(body.prompts or ()):
        if prompt is None:
            inputs[place] = Refused(
                f"`prompts[{place}]` is null and must be a string or a message list. Leave `prompts` out "
                "where completions are whole texts."
            )
    return inputs


def _own_answer(body: OwnBody, result: ScoreResult) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "scores": finite_or_null(result.scores),
        "version": result.version,
        "model": result.model,
        "truncated": result.truncated,
    }
    if result.spread is not None:
        answer["spread"] = finite_or_null(result.spread)
    if body.partial:
        answer["errors"] = [
            {"index": place, "message": message} for place, message in sorted(result.errors.items())
        ]
    if body.details:
        answer |= {"num_tokens": result.num_tokens, "timing": dataclasses.asdict(result.timing)}
        answer["calibration"] = {
            name: {"mean": mean, "std": std} for name, (mean, std) in result.calibration.items()
        }
    return answer


_DIALOGUE: Mapping[str, Any] = {
    "prompts": [[{"role": "user", "content": "What is 2 + 2?"}]] * 2,
    "completions": [
        [{"role": "assistant", "content": "4"}],
        [{"role": "assistant", "content": "I do not know."}],
    ],
    "details": True,
}

OWN = WireShape(
    title="/v1/score",
    description="Scores of (prompt, completion), one for each in order, and the version that gave them all. "
    "Strings for models trained on plain text, message lists for those trained on messages, `rendered` text "
    "or `ids` for both.",
    told_by=("completions", "ids"),
    body=OwnBody,
    to_request=_own_request,
    to_answer=_own_answer,
    each_alone=("prompts", "completions", "ids"),
    examples={
        "rendered text": {
            "prompts": ["What is 2 + 2? ", "What is 2 + 2? "],
            "completions": ["4", "I do not know."],
            "rendered": True,
        },
        "messages": dict(_DIALOGUE),
        "partial": {
            "completions": ["What is 2 + 2? 4"], "rendered": True, "truncation": "left", "partial": True,
        },
    },
)  # fmt: skip

ROUTES: Mapping[str, Sequence[WireShape]] = {
    "/v1/score": (OWN,),
    "/get_reward": (OPENRLHF,),
    "/classify": (VLLM_CLASSIFY, SGLANG_CLASSIFY),
    "/score": (VLLM_SCORE,),
    "/pooling": (VLLM_POOLING,),
    "/v1/embeddings": (SGLANG_EMBEDDINGS,),
    "/predict": (TEI_PREDICT,),
    "/v1/score/evaluation": (LLAMA_FACTORY,),
    "/reward": (SLIME,),
    "/": (SLIME,),
}
"""The path of each POST route and the shapes it takes, told apart by their fields."""
