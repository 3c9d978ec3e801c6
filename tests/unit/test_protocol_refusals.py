"""What the shapes on the wire can say and a reward model cannot do is refused, and what a URL says holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from rayrm.errors import ScoreError
from rayrm.serve.http import build_app
from rayrm.serve.request import ScoreRequest, ScoreResult
from tests.unit.test_http import client
from tests.unit.test_protocols import VERSION, Body, ready

USER = [{"role": "user", "content": "a"}]
JUDGED = [{"role": "assistant", "content": "b"}]
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/classify", {"input": ["a"], "use_activation": True}, ["`use_activation` (true)", "squashed"]),
        ("/pooling", {"input": ["a"], "softmax": True}, ["`softmax` (true)", "never squashed"]),
        ("/score", {"text_1": "a", "text_2": "b", "use_activation": True}, ["never squashed"]),
        ("/predict", {"inputs": "a"}, ["`raw_scores` (false", "true"]),
        ("/predict", {"inputs": "a", "raw_scores": False}, ["`raw_scores` (false", "true"]),
        ("/predict", {"inputs": ["a", "b", "c"], "raw_scores": True}, ["[[text], [text], ...]"]),
        ("/predict", {"inputs": [["a"], "b", ["c", "d", "e"]], "raw_scores": True}, ["`inputs[2]`"]),
        ("/predict", {"inputs": [], "raw_scores": True}, ["`inputs[0]` ([])"]),
        ("/predict", {"inputs": {"a": 1}, "raw_scores": True}, ["must be one string"]),
        ("/classify", {"input": ["a"], "text": ["a"]}, ["several protocols", "`input_ids` (SGLang)"]),
        ("/classify", {"inputs": ["a"]}, ["no text", "`input` or `messages` (vLLM)"]),
        ("/classify", {"input": ["a", 1]}, ["`input[1]` (1)", "string"]),
        ("/classify", {"input": [[1], "a"]}, ["`input[1]` ('a')", "token ids"]),
        ("/classify", {"input": [1.5]}, ["token ids"]),
        ("/classify", {"input": []}, ["`input` ([])", "at least one"]),
        ("/classify", {"input": "a", "messages": []}, ["exactly one"]),
        ("/classify", {"messages": [1]}, ["`messages` ([1])", "'role'"]),
        ("/classify", {"messages": [], "chat_template": "x"}, ["`chat_template`", "as the model was"]),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 128}, ["(128)", "Send -1"]),
        ("/classify", {"input": "a", "truncation_side": "middle"}, ["`truncation_side` ('middle')"]),
        ("/classify", {"text": [["a", "b"]]}, ["`text[0]`"]),
        ("/classify", {"input_ids": ["a"]}, ["`input_ids`", "`text` takes strings"]),
        ("/classify", {"input_ids": "a"}, ["`input_ids`"]),
        ("/classify", {"input_ids": [[1], []]}, ["`input_ids[1]`", "at least one"]),
        ("/classify", {"input_ids": [[2**40]]}, ["`input_ids[0]`", "token ids"]),
        ("/pooling", {"input": "a", "encoding_format": "base64"}, ["`encoding_format` ('base64')"]),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, ["`dimensions` (8)", "one number"]),
        ("/v1/embeddings", {}, ["`input` is missing"]),
        ("/score", {"text_1": "a"}, ["`text_1` and `text_2`"]),
        ("/score", {"text_1": "a", "text_2": []}, ["`text_2` ([])"]),
        ("/score", {"text_1": "a", "documents": "b"}, ["Send one such pair"]),
        ("/score", {"text_1": [1], "text_2": "b"}, ["`text_1[0]` (1)"]),
        ("/score", {"text_1": "a", "text_2": "b", "max_tokens_per_doc": 4}, ["`max_tokens_per_doc`"]),
        ("/get_reward", {"queries": ["a"]}, ["`query` is missing", "OpenRLHF"]),
        ("/get_reward", {"query": "a"}, ["`query` ('a')", "list of strings"]),
        ("/get_reward", {"query": ["a", None]}, ["`query[1]` (None)"]),
        ("/reward", {"prompt": "a", "response": None}, ["`response` (None)"]),
        ("/reward", {"prompt": 3, "response": "a"}, ["`prompt` (3)"]),
        ("/v1/score/evaluation", {"messages": ["a"], "max_length": 5}, ["`max_length` (5)", "?truncation="]),
        ("/v1/score/evaluation", {"messages": [{"role": "user"}]}, ["`messages[0]`", "/v1/score"]),
        ("/v1/score", {"promts": ["a"], "completions": ["b"]}, ["`promts`", "Did you mean `prompts`?"]),
        ("/v1/score", {"prompts": ["a"]}, ["`completions`", "`ids`"]),
        ("/v1/score", {"completions": ["a"], "ids": [[1]]}, ["not both"]),
        ("/v1/score", {"ids": [[1]], "tools": [{}]}, ["`tools` beside `ids`"]),
        ("/v1/score", {"prompts": ["a", "b"], "completions": ["c"]}, ["2 entries", "Repeat the prompt"]),
        ("/v1/score", {"completions": "a"}, ["`completions` (str)", "completions=[...]"]),
        ("/v1/score", {"completions": [{"role": "user", "content": "a"}]}, ["is one message list"]),
        ("/v1/score", {"completions": [["a"]]}, ["`completions[0][0]` ('a') is str", "'role'"]),
        ("/v1/score", {"completions": ["a", None]}, ["`completions[1]` (None) is NoneType", "a string or"]),
        ("/v1/score", {"prompts": ["a", 5], "completions": ["b", "c"]}, ["`prompts[1]` (5) is int"]),
        ("/v1/score", {"prompts": ["a", None], "completions": ["b", "c"]}, ["`prompts[1]` is null"]),
        ("/v1/score", {"completions": ["a", {}]}, ["`completions[1]` ({}) is dict"]),
        ("/v1/score", {"completions": ["a", "\ud800"]}, ["`completions[1]` holds '\\ud800'", "UTF-8"]),
        ("/v1/score", {"completions": [[]]}, ["`completions[0]` ([]) has no message"]),
        ("/v1/score", {"completions": [USER]}, ["`completions[0]` ends with a message of role 'user'"]),
        (
            "/v1/score",
            {"prompts": [USER], "completions": [USER + JUDGED]},
            ["`completions[0]` starts with a message of role 'user'"],
        ),
        ("/v1/score", {"ids": [[1], []]}, ["`ids[1]`", "at least one"]),
        ("/v1/score", {"ids": [[1], [-1]]}, ["`ids[1]`", "none negative"]),
        ("/v1/score", {"ids": [[1], [True]]}, ["`ids[1]` ([True])", "whole numbers"]),
        ("/v1/score", {"completions": ["a"], "tools": [1]}, ["`tools` ([1])", "list of tool schemas"]),
        (
            "/v1/score",
            {"completions": ["a"], "rendered": True, "tools": [{"name": "add"}]},
            ["`tools` beside `rendered`"],
        ),
        (
            "/v1/score",
            {"completions": ["a"], "rendered": True, "chat_template_kwargs": {"deep": True}},
            ["`chat_template_kwargs` beside `rendered`"],
        ),
        ("/classify", {"input": "a", "tools": [{"name": "add"}]}, ["`tools` beside `input`"]),
        ("/classify", {"messages": USER}, ["`messages` ends with a message of role 'user'"]),
        ("/classify", {"messages": [{"role": "robot"}]}, ["`messages[0].role` ('robot')"]),
        ("/reward", {"prompt": [{"role": "robot"}], "response": "a"}, ["`prompt[0].role` ('robot')"]),
        ("/get_reward", {"query": ["a", "b", "\udfff"]}, ["`query[2]` holds half"]),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 128}, ["(128)", "Send -1"]),
        ("/v1/score", {"completions": ["a"], "truncation": "middle"}, ["`truncation` ('middle')"]),
        ("/v1/score", {"completions": ["a"], "partial": 1}, ["`partial` (1)"]),
        ("/v1/score", {"completions": ["a"], "tools": {}}, ["`tools` ({})"]),
        (
            "/v1/score",
            {"completions": ["a"], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            ["`chat_template_kwargs.chat_template`", "as the model was trained"],
        ),
    ],
)  # fmt: skip
def test_what_a_shape_says_and_a_reward_model_cannot_do_is_refused(
    path: str, body: Body, names: list[str]
) -> None:
    asked: list[ScoreRequest] = []

    async def score(wanted: ScoreRequest) -> ScoreResult:
        asked.append(wanted)
        return ScoreResult([0.0] * len(wanted.inputs), VERSION)

    content = json.dumps(body)  # with escapes, in which half a character can be written
    answer = TestClient(build_app(score, ready)).post(path, content=content, headers=JSON)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request"
    for name in names:
        assert name in error["message"]
    assert asked == []


def test_what_the_url_says_holds_where_the_body_says_nothing() -> None:
    asked: list[ScoreRequest] = []

    async def score(wanted: ScoreRequest) -> ScoreResult:
        asked.append(wanted)
        return ScoreResult([0.0] * len(wanted.inputs), VERSION)

    http = TestClient(build_app(score, ready))
    http.post("/get_reward?model=m&truncation=left&version=v", json={"query": ["a"]})
    assert (asked[-1].model, asked[-1].truncation, asked[-1].version) == ("m", "left", "v")
    cuts = {"inputs": "a", "raw_scores": True, "truncate": True}
    for path, body, says in (
        ("/classify?truncation=right", {"input": "a", "truncate_prompt_tokens": -1}, "the truncation 'left'"),
        ("/predict?truncation=left", cuts, "the truncation 'right' and the URL (`?truncation=`) for 'left'"),
        ("/v1/score?model=m", {"completions": ["a"], "model": "n"}, "the model 'n' and the URL"),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == 422
        assert says in answer.json()["error"]["message"]
    assert len(asked) == 1
    for query, name in (("truncatoin=left", "Did you mean `truncation`?"), ("truncation=up", "'up'"),
                        ("model=a&model=b", "twice")):  # fmt: skip
        answer = http.post(f"/reward?{query}", json={"prompt": "a", "response": "b"})
        assert answer.status_code == 422
        assert name in answer.json()["error"]["message"]
    assert len(asked) == 1


def test_each_shapes_own_words_for_cutting_are_understood() -> None:
    asked: list[ScoreRequest] = []

    async def score(wanted: ScoreRequest) -> ScoreResult:
        asked.append(wanted)
        return ScoreResult([0.0] * len(wanted.inputs), VERSION)

    http = TestClient(build_app(score, ready))
    cases: list[tuple[str, Body, str | None]] = [
        ("/classify", {"input": "a"}, None),
        ("/classify", {"input": "a", "truncate_prompt_tokens": -1}, "left"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": -1, "truncation_side": "right"}, "right"),
        ("/predict", {"inputs": "a", "raw_scores": True}, None),
        ("/predict", {"inputs": "a", "raw_scores": True, "truncate": True}, "right"),
        (
            "/predict",
            {"inputs": "a", "raw_scores": True, "truncate": True, "truncation_direction": "Left"},
            "left",
        ),
        ("/v1/score", {"completions": ["a"], "truncation": "left"}, "left"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": -1}, "left"),
    ]
    for path, body, wanted in cases:
        assert http.post(path, json=body).status_code == 200
        assert asked[-1].truncation == wanted


def test_a_model_that_a_framework_names_by_itself_may_stand_for_the_only_one_unless_the_url_names_one() -> (
    None
):
    asked: list[ScoreRequest] = []

    async def score(wanted: ScoreRequest) -> ScoreResult:
        asked.append(wanted)
        return ScoreResult([0.0] * len(wanted.inputs), VERSION)

    http = TestClient(build_app(score, ready))
    path = "/shared/models/reward"
    cases: list[tuple[str, Body]] = [
        ("/classify", {"input": "a"}),
        ("/classify", {"text": "a"}),
        ("/classify", {"input_ids": [1]}),
        ("/pooling", {"input": "a"}),
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/score/evaluation", {"messages": ["a"]}),
    ]
    for route, body in cases:
        assert http.post(route, json={**body, "model": path}).status_code == 200
        assert (asked[-1].model, asked[-1].any_model) == (path, True)
        assert http.post(f"{route}?model=helpful", json={**body, "model": path}).status_code == 200
        assert (asked[-1].model, asked[-1].any_model) == ("helpful", False)
    http.post("/v1/score", json={"completions": ["a"], "model": path})
    assert (asked[-1].model, asked[-1].any_model) == (path, False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/get_reward", {"query": ["a"], "model": "reward"}),
        ("/get_reward", {"query": ["a"], "version": "v1"}),
        ("/reward", {"prompt": "a", "response": "b", "truncation": "left"}),
        ("/predict", {"inputs": "a", "raw_scores": True, "version": "v1"}),
        ("/classify", {"input": "a", "version": "v1"}),
        ("/classify", {"text": "a", "use_activation": True}),
        ("/classify", {"text": "a", "image_data": "..."}),
        ("/score", {"text_1": "a", "text_2": "b", "softmax": True}),
        ("/score", {"text_1": "a", "text_2": "b", "instruction": "be kind"}),
        ("/pooling", {"input": "a", "normalize": True}),
        ("/v1/embeddings", {"input": "a", "use_activation": True}),
        (
            "/reward",
            {"prompt": [{"role": "user", "content": "a"}], "response": "b", "tools": [{"name": "t"}]},
        ),
    ],
)
def test_no_route_ignores_a_word_that_decides_a_score(path: str, body: dict[str, Any]) -> None:
    """Other words of other servers' clients are tolerated, and so are these where they ask for nothing."""
    name = list(body)[-1]
    answer = client().post(path, json=body)
    assert answer.status_code == 422
    assert f"`{name}`" in answer.json()["error"]["message"]
    asks_nothing = False if body[name] is True else None
    assert client().post(path, json={**body, name: asks_nothing, "user": "somebody"}).status_code == 200


@pytest.mark.parametrize("ids", [5, True, 1.5, {"a": 1}, "a"])
def test_ids_that_are_no_list_are_the_callers_fault(ids: Any) -> None:
    answer = client().post("/classify", json={"input_ids": ids})
    assert answer.status_code == 422
    assert "`input_ids`" in answer.json()["error"]["message"]


def test_what_a_model_refuses_is_told_by_the_callers_name_and_means() -> None:
    async def refuse(wanted: ScoreRequest) -> ScoreResult:
        raise ScoreError('input 1 has 9 tokens. Shorten it, or pass truncation="left".')

    for path, body, said in (
        (
            "/get_reward",
            {"query": ["a", "b"]},
            "`query[1]` has 9 tokens. Shorten it, or add ?truncation=left",
        ),
        ("/score", {"text_1": "a", "text_2": ["b", "c"]}, "`text_2[1]` has 9 tokens"),
        ("/v1/score", {"ids": [[1], [2]]}, '`ids[1]` has 9 tokens. Shorten it, or send `truncation`: "left"'),
    ):
        answer = client(score=refuse).post(path, json=body)
        assert answer.status_code == 422
        assert said in answer.json()["error"]["message"]
