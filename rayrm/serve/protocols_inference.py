"""The routes of inference servers as wire shapes: vLLM, SGLang and TEI, as callers of reward models use them.

Texts are rendered. Whatever asks for an activation is refused, since a reward is never squashed: vLLM's
`use_activation` may be left out (its answer for a model saved with problem_type "regression" is the bare
output), TEI's `raw_scores` may not, since a client that leaves it out expects a sigmoid. Fields that change
ids (`add_special_tokens`) are tolerated and change nothing: BOS is put once, by the model's own rule. An
unknown `model` stands for the service's only one: verl sends the path of its own copy, and nothing else.
Sources: vLLM `entrypoints/pooling`, SGLang `managers/io_struct.py`, TEI `router/src/http/types.rs`, verl
`experimental/reward_loop`.
"""

from __future__ import annotations

import base64
import reprlib
import struct
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, WithJsonSchema

from rayrm.data.tokenize import TextInput
from rayrm.errors import ScoreError
from rayrm.serve.request import Scorable, ScoreRequest, ScoreResult, Truncation
from rayrm.serve.wire import (
    TOLERANT,
    Messages,
    Texts,
    WireShape,
    dialogue_input,
    read_strings,
    read_texts,
    refuse_activation,
    whole_texts,
)

_LABEL = "LABEL_0"  # transformers' name for the only output of a one-label model
_TEXT = "What is 2 + 2? 4"
_VERLS_MODEL = "/shared/models/reward"

TeiInputs = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
                {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
            ]
        }
    ),
]


