"""The reward calls of RL frameworks as wire shapes: OpenRLHF, slime, LLaMA-Factory.

None of these clients can set a header, a truncation or a version: they have a URL. So each route also takes
`?model=`, `?truncation=` and `?version=` (see `http.py`). Sources: OpenRLHF `utils/remote_rm_utils.py` and
`cli/serve_rm.py`, slime `rollout/rm_hub`, LLaMA-Factory `api/protocol.py` and `train/ppo/ppo_utils.py`.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from pydantic import BaseModel, WithJsonSchema

from rayrm.data.tokenize import TextInput
from rayrm.errors import ScoreError
from rayrm.serve.request import ScoreRequest, ScoreResult, text_scorable
from rayrm.serve.wire import TOLERANT, Strings, WireShape, read_messages, whole_texts

StringOrMessages = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class OpenRLHFBody(BaseModel):
    """`query`: whole texts, prompt and response as the policy saw and wrote them.

    The client sends `prompts` and `labels` too; a learned reward reads neither.
    """

    model_config = TOLERANT

    query: Strings


def _openrlhf_request(body: OpenRLHFBody) -> ScoreRequest:
    return ScoreRequest(whole_texts("query", body.query, complete_turn=True))


def _openrlhf_answer(body: OpenRLHFBody, result: ScoreResult) -> dict[str, Any]:
    # `scores` is what the client filters prompts by, `rewards` what it trains on.
    return {"rewards": result.scores, "scores": result.scores, "extra_logs": {}}


class SlimeBody(BaseModel):
    """One sample. The client sends `label` too; a learned reward does not read it."""

    model_config = TOLERANT

    prompt: StringOrMessages
    """As slime holds it: a string, which is rendered where slime applied the template, or messages."""
    response: str


def _slime_request(body: SlimeBody) -> ScoreRequest:
    """A prompt of messages is scored as a dialogue; a string goes before the response as it is."""
    if isinstance(body.prompt, str):
        return ScoreRequest([TextInput(body.prompt, body.response, rendered=True, complete_turn=True)])
    prompt = read_messages("prompt", body.prompt)
    dialogue = TextInput(prompt, [{"role": "assistant", "content": body.response}])
    return ScoreRequest([text_scorable("prompt", "response", dialogue)])


def _slime_answer(body: SlimeBody, result: ScoreResult) -> float:
    (score,) = result.scores
    return score


class LlamaFactoryBody(BaseModel):
    """`messages`: whole texts, despite the name."""

    model_config = TOLERANT

    messages: Strings
    model: str | None = None
    """The client always sends the word `model`; an unknown name stands for the service's only one."""
    max_length: int | None = None


def _llama_factory_request(body: LlamaFactoryBody) -> ScoreRequest:
    if body.max_length is not None:
        raise ScoreError(
            f"`max_length` ({body.max_length}): texts are scored up to the model's own position limit. "
            "Leave it out; to cut texts beyond that limit add ?truncation=left (or right) to the URL."
        )
    return ScoreRequest(
        whole_texts("messages", body.messages, complete_turn=True), body.model, any_model=True
    )


def _llama_factory_answer(body: LlamaFactoryBody, result: ScoreResult) -> dict[str, Any]:
    return {
        "id": f"scoreeval-{uuid.uuid4().hex}",
        "object": "score.evaluation",
        "model": result.model,
        "scores": result.scores,
    }


OPENRLHF = WireShape(
    title="OpenRLHF",
    description="OpenRLHF's remote reward model: `--reward.remote_url http://host:8000/get_reward`.",
    told_by=("query",),
    body=OpenRLHFBody,
    to_request=_openrlhf_request,
    to_answer=_openrlhf_answer,
    examples={
        "rollouts": {
            "query": ["What is 2 + 2? 4", "What is 2 + 2? I do not know."],
            "prompts": ["What is 2 + 2? ", "What is 2 + 2? "],
            "labels": ["4", "4"],
        }
    },
)

SLIME = WireShape(
    title="slime",
    description="slime's remote reward model (`--rm-type remote_rm --rm-url http://host:8000/reward`): one "
    "sample, and the body of the answer is the reward. A string prompt is taken as rendered, as slime's "
    "`--apply-chat-template` leaves it; what the template writes after a response's end-of-turn token "
    "is added, and a response that was cut off stays so.",
    told_by=("response",),
    body=SlimeBody,
    to_request=_slime_request,
    to_answer=_slime_answer,
    examples={
        "sample": {"prompt": "What is 2 + 2? ", "response": "4", "label": "4"},
        "messages": {
            "prompt": [{"role": "user", "content": "What is 2 + 2?"}], "response": "4", "label": "4",
        },
    },
)  # fmt: skip

LLAMA_FACTORY = WireShape(
    title="LLaMA-Factory",
    description="LLaMA-Factory's reward server (`reward_model_type: api`, `reward_model: "
    "http://host:8000/v1/score/evaluation`): whole texts as its PPO decodes them, rendered; what the "
    "template writes after an end-of-turn token is added.",
    told_by=("messages",),
    body=LlamaFactoryBody,
    to_request=_llama_factory_request,
    to_answer=_llama_factory_answer,
    examples={"texts": {"model": "model", "messages": ["What is 2 + 2? 4"]}},
)
