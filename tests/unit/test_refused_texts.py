"""A text that cannot be scored is refused by its name, and with `partial` takes no other along.

What whole shapes cannot say is in `test_protocol_refusals.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rayrm.data.tokenize import TextInput
from rayrm.errors import ScoreError
from rayrm.serve.http import build_app
from rayrm.serve.http_limits import HttpLimits
from rayrm.serve.request import Refused, ScoreRequest, id_inputs
from rayrm.serve.scorer import RewardModel
from tests.unit.test_http import JSON
from tests.unit.test_protocols import (
    ANSWERS,
    FORMS,
    PROMPTS,
    STOCK,
    Body,
    Served,
    assistant,
    ready,
    service_of,
    user,
)
from tests.unit.test_scorer import messages


@pytest.fixture(scope="module", params=FORMS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp(request.param), request.param)


HALF = "half \ud800"
BAD_TEXTS: dict[str, Any] = {
    "null": None,
    "number": 5,
    "object": {},
    "half a character": HALF,
    "long": "c" * 3000,
}
BAD_DIALOGUES: dict[str, Any] = {
    "no message": [],
    "the user's": [{"role": "user", "content": "a"}],
    "no object": ["a"],
    "no role": [{"content": "a"}],
    "a role that is none": [{"role": "robot", "content": "a"}],
    "no content": [{"role": "assistant"}],
    "half a character": [{"role": "assistant", "content": HALF}],
    "long": [{"role": "assistant", "content": "c" * 3000}],
}


@pytest.mark.parametrize("field", ["prompts", "completions"])
def test_with_partial_no_bad_text_takes_the_others_along(served: Served, field: str) -> None:
    http = TestClient(build_app(service_of(served.model), ready, HttpLimits(max_characters=2500)))
    good: Body = {"prompts": [p for p, _ in served.parts], "completions": [c for _, c in served.parts]}
    bad, extra = BAD_TEXTS, {"rendered": True}
    if served.model.text_form == "conversational":
        good = {"prompts": [user(p) for p in PROMPTS], "completions": [assistant(a) for a in ANSWERS]}
        bad, extra = BAD_TEXTS | BAD_DIALOGUES, {}
    may_stand_before = ("no message", "the user's")
    for name, text in bad.items():
        if field == "prompts" and name in may_stand_before:
            continue
        texts = [text if place == 2 else one for place, one in enumerate(good[field])]
        body = {**good, **extra, field: texts}
        content = json.dumps(body).encode()  # escapes half a character, as httpx does not
        refused = http.post("/v1/score", content=content, headers=JSON)
        assert refused.status_code == (413 if name == "long" else 422), (name, refused.text)
        named = "completions[2]" if name == "long" else f"{field}[2]"
        assert named in refused.json()["error"]["message"], name
        content = json.dumps({**body, "partial": True}).encode()
        answer = http.post("/v1/score", content=content, headers=JSON).json()
        assert answer["scores"] == [
            None if place == 2 else pytest.approx(score, abs=STOCK)
            for place, score in enumerate(served.wanted)
        ], name
        (error,) = answer["errors"]
        assert error["index"] == 2
        assert named in error["message"], name


@pytest.mark.parametrize(
    "bad", [[], [-1], [2**40], [HALF], [1.5], [True], "a", None, 5, [399, 400], [5] * 600]
)
def test_with_partial_bad_ids_do_not_take_the_others_along(served: Served, bad: Any) -> None:
    http = TestClient(served.app)
    body = {"ids": [served.ids[0], bad, served.ids[1]]}
    assert http.post("/v1/score", content=json.dumps(body), headers=JSON).status_code == 422
    body |= {"partial": True}
    answer = http.post("/v1/score", content=json.dumps(body), headers=JSON).json()
    assert answer["scores"] == [pytest.approx(served.wanted[0], abs=STOCK), None, pytest.approx(
        served.wanted[1], abs=STOCK
    )]  # fmt: skip
    assert [error["index"] for error in answer["errors"]] == [1]


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "says"),
    [
        ([None], [None], {}, r"`completions\[0\]` \(None\) is NoneType; it must be a string or a list of"),
        ([5], [5], {}, r"`prompts\[0\]` \(5\) is int; it must be a string"),
        (["a", "a"], ["b", None], {}, r"`completions\[1\]` \(None\) is NoneType"),
        (None, ["b"], {}, r"`prompts` \(NoneType\) must be a list"),
        (["a"], [b"b"], {}, r"`completions\[0\]` .* is bytes"),
        (["a"], ["b"], {"tools": "[{nojson"}, r"`tools` \('\[\{nojson'\) is not JSON"),
        (["a"], ["b"], {"tools": 5}, r"`tools` \(5\) must be a list of tool schemas"),
        (["a"], ["b"], {"chat_template_kwargs": [1]}, r"`chat_template_kwargs` \(\[1\]\) must be an object"),
        (["a"], ["b"], {"tools": [{"name": "add"}]}, "input 0 of 1: `tools` beside a string"),
        (["a"], ["b"], {"chat_template_kwargs": {"deep": 1}}, "`chat_template_kwargs` beside a string"),
        (["a"], ["b"], {"tools": [{"name": "add"}], "rendered": True}, "`tools` beside `rendered`"),
    ],
)  # fmt: skip
def test_what_is_no_text_or_would_be_ignored_is_refused_by_its_name(
    standard: Path, prompts: Any, completions: Any, options: Any, says: str
) -> None:
    model = RewardModel.from_pretrained(standard)
    with pytest.raises(ScoreError, match=says):
        model.score(prompts, completions, **options)


@pytest.mark.parametrize("given", [None, 5, "ids", {}])
def test_sequences_that_are_no_list_are_refused_by_their_type(standard: Path, given: Any) -> None:
    for take in (RewardModel.from_pretrained(standard).score_ids, id_inputs):
        with pytest.raises(ScoreError, match=f"`sequences` is {type(given).__name__} and must be a list"):
            take(given)


def test_inputs_are_checked_as_texts_are(standard: Path, chat: Path) -> None:
    plain, talk = RewardModel.from_pretrained(standard), RewardModel.from_pretrained(chat)
    for text in (None, 5, b"a"):
        with pytest.raises(ScoreError, match=r"input 0 of 1: `completion` .* is "):
            plain.score_inputs([TextInput("a", text)])  # type: ignore[arg-type]
    ask, answer = messages("a", "b")
    with pytest.raises(ScoreError, match="input 0 of 1: `completion` ends with a message of role 'user'"):
        talk.score_inputs([TextInput(None, answer + ask)])
    half = [{"role": "assistant", "content": "b", "tool_calls": [{"name": "\ud800"}]}]
    talk.tokenizer.chat_template += "{{ messages[-1].tool_calls }}{{ messages[-1].tool_calls[0].name }}"
    with pytest.raises(ScoreError, match="input 0 of 1: `the rendered text` holds"):
        talk.score_inputs([TextInput(ask, half)])
    with pytest.raises(ScoreError, match="the chat template refuses these messages"):
        talk.score_inputs([TextInput(ask, answer, chat_template_kwargs=[1])])  # type: ignore[arg-type]


def test_a_refused_input_is_told_in_a_partial_answer_and_else_raised(standard: Path) -> None:
    model = RewardModel.from_pretrained(standard)
    inputs = [TextInput("a", " b"), Refused("`x[1]` is bad.")]
    found = model.encode_request(ScoreRequest(inputs, partial=True))
    assert (list(found.sequences), found.errors) == ([0], {1: "`x[1]` is bad."})
    with pytest.raises(ScoreError, match=r"^`x\[1\]` is bad\.$"):
        model.encode_request(ScoreRequest(inputs))


def test_a_rollout_that_ends_with_what_its_tools_answered_is_scored(chat: Path) -> None:
    """A policy may be cut off before it goes on: reinforcement learning must not end there."""
    model = RewardModel.from_pretrained(chat)
    called = [{"role": "assistant", "content": "I look it up"}, {"role": "tool", "content": "four"}]
    [score] = model.score([user("what is 2 + 2?")], [called])
    assert score != model.score([user("what is 2 + 2?")], [called[:1]])[0]
    for unjudged in ([*called, *user("and 3?")], called[1:]):
        with pytest.raises(ScoreError, match=r"completions\[0\]"):
            model.score([user("what is 2 + 2?")], [unjudged])