class VllmTextsBody(BaseModel):
    """vLLM's `/classify` and `/pooling`: texts or token ids as `input`, or one dialogue as `messages`."""

    model_config = TOLERANT

    input: Texts = None
    messages: Messages = None
    tools: list[Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    model: str | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Truncation | None = None
    encoding_format: Literal["float"] = "float"
    dimensions: int | None = None


def _vllm_texts_request(body: VllmTextsBody) -> ScoreRequest:
    for name in ("use_activation", "activation", "softmax"):
        refuse_activation(name, getattr(body, name))
    _one_number(body.dimensions)
    if (body.input is None) == (body.messages is None):
        raise ScoreError("`input` (texts, token ids) or `messages` (one dialogue): send exactly one of them.")
    inputs: list[Scorable]
    if body.messages is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(body, name):
                raise ScoreError(
                    f"`{name}` beside `input`: only the chat template reads it, and `input` went through one "
                    "already. Send `messages`, or remove it."
                )
        inputs = read_texts("input", body.input)
    else:
        for name in ("chat_template", "add_generation_prompt", "continue_final_message"):
            if getattr(body, name):
                raise ScoreError(
                    f"`{name}`: messages are rendered as the model was trained. Remove it, or render the "
                    "text yourself and send it as `input`."
                )
        inputs = [dialogue_input("messages", body.messages, body.tools, body.chat_template_kwargs)]
    cut = _vllm_cut(body.truncate_prompt_tokens, body.truncation_side)
    return ScoreRequest(inputs, body.model, cut, any_model=True)


def _vllm_classify_answer(body: VllmTextsBody, result: ScoreResult) -> dict[str, Any]:
    data = [{"label": _LABEL, "probs": [score], "num_classes": 1} for score in result.scores]
    return _vllm_list("classify", result, data)


def _vllm_pooling_answer(body: VllmTextsBody, result: ScoreResult) -> dict[str, Any]:
    return _vllm_list("pool", result, [{"object": "pooling", "data": [score]} for score in result.scores])


class VllmScoreBody(BaseModel):
    """vLLM's `/score`: prompts and completions under one of its four pairs of names; one prompt for all, or
    as many prompts as completions."""

    model_config = TOLERANT

    text_1: Texts = None
    text_2: Texts = None
    queries: Texts = None
    documents: Texts = None
    items: Texts = None
    data_1: Texts = None
    data_2: Texts = None
    model: str | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Truncation | None = None
    max_tokens_per_query: int = 0
    max_tokens_per_doc: int = 0


_SCORE_NAMES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


def _vllm_score_request(body: VllmScoreBody) -> ScoreRequest:
    for name in ("use_activation", "activation"):
        refuse_activation(name, getattr(body, name))
    for name in ("max_tokens_per_query", "max_tokens_per_doc"):
        if getattr(body, name):
            raise ScoreError(f"`{name}`: a text is scored whole. Shorten it before it is sent.")
    given = {name for pair in _SCORE_NAMES for name in pair if getattr(body, name) is not None}
    names = next((pair for pair in _SCORE_NAMES if given == set(pair)), None)
    if names is None:
        raise ScoreError(
            "/score needs a prompt and completions: `text_1` and `text_2` (or `queries` and `documents`, "
            "`queries` and `items`, `data_1` and `data_2`). Send one such pair."
        )
    prompts, completions = (_one_or_more(name, getattr(body, name)) for name in names)
    if len(prompts) not in (1, len(completions)):
        raise ScoreError(
            f"`{names[0]}` has {len(prompts)} texts and `{names[1]}` {len(completions)}: it must have one "
            "for all, or as many. Repeat each prompt for its completions."
        )
    prompts = prompts * len(completions) if len(prompts) == 1 else prompts
    return ScoreRequest(
        [TextInput(p, c, rendered=True) for p, c in zip(prompts, completions, strict=True)],
        body.model,
        _vllm_cut(body.truncate_prompt_tokens, body.truncation_side),
        any_model=True,
    )


def _vllm_score_answer(body: VllmScoreBody, result: ScoreResult) -> dict[str, Any]:
    return _vllm_list("embd", result, [{"object": "score", "score": score} for score in result.scores])


class SglangClassifyBody(BaseModel):
    """SGLang's native `/classify`: one text or several, or their token ids."""

    model_config = TOLERANT

    text: Texts = None
    input_ids: Texts = None
    model: str | None = None


def _sglang_classify_request(body: SglangClassifyBody) -> ScoreRequest:
    if (body.text is None) == (body.input_ids is None):
        raise ScoreError("`text` or `input_ids`: send exactly one of them.")
    if body.text is not None:
        texts = _one_or_more("text", body.text)
        return ScoreRequest(whole_texts("text", texts), body.model, any_model=True)
    ids = body.input_ids
    if not isinstance(ids, list) or (ids and isinstance(ids[0], str)):
        raise ScoreError(
            f"`input_ids` ({reprlib.repr(body.input_ids)}) must be token ids; `text` takes strings."
        )
    return ScoreRequest(read_texts("input_ids", body.input_ids), body.model, any_model=True)


def _sglang_classify_answer(body: SglangClassifyBody, result: ScoreResult) -> Any:
    """A list as the request was, or one object for one text."""
    answers = [
        {"embedding": [score], "meta_info": {"id": uuid.uuid4().hex, "prompt_tokens": tokens}}
        for score, tokens in zip(result.scores, _tokens(result), strict=True)
    ]
    single = isinstance(body.text, str) or (body.text is None and isinstance(body.input_ids[0], int))
    return answers[0] if single else answers


class EmbeddingsBody(BaseModel):
    """`/v1/embeddings` as verl calls SGLang with it: the embedding of a text is its score alone."""

    model_config = TOLERANT

    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Truncation | None = None


def _embeddings_request(body: EmbeddingsBody) -> ScoreRequest:
    _one_number(body.dimensions)
    cut = _vllm_cut(body.truncate_prompt_tokens, body.truncation_side)
    return ScoreRequest(read_texts("input", body.input), body.model, cut, any_model=True)


def _embeddings_answer(body: EmbeddingsBody, result: ScoreResult) -> dict[str, Any]:
    data: list[dict[str, Any]] = [
        # OpenAI's client asks for base64, of little-endian float32, unless told otherwise.
        {
            "object": "embedding",
            "embedding": [score] if body.encoding_format == "float" else _packed(score),
        }
        for score in result.scores
    ]
    return _vllm_list("embd", result, data)


class TeiPredictBody(BaseModel):
    """TEI's `/predict`. `inputs`: a string; [string]; a pair [prompt, completion]; or a batch
    [[string], [prompt, completion], ...]. Two strings in one list are a pair, as in TEI, not two texts."""

    model_config = TOLERANT

    inputs: TeiInputs
    raw_scores: bool = False
    truncate: bool = False
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"


def _tei_request(body: TeiPredictBody) -> ScoreRequest:
    if not body.raw_scores:
        raise ScoreError(
            "`raw_scores` (false, TEI's default) asks for a sigmoid; a reward is the model's own output "
            "and is never squashed. Send `raw_scores`: true."
        )
    batch = body.inputs if _is_batch(body.inputs) else [body.inputs]
    return ScoreRequest(
        [_tei_input(f"inputs[{place}]", entry) for place, entry in enumerate(batch)],
        truncation=_lower(body.truncation_direction) if body.truncate else None,
    )


def _tei_input(name: str, entry: Any) -> TextInput:
    texts = [entry] if isinstance(entry, str) else entry
    if isinstance(texts, list) and 1 <= len(texts) <= 2 and all(isinstance(text, str) for text in texts):
        *prompt, completion = texts
        return TextInput(prompt[0] if prompt else None, completion, rendered=True)
    raise ScoreError(
        f"`{name}` ({reprlib.repr(entry)}) must be one string, or two (prompt, completion). Send several "
        "texts as [[text], [text], ...]."
    )


def _tei_answer(body: TeiPredictBody, result: ScoreResult) -> Any:
    predictions = [[{"score": score, "label": _LABEL}] for score in result.scores]
    return predictions if _is_batch(body.inputs) else predictions[0]


def _is_batch(inputs: Any) -> bool:
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], list)


