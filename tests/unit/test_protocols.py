"""One score: over every HTTP shape, both text forms, a text has the score that stock transformers gives it.

The clients' side is written from their sources: what each sends, and where it reads the score.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayrm.errors import UnknownModelError, VersionError
from rayrm.serve.http import build_app
from rayrm.serve.protocols import ROUTES
from rayrm.serve.request import ScoreRequest, ScoreResult
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny

# Stock transformers scores one text at a time with another attention call: float32 rounding, and no more.
STOCK = 1e-4
VERSION = "0123abcd"
PROMPTS = [
    "the red cat sits?",
    "the red cat sits?",
    "why is the river old?",
    "what falls? ünïcode \U0001f600",
]
ANSWERS = [" yes always", " no never the bread", " two stones", " six birds \n\t and one dog"]
FORMS = ["standard", "conversational"]


def service_of(model: RewardModel) -> Callable[[ScoreRequest], Any]:
    """What the Serve application does for a request, without a queue."""

    async def score(wanted: ScoreRequest) -> ScoreResult:
        await asyncio.sleep(0)
        if wanted.model not in (None, "reward") and not wanted.any_model:
            raise UnknownModelError(f"`model` ({wanted.model}): the service has reward. Send that name.")
        if wanted.version not in (None, VERSION):
            raise VersionError("that version does not answer; the current one does.", VERSION)
        encoded = model.encode_request(wanted)
        scores = [float("nan")] * len(wanted.inputs)
        given = model.score_ids(list(encoded.sequences.values()))
        for place, score in zip(encoded.sequences, given, strict=True):
            scores[place] = score
        num_tokens = [len(encoded.sequences.get(place, ())) for place in range(len(scores))]
        return ScoreResult(scores, VERSION, "reward", num_tokens, encoded.truncated, errors=encoded.errors)

    return score


async def ready() -> dict[str, Any]:
    return {"ready": True, "models": {"reward": {"version": VERSION}}}


class Served:
    """A tiny model behind the application, and its rendered texts with the scores of stock transformers."""

    def __init__(self, directory: Path, form: str) -> None:
        save_tiny(directory, chat=form == "conversational", bos=form == "standard")
        self.model = RewardModel.from_pretrained(directory)
        self.app = build_app(service_of(self.model), ready)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if form == "conversational":
            # Cut where the answer begins: what a policy saw, and what it wrote.
            whole = [
                tokenizer.apply_chat_template(user(p) + assistant(a), tokenize=False)
                for p, a in zip(PROMPTS, ANSWERS, strict=True)
            ]
            self.parts = [
                (text[: text.index("<|assistant|>")], text[text.index("<|assistant|>") :]) for text in whole
            ]
            framed = tokenizer(whole, add_special_tokens=False)["input_ids"]
        else:
            self.parts = list(zip(PROMPTS, ANSWERS, strict=True))
            framed = tokenizer([p + a + "</s>" for p, a in self.parts])["input_ids"]
        self.texts = [prompt + completion for prompt, completion in self.parts]
        self.ids: list[list[int]] = framed
        stock = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            self.wanted = [float(stock(input_ids=torch.tensor([ids])).logits) for ids in self.ids]
        assert np.std(self.wanted) > 20 * STOCK


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module", params=FORMS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[TestClient]:
    with TestClient(served.app) as client:
        yield client


Body = dict[str, Any]
Reader = Callable[[Any], Any]


def split(parts: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [prompt for prompt, _ in parts], [completion for _, completion in parts]


def unpacked(entry: Any) -> float:
    (value,) = struct.unpack("<f", base64.b64decode(entry["embedding"]))
    return float(value)


def batch_calls(served: Served) -> dict[str, tuple[str, Body, Reader]]:
    """Each way to send all texts in one request, and how its client reads the scores."""
    prompts, completions = split(served.parts)
    texts, ids = served.texts, served.ids
    both = {"prompts": prompts, "completions": completions, "rendered": True}
    return {
        "own": ("/v1/score", both, lambda a: a["scores"]),
        "own, whole": ("/v1/score", {"completions": texts, "rendered": True}, lambda a: a["scores"]),
        "own, ids": ("/v1/score", {"ids": ids}, lambda a: a["scores"]),
        "OpenRLHF": (
            "/get_reward",
            {"query": texts, "prompts": prompts, "labels": ["4"] * 4},
            lambda a: a["rewards"],
        ),
        "OpenRLHF, scores": ("/get_reward", {"query": texts}, lambda a: a["scores"]),
        "vLLM /classify": (
            "/classify",
            {"model": "reward", "input": texts, "use_activation": False, "add_special_tokens": False},
            lambda a: [row["probs"][-1] for row in sorted(a["data"], key=lambda row: row["index"])],
        ),
        "vLLM /classify, ids": (
            "/classify",
            {"input": ids},
            lambda a: [row["probs"][0] for row in a["data"]],
        ),
        "vLLM /pooling": ("/pooling", {"input": texts}, lambda a: [row["data"][0] for row in a["data"]]),
        "vLLM /score": (
            "/score",
            {"text_1": prompts, "text_2": completions},
            lambda a: [row["score"] for row in a["data"]],
        ),
        "SGLang /classify": ("/classify", {"text": texts}, lambda a: [row["embedding"][0] for row in a]),
        "SGLang /classify, ids": (
            "/classify",
            {"input_ids": ids},
            lambda a: [row["embedding"][0] for row in a],
        ),
        "embeddings": (
            "/v1/embeddings",
            {"model": "reward", "input": texts},
            lambda a: [row["embedding"][-1] for row in a["data"]],
        ),
        "embeddings, base64": (
            "/v1/embeddings",
            {"input": texts, "encoding_format": "base64"},
            lambda a: [unpacked(row) for row in a["data"]],
        ),
        "TEI": (
            "/predict",
            {"inputs": [[text] for text in texts], "raw_scores": True},
            lambda a: [row[0]["score"] for row in a],
        ),
        "TEI, pairs": (
            "/predict",
            {"inputs": [list(part) for part in served.parts], "raw_scores": True},
            lambda a: [row[0]["score"] for row in a],
        ),
        "LLaMA-Factory": (
            "/v1/score/evaluation",
            {"model": "model", "messages": texts},
            lambda a: a["scores"],
        ),
    }


def single_calls(served: Served, place: int) -> dict[str, tuple[str, Body, Reader]]:
    """Each way to send one text, and how its client reads the score."""
    (prompt, completion), text, ids = served.parts[place], served.texts[place], served.ids[place]
    sample = {"prompt": prompt, "response": completion, "label": {"any": ["thing"]}}
    return {
        "slime": ("/reward", sample, lambda a: a),
        "slime, bare": ("/", sample, lambda a: a),
        "verl over vLLM": (
            "/classify",
            {"model": "reward", "input": text, "use_activation": False},
            lambda a: a["data"][-1]["probs"][-1],
        ),
        "verl over SGLang": (
            "/v1/embeddings",
            {"model": "reward", "input": text},
            lambda a: a["data"][-1]["embedding"][-1],
        ),
        "vLLM, ids": ("/pooling", {"input": ids}, lambda a: a["data"][0]["data"][0]),
        "vLLM, pair": (
            "/score",
            {"queries": prompt, "documents": completion},
            lambda a: a["data"][0]["score"],
        ),
        "SGLang": ("/classify", {"text": text}, lambda a: a["embedding"][0]),
        "SGLang, ids": ("/classify", {"input_ids": ids}, lambda a: a["embedding"][0]),
        "TEI": ("/predict", {"inputs": text, "raw_scores": True}, lambda a: a[0]["score"]),
        "TEI, list": ("/predict", {"inputs": [text], "raw_scores": True}, lambda a: a[0]["score"]),
        "TEI, pair": (
            "/predict",
            {"inputs": [prompt, completion], "raw_scores": True, "truncate": True},
            lambda a: a[0]["score"],
        ),
    }


def test_every_shape_of_a_batch_gives_the_scores_of_stock_transformers(
    served: Served, http: TestClient
) -> None:
    own = served.model.score([""] * 4, served.texts, rendered=True)
    assert own == pytest.approx(served.wanted, abs=STOCK)
    for name, (path, body, read) in batch_calls(served).items():
        answer = http.post(path, json=body)
        assert answer.status_code == 200, (name, answer.text)
        assert read(answer.json()) == pytest.approx(served.wanted, abs=STOCK), name
        assert answer.headers["Rayrm-Version"] == VERSION, name


def test_every_shape_of_one_text_gives_the_score_of_stock_transformers(
    served: Served, http: TestClient
) -> None:
    for place in (1, 3):
        for name, (path, body, read) in single_calls(served, place).items():
            answer = http.post(path, json=body)
            assert answer.status_code == 200, (name, answer.text)
            assert read(answer.json()) == pytest.approx(served.wanted[place], abs=STOCK), name


def test_the_two_tests_above_leave_no_shape_out(served: Served) -> None:
    calls = [*batch_calls(served).values(), *single_calls(served, 0).values()]
    for path, shapes in ROUTES.items():
        for shape in shapes:
            assert any(path == used and set(body) & set(shape.told_by) for used, body, _ in calls), path


def test_every_example_of_the_openapi_page_works(served: Served, http: TestClient) -> None:
    conversational = served.model.text_form == "conversational"
    for path, shapes in ROUTES.items():
        for shape in shapes:
            for place, (name, body) in enumerate(shape.examples.items()):
                if name == "messages" and not conversational:
                    continue
                answer = http.post(path, json=body)
                assert answer.status_code == 200, (path, name, answer.text)
                # The first example is the one /docs shows: it must not depend on the text form.
                assert place or name != "messages"


def test_messages_get_the_score_of_the_text_that_the_template_makes(tmp_path: Path) -> None:
    served = Served(tmp_path, "conversational")
    http = TestClient(served.app)
    prompts, completions = [user(p) for p in PROMPTS], [assistant(a) for a in ANSWERS]
    dialogues = [p + c for p, c in zip(prompts, completions, strict=True)]
    for body in ({"prompts": prompts, "completions": completions}, {"completions": dialogues}):
        answer = http.post("/v1/score", json=body).json()
        assert answer["scores"] == pytest.approx(served.wanted, abs=STOCK)
    for path, read in (("/classify", lambda row: row["probs"]), ("/pooling", lambda row: row["data"])):
        answer = http.post(path, json={"messages": dialogues[2], "model": "reward"}).json()
        assert read(answer["data"][0]) == pytest.approx([served.wanted[2]], abs=STOCK)
    answer = http.post("/reward", json={"prompt": prompts[1], "response": ANSWERS[1], "label": None})
    assert answer.json() == pytest.approx(served.wanted[1], abs=STOCK)
    tools = [{"type": "function", "function": {"name": "add"}}]
    with_tools = {"prompts": prompts, "completions": completions, "tools": tools}
    assert http.post("/v1/score", json=with_tools).json()["scores"] == pytest.approx(
        served.model.score(prompts, completions, tools=tools), abs=1e-6
    )


def test_one_prompt_goes_before_every_completion_as_in_vllm(served: Served, http: TestClient) -> None:
    prompt = served.parts[0][0]
    completions = [completion for _, completion in served.parts]
    wanted = served.model.score([prompt] * 4, completions, rendered=True)
    answer = http.post("/score", json={"text_1": prompt, "text_2": completions}).json()
    assert [row["score"] for row in answer["data"]] == pytest.approx(wanted, abs=1e-6)
    refused = http.post("/score", json={"text_1": [prompt] * 2, "text_2": completions})
    assert refused.status_code == 422
    assert "one for all" in refused.json()["error"]["message"]


def test_the_own_shape_tells_details_and_scores_beside_a_bad_text(served: Served, http: TestClient) -> None:
    long = "cat " * 600
    body = {"completions": [served.texts[0], long, served.texts[1]], "rendered": True}
    refused = http.post("/v1/score", json=body)
    assert refused.status_code == 422
    assert "position limit is 512" in refused.json()["error"]["message"]
    answer = http.post("/v1/score", json=body | {"partial": True, "details": True}).json()
    assert answer["scores"] == [pytest.approx(served.wanted[0], abs=STOCK), None, pytest.approx(
        served.wanted[1], abs=STOCK
    )]  # fmt: skip
    assert [error["index"] for error in answer["errors"]] == [1]
    assert "position limit" in answer["errors"][0]["message"]
    assert answer["num_tokens"] == [len(served.ids[0]), 0, len(served.ids[1])]
    assert set(answer["timing"]) == {"tokenize_s", "queue_s", "compute_s", "total_s"}
    assert (answer["version"], answer["model"], answer["truncated"]) == (VERSION, "reward", [])
    assert answer["errors"][0]["message"].startswith("`completions[1]` has")
    cut = http.post("/v1/score?truncation=left", json=body)
    assert cut.json()["truncated"] == [1]
    assert cut.headers["Rayrm-Truncated"] == "1"


def test_tools_beside_messages_change_the_score_on_every_route_that_takes_messages(tmp_path: Path) -> None:
    served = Served(tmp_path, "conversational")
    http = TestClient(served.app)
    tools = [{"type": "function", "function": {"name": "add"}}]
    dialogue = user(PROMPTS[0]) + assistant(ANSWERS[0])
    wanted = served.model.score([None], [dialogue], tools=tools)
    assert abs(wanted[0] - served.wanted[0]) > 20 * STOCK
    answer = http.post("/classify", json={"messages": dialogue, "tools": tools}).json()
    assert answer["data"][0]["probs"] == pytest.approx(wanted, abs=1e-6)


def test_an_answer_of_nothing_is_scored_in_both_forms(served: Served, http: TestClient) -> None:
    """A policy may write nothing, and what it gets for that is a score."""
    conversational = served.model.text_form == "conversational"
    body = {
        "prompts": [user("a") if conversational else "a"],
        "completions": [assistant("") if conversational else ""],
    }
    assert http.post("/v1/score", json=body).status_code == 200
    if conversational:
        assert http.post("/reward", json={"prompt": user("a"), "response": ""}).status_code == 200


def test_an_ensembles_spread_is_in_the_answer() -> None:
    async def score(wanted: ScoreRequest) -> ScoreResult:
        return ScoreResult([1.0, float("nan")], "a.b", "both", spread=[0.5, float("nan")], errors={1: "why"})

    http = TestClient(build_app(score, ready))
    answer = http.post("/v1/score", json={"ids": [[1], [2]], "partial": True})
    assert answer.json()["spread"] == [0.5, None]
    assert answer.json()["scores"] == [1.0, None]
    assert answer.json()["errors"] == [{"index": 1, "message": "why"}]
