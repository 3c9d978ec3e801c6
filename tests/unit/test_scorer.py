"""In-process scores: equal to stock transformers, whatever else is in the batch; a number or an exception."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
)

from rayrm.data import tokenize
from rayrm.data.tokenize import TextInput, encode
from rayrm.errors import PublishError, ScoreError
from rayrm.model.reward_model import LoadedModel
from rayrm.serve import scorer
from rayrm.serve.registry import publish
from rayrm.serve.request import ScoreRequest, row_inputs
from rayrm.serve.scorer import RewardModel
from tests.tiny import WORDS, save_tiny, tiny_tokenizer

# Stock transformers scores one text at a time with another attention call: float32 rounding, and no more.
STOCK = 1e-4
# The same kernel on other shapes: only the order of additions differs.
NEIGHBOURS = 1e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
}


def stock_scores(directory: Path, form: str, inputs: list[TextInput]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for ids in encode(tokenizer, form, inputs):
        with torch.no_grad():
            scores.append(float(model(input_ids=torch.as_tensor(ids, dtype=torch.long)[None]).logits))
    return scores


def messages(prompt: str, answer: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]


def some_texts(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    asked = [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) + "?" for _ in range(max(count // 4, 1))]
    prompts = [rng.choice(asked) for _ in range(count)]
    return prompts, [" " + " ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    tiny_tokenizer(chat=False).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["standard", "encoder"])
@pytest.mark.parametrize("budget", [1, 60, 16384])
def test_scores_equal_stock_transformers(kind: str, budget: int, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    prompts, completions = some_texts(24)
    scores = RewardModel.from_pretrained(directory, max_tokens_per_batch=budget).score(prompts, completions)
    inputs = [TextInput(p, c) for p, c in zip(prompts, completions, strict=True)]
    assert scores == pytest.approx(stock_scores(directory, "standard", inputs), abs=STOCK)
    assert np.std(scores) > 20 * STOCK
    assert all(type(score) is float for score in scores)


def test_the_budget_is_the_callers_or_that_of_the_device(standard: Path) -> None:
    assert RewardModel.from_pretrained(standard, device="cpu").max_tokens_per_batch == 4096
    assert RewardModel.from_pretrained(standard, max_tokens_per_batch=60).max_tokens_per_batch == 60


def test_conversational_scores_equal_stock_transformers_with_the_template(chat: Path) -> None:
    pairs = [messages(p, c) for p, c in zip(*some_texts(8), strict=True)]
    prompts, completions = [p for p, _ in pairs], [c for _, c in pairs]
    tools = [{"type": "function", "function": {"name": "add"}}]
    model = RewardModel.from_pretrained(chat)
    assert model.text_form == "conversational"
    for given in (None, tools):
        inputs = [TextInput(p, c, given) for p, c in pairs]
        scores = model.score(prompts, completions, tools=given)
        assert scores == pytest.approx(stock_scores(chat, "conversational", inputs), abs=STOCK)
    templated = [model.tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in pairs]
    assert model.score([""] * 8, templated, rendered=True) == pytest.approx(
        model.score(prompts, completions), abs=NEIGHBOURS
    )


@pytest.mark.parametrize("kind", ["standard", "encoder"])
def test_a_score_does_not_depend_on_batch_neighbours(kind: str, request: pytest.FixtureRequest) -> None:
    model = RewardModel.from_pretrained(request.getfixturevalue(kind))
    prompts, completions = some_texts(20, seed=1)
    alone = [model.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert model.score(prompts, completions) == pytest.approx(alone, abs=NEIGHBOURS)
    order = random.Random(2).sample(range(20), 20)
    shuffled = model.score([prompts[i] for i in order], [completions[i] for i in order])
    assert shuffled == pytest.approx([alone[i] for i in order], abs=NEIGHBOURS)


def test_a_shared_prompt_is_computed_once(standard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel.from_pretrained(standard)
    computed: list[int] = []
    forward = model._scorer.forward
    monkeypatch.setattr(
        model._scorer, "forward", lambda batch: (computed.append(batch.ids.shape[1]), forward(batch))[1]
    )
    prompt, answers = "the cat " * 20, [f" {word}" for word in WORDS[:8]]
    texts = model.encode([TextInput(prompt, answer) for answer in answers])
    model.score([prompt] * 8, answers)
    distinct = {tuple(ids[:end]) for ids in texts for end in range(1, len(ids) + 1)}
    assert computed == [len(distinct)]
    assert len(distinct) < sum(len(ids) for ids in texts) / 4


WINDOW = {"max_position_embeddings": 512, "sliding_window": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
REACH_128 = {
    "mistral": lambda: MistralConfig(**SHAPE, **WINDOW),
    "mistral_without_pad": lambda: MistralConfig(**{**SHAPE, "pad_token_id": None}, **WINDOW),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **WINDOW, head_dim=8),
    "phi3_longrope": lambda: Phi3Config(
        **SHAPE,
        max_position_embeddings=512,
        sliding_window=None,
        original_max_position_embeddings=128,
        rope_parameters=dict(LONGROPE),
    ),
    "llama_dynamic_rope": lambda: LlamaConfig(
        **SHAPE,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
}


def texts_of(prompt: int, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Texts of these lengths that have a prompt of so many tokens in common and nothing else."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(3, 400, prompt)
    tails = [np.append(n + 3, rng.integers(3, 400, length - prompt - 1)) for n, length in enumerate(lengths)]
    return [np.concatenate([begin, tail]).astype(np.int32) for tail in tails]


@pytest.mark.parametrize("family", REACH_128)
def test_texts_within_the_window_share_and_longer_ones_beside_them_are_padded(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    stock = AutoModelForSequenceClassification.from_config(REACH_128[family]()).float().eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    short, long = texts_of(60, [100, 90, 128]), texts_of(60, [200, 140, 300], seed=1)
    mix = [short[0], long[0], short[1], long[1], long[2], short[2]]
    # A model of its own for each: transformers' "dynamic" remembers the longest text that it has seen.
    wanted = [
        float(copy.deepcopy(stock)(input_ids=torch.as_tensor(ids).long()[None]).logits.detach())
        for ids in mix
    ]
    assert np.std(wanted) > 20 * STOCK
    pad = stock.config.pad_token_id
    # More than "dynamic" would be trained on: that limit is the model's own.
    loaded = LoadedModel(stock, tiny_tokenizer(chat=False), "standard", pad, 512)
    for budget in (1, 350, 4096):
        model = RewardModel(loaded, max_tokens_per_batch=budget)
        assert (model.layout, model.reach) == ("shared", 128)
        assert model.score_ids(mix) == pytest.approx(wanted, abs=STOCK)
        assert model.score_ids(mix[::-1]) == pytest.approx(wanted[::-1], abs=STOCK)
        model._scorer.release()
    model = RewardModel(loaded)
    computed: list[tuple[int, bool]] = []
    forward = model._scorer.forward
    monkeypatch.setattr(
        model._scorer,
        "forward",
        lambda batch: (computed.append((batch.ids.shape[1], batch.attention is None)), forward(batch))[1],
    )
    assert model.score_ids(short) == pytest.approx([wanted[n] for n in (0, 2, 5)], abs=STOCK)
    assert computed == [(60 + 40 + 30 + 68, False)]
    computed.clear()
    model.score_ids(mix)
    assert computed == [(60 + 40 + 30 + 68, False), (200 + 140 + 300, True)]


def test_the_position_limit_is_refused_or_cut_as_asked(standard: Path) -> None:
    model = RewardModel.from_pretrained(standard)
    long = "cat " * 600
    (ids,) = encode(model.tokenizer, "standard", [TextInput(long, " sits")])
    with pytest.raises(ScoreError, match=rf"input 1 has {len(ids)} tokens.*limit is 512.*truncation"):
        model.score(["a", long], [" b", " sits"])
    left, right = (model.score([long], [" sits"], truncation=side) for side in ("left", "right"))
    assert left == pytest.approx(model.score_ids([ids[-512:]]), abs=NEIGHBOURS)
    assert right == pytest.approx(model.score_ids([ids[:512]]), abs=NEIGHBOURS)
    with pytest.raises(ScoreError, match="limit is 512"):
        model.score_ids([ids])
    with pytest.raises(ScoreError, match="'middle'"):
        model.score(["a"], [" b"], truncation="middle")


def test_an_input_that_cannot_be_scored_is_named(standard: Path, chat: Path) -> None:
    model = RewardModel.from_pretrained(standard)
    with pytest.raises(ScoreError, match="`prompts` has 2 entries and `completions` 1"):
        model.score(["a", "b"], ["c"])
    with pytest.raises(ScoreError, match=r"`prompts` \(str\) must be a list"):
        model.score("a", ["c"])
    with pytest.raises(ScoreError, match="is one message list"):
        RewardModel.from_pretrained(chat).score(*messages("a", "b"))
    ask, answer = messages("a", "b")
    with pytest.raises(ScoreError, match=r"input 1 of 2: message lists given to a model trained on plain"):
        model.score(["a", ask], ["b", answer])
    with pytest.raises(ScoreError, match="input 0 of 1: plain strings"):
        RewardModel.from_pretrained(chat).score(["a"], ["b"])
    for ids in (np.zeros(0, np.int32), np.asarray([400]), np.asarray([-1]), np.ones((2, 2), int), np.ones(2)):
        with pytest.raises(ScoreError, match=r"`sequences\[0\]`"):
            model.score_ids([ids])


def test_texts_and_ids_of_one_request_are_encoded_alike_and_what_was_cut_is_told(standard: Path) -> None:
    model = RewardModel.from_pretrained(standard)
    text, long = TextInput("the cat", " sits"), TextInput("cat " * 600, " sits")
    ids, long_ids = encode(model.tokenizer, "standard", [text, long])
    for side, kept in (("left", long_ids[-512:]), ("right", long_ids[:512])):
        found = model.encode_request(ScoreRequest([ids, long, text, long_ids], truncation=side))
        assert (found.truncated, found.errors) == ([1, 3], {})
        assert list(found.sequences) == [0, 1, 2, 3]
        for place, expected in enumerate([ids, kept, ids, kept]):
            assert found.sequences[place].dtype == np.int32
            assert found.sequences[place].tolist() == expected.tolist()
    assert model.score_inputs([ids, text]) == pytest.approx([model.score_ids([ids])[0]] * 2, abs=NEIGHBOURS)


def test_a_partial_request_tells_what_is_wrong_with_a_text_and_encodes_the_others(standard: Path) -> None:
    model = RewardModel.from_pretrained(standard)
    ask, answer = messages("a", "b")
    none, foreign, long = np.zeros(0, np.int32), np.asarray([3, 400], np.int32), TextInput("cat " * 600, "")
    inputs = [TextInput("a", " b"), TextInput(ask, answer), foreign, long, none, np.asarray([7, 8], np.int32)]
    reasons = {
        1: "input 1 of 6: message lists given to a model trained on plain text",
        2: r"input 2 of 6 has the token id 400, and the model's are in \[0, 400\)",
        3: "input 3 has .* tokens, the model's position limit is 512",
        4: "input 4 is empty",
    }
    found = model.encode_request(ScoreRequest(inputs, partial=True))
    assert list(found.sequences) == [0, 5]
    assert found.sequences[0].tolist() == encode(model.tokenizer, "standard", inputs[:1])[0].tolist()
    assert found.sequences[5].tolist() == [7, 8]
    assert found.truncated == []
    assert list(found.errors) == list(reasons)
    for place, reason in reasons.items():
        assert re.match(reason, found.errors[place])
        with pytest.raises(ScoreError, match=reason):
            model.encode_request(ScoreRequest([inputs[0]] * place + inputs[place:]))


def test_good_texts_are_tokenized_in_one_call_beside_bad_ones(
    standard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.from_pretrained(standard)
    calls: list[int] = []
    token_ids = tokenize.token_ids
    monkeypatch.setattr(
        tokenize,
        "token_ids",
        lambda t, texts, **how: (calls.append(len(texts)), token_ids(t, texts, **how))[1],
    )
    bad = TextInput(*messages("a", "b"))
    inputs = [*(TextInput(p, c) for p, c in zip(*some_texts(40), strict=True)), bad]
    assert len(model.encode_request(ScoreRequest(inputs, partial=True)).sequences) == 40
    assert calls == [40]


def test_offloading_a_model_on_a_cpu_moves_nothing(standard: Path) -> None:
    model = RewardModel.from_pretrained(standard, device="cpu")
    before = model.score(*some_texts(4))
    addresses = [parameter.data_ptr() for parameter in model._scorer.parameters()]
    model.offload()
    assert [parameter.data_ptr() for parameter in model._scorer.parameters()] == addresses
    model.restore()
    assert model.score(*some_texts(4)) == before


def test_weights_go_to_the_cpu_once_and_come_back_before_they_compute(
    standard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without another device: where they are sent is noted, and nothing moves."""
    model = RewardModel.from_pretrained(standard, device="cpu")
    moved: list[str] = []
    monkeypatch.setattr(model._scorer, "to", lambda device: moved.append(str(device)))
    model._device = torch.device("meta")
    model.restore()
    model.offload()
    model.offload()
    assert moved == ["cpu"]
    monkeypatch.setattr(scorer, "to_device", lambda *_: pytest.fail("computed") if len(moved) < 2 else None)
    monkeypatch.setattr(model._scorer, "forward", lambda _: torch.ones(1))
    assert model.compute([np.asarray([7, 8], np.int32)]) == [1.0]
    assert moved == ["cpu", "meta"]
    model.restore()
    assert moved == ["cpu", "meta"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_model_frees_the_gpu_and_scores_the_same_when_it_is_back(
    standard: Path, dtype: str
) -> None:
    model = RewardModel.from_pretrained(standard, device="cuda", dtype=dtype)
    before = model.score(*some_texts(8))
    held = torch.cuda.memory_allocated()
    weights = sum(p.numel() * p.element_size() for p in model._scorer.parameters())
    model.offload()
    assert {parameter.device.type for parameter in model._scorer.parameters()} == {"cpu"}
    assert held - torch.cuda.memory_allocated() >= weights
    model.restore()
    assert {parameter.device.type for parameter in model._scorer.parameters()} == {"cuda"}
    assert model.score(*some_texts(8)) == before
    model.offload()
    assert model.score(*some_texts(8)) == before


def test_the_columns_that_the_template_reads_travel_with_their_rows() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    columns = {
        "tools": [tools, None, '[{"name": "sub"}]'],
        "chat_template_kwargs": [None, {"deep": True}, {}],
    }
    inputs = row_inputs(["a"] * 3, ["b"] * 3, {**columns, "label": ["x"] * 3, "trainer_state": object()})
    assert [entry.tools for entry in inputs] == [tools, None, [{"name": "sub"}]]
    assert [entry.chat_template_kwargs for entry in inputs] == [{}, {"deep": True}, {}]
    with pytest.raises(ScoreError, match="`tools` must be a list with one entry for each of 1 prompts"):
        row_inputs(["a"], ["b"], {"tools": [tools, tools]})
    for name, bad, says in (
        ("tools", "[{nojson", r"`tools\[1\]` .* is not JSON"),
        ("tools", 5, r"`tools\[1\]` \(5\) must be a list"),
        ("chat_template_kwargs", "{nojson", r"`chat_template_kwargs\[1\]` is not JSON"),
        ("chat_template_kwargs", [1], r"`chat_template_kwargs\[1\]` \(\[1\]\) must be an object"),
    ):
        with pytest.raises(ScoreError, match=says):
            row_inputs(["a"] * 2, ["b"] * 2, {name: [None, bad]})


def test_a_score_is_a_finite_number_or_an_error(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(save_tiny(tmp_path, chat=False))
    assert model.score([], []) == []
    with torch.no_grad():
        model._scorer.model.score.weight.fill_(float("nan"))
    with pytest.raises(ScoreError, match="input 0 of 1 got the score nan"):
        model.score(["a"], [" b"])


def test_a_published_model_with_a_changed_byte_does_not_score(standard: Path, tmp_path: Path) -> None:
    published = publish(standard, tmp_path, "tampered")
    weights = published.path / "model.safetensors"
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PublishError, match=r"model\.safetensors"):
        RewardModel.from_pretrained(published.path)


def test_a_token_without_an_embedding_is_refused_in_a_text_too(tmp_path: Path) -> None:
    """A tokenizer may have been given tokens that the model was never resized for."""
    model = RewardModel.from_pretrained(save_tiny(tmp_path, chat=False))
    model.tokenizer.add_tokens(["<new>"])
    with pytest.raises(
        ScoreError, match=r"input 1 of 2 has the token id 400, and the model's are in \[0, 400\)"
    ):
        model.encode_request(ScoreRequest([TextInput("a", " b"), TextInput("a", "<new>")]))