def _lower(direction: str) -> Truncation:
    return "left" if direction.lower() == "left" else "right"


def _one_or_more(name: str, value: Any) -> list[str]:
    texts = read_strings(name, [value] if isinstance(value, str) else value)
    if not texts:
        raise ScoreError(f"`{name}` ([]) must hold at least one text.")
    return texts


def _one_number(dimensions: int | None) -> None:
    if dimensions not in (None, 1):
        raise ScoreError(f"`dimensions` ({reprlib.repr(dimensions)}): a score is one number. Leave it out.")


def _vllm_cut(num_tokens: int | None, side: Truncation | None) -> Truncation | None:
    """-1 cuts to the model's positions: the beginning, so that the completion stays, unless told which."""
    if num_tokens is None:
        return None
    if num_tokens != -1:
        raise ScoreError(
            f"`truncate_prompt_tokens` ({reprlib.repr(num_tokens)}): texts are cut to the model's own "
            "position limit and to no other. Send -1 for that, or shorten the text."
        )
    return side or "left"


def _tokens(result: ScoreResult) -> list[int]:
    return result.num_tokens or [0] * len(result.scores)


def _packed(score: float) -> str:
    return base64.b64encode(struct.pack("<f", score)).decode("ascii")


def _vllm_list(kind: str, result: ScoreResult, data: list[dict[str, Any]]) -> dict[str, Any]:
    num_tokens = sum(result.num_tokens)
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": result.model,
        "data": [{"index": place, **entry} for place, entry in enumerate(data)],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }


VLLM_CLASSIFY = WireShape(
    title="vLLM",
    description="vLLM's /classify, as verl and others call it: the score is `data[i].probs[0]`.",
    told_by=("input", "messages"),
    body=VllmTextsBody,
    to_request=_vllm_texts_request,
    to_answer=_vllm_classify_answer,
    examples={
        "vLLM": {"input": [_TEXT], "use_activation": False},
        "verl": {"model": _VERLS_MODEL, "input": _TEXT, "use_activation": False},
        "vLLM, token ids": {"input": [[5, 6, 7]], "use_activation": False},
    },
)

SGLANG_CLASSIFY = WireShape(
    title="SGLang",
    description="SGLang's /classify: the score is `[i].embedding[0]`, or `embedding[0]` for one string.",
    told_by=("text", "input_ids"),
    body=SglangClassifyBody,
    to_request=_sglang_classify_request,
    to_answer=_sglang_classify_answer,
    examples={"SGLang": {"text": [_TEXT]}},
)

VLLM_POOLING = WireShape(
    title="vLLM's /pooling",
    description="vLLM's /pooling: the score is `data[i].data[0]`.",
    told_by=("input", "messages"),
    body=VllmTextsBody,
    to_request=_vllm_texts_request,
    to_answer=_vllm_pooling_answer,
    examples={"text": {"input": _TEXT}},
)

VLLM_SCORE = WireShape(
    title="vLLM's /score",
    description="vLLM's /score: `text_1` is the prompt and `text_2` its completion, or several.",
    told_by=("text_2", "documents", "items", "data_2"),
    body=VllmScoreBody,
    to_request=_vllm_score_request,
    to_answer=_vllm_score_answer,
    examples={"one prompt": {"text_1": "What is 2 + 2? ", "text_2": ["4", "I do not know."]}},
)

SGLANG_EMBEDDINGS = WireShape(
    title="/v1/embeddings",
    description="The embeddings route by which verl reads a reward from SGLang: `data[-1].embedding[-1]`.",
    told_by=("input",),
    body=EmbeddingsBody,
    to_request=_embeddings_request,
    to_answer=_embeddings_answer,
    examples={"text": {"input": _TEXT}, "verl": {"model": _VERLS_MODEL, "input": _TEXT}},
)

TEI_PREDICT = WireShape(
    title="TEI",
    description="text-embeddings-inference's /predict. `raw_scores` must be true. Two strings in one list "
    "are a pair (prompt, completion), as in TEI; send several texts as [[text], [text]].",
    told_by=("inputs",),
    body=TeiPredictBody,
    to_request=_tei_request,
    to_answer=_tei_answer,
    examples={
        "text": {"inputs": _TEXT, "raw_scores": True},
        "batch": {"inputs": [[_TEXT], ["What is 2 + 2? ", "4"]], "raw_scores": True},
    },
)
