"""The probe: scores stored at publication come out of the same model, and of no other."""

from __future__ import annotations

import copy
import gzip
import json
import logging
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rayrm.data.tokenize import TextInput
from rayrm.errors import DataError, PublishError, ScoreError
from rayrm.model.adapters import add_adapter
from rayrm.model.reward_model import load_model
from rayrm.model.saving import save_model
from rayrm.serve.drift import Distribution
from rayrm.serve.probe import MOST_TEXTS, PROBE, built_in_inputs, check_probe, probe_scores, read_probe
from rayrm.serve.registry import PublishedModel, content_version, current_version, open_published, publish
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

ASKED = [f"the cat {'sits ' * n}?" for n in range(1, 7)]


def manifest_of(published: PublishedModel) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((published.path / "manifest.json").read_text(encoding="utf-8"))
    return loaded


def user_probe(path: Path, asked: list[str] = ASKED) -> Path:
    rows = [{"prompt": text, "completions": [" yes", " never the dog"]} for text in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    home = tmp_path_factory.mktemp("plain")
    return publish(save_tiny(home / "run", chat=False, bos=True), home / "registry", "reward")


def test_the_built_in_texts_are_various() -> None:
    assert len(PROBE) == len(set(PROBE)) == 16
    assert all(len(turns) % 2 == 0 and all(turns) for turns in PROBE)
    assert len({turns[:-1] for turns in PROBE}) < 16
    assert any(len(turns) > 2 for turns in PROBE)
    lengths = [len("".join(turns)) for turns in PROBE]
    assert max(lengths) > 10 * min(lengths)
    text = "".join("".join(turns) for turns in PROBE)
    for some in ("饭", "¿", "ж", "ب", "\U0001f680", "\n", "`"):
        assert some in text


@pytest.mark.parametrize("chat", [False, True])
def test_the_stored_scores_are_the_models_own(chat: bool, tmp_path: Path) -> None:
    published = publish(save_tiny(tmp_path / "run", chat=chat), tmp_path, "reward")
    model, manifest = RewardModel.from_pretrained(published.path), manifest_of(published)
    inputs = [TextInput(**row) for row in manifest["probe"]["inputs"]]
    assert len(inputs) == 16
    assert all(isinstance(entry.completion, list) == chat for entry in inputs)
    scores = model.score_inputs(inputs, truncation="left")
    assert manifest["probe"]["scores"] == pytest.approx(scores, abs=1e-5)
    assert statistics.pstdev(scores) > 1e-2
    assert "distribution" not in manifest
    check_probe(model, manifest)
    assert published.version == content_version(tmp_path / "run") == open_published(published.path).version


def test_another_model_fails_and_the_text_that_differs_most_is_named(
    plain: PublishedModel, tmp_path: Path
) -> None:
    manifest = manifest_of(plain)
    other = RewardModel.from_pretrained(save_tiny(tmp_path, seed=1, chat=False, bos=True))
    inputs = [TextInput(**row) for row in manifest["probe"]["inputs"]]
    found = probe_scores(other, inputs)
    off = [abs(a - b) / max(1, abs(b)) for a, b in zip(found, manifest["probe"]["scores"], strict=True)]
    worst = off.index(max(off))
    with pytest.raises(PublishError, match=rf"probe text {worst} of 16 .* has {found[worst]:.6g} here"):
        check_probe(other, manifest)


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_the_allowed_difference_grows_with_the_score_and_depends_on_the_dtype(
    plain: PublishedModel, dtype: str, allowed: float, scale: float
) -> None:
    model = RewardModel.from_pretrained(plain.path, dtype=dtype)
    with torch.no_grad():
        model._scorer.model.score.weight.mul_(scale)
    manifest = manifest_of(plain)
    inputs = [TextInput(**row) for row in manifest["probe"]["inputs"]]
    scores = probe_scores(model, inputs)
    highest = max(range(16), key=lambda place: abs(scores[place]))
    assert (abs(scores[highest]) > 1.2) == (scale > 1)
    for times, passes in ((0.9, True), (1.15, False)):
        # |score - stored| = times * allowed * max(1, |stored|), solved for what is stored.
        stored, size = list(scores), abs(scores[highest])
        off = times * allowed if size < 1 else times * allowed * size / (1 + times * allowed)
        stored[highest] += math.copysign(off, -scores[highest])
        changed = {**manifest, "probe": {"inputs": manifest["probe"]["inputs"], "scores": stored}}
        if passes:
            check_probe(model, changed)
        else:
            with pytest.raises(PublishError, match=f"probe text {highest} of 16"):
                check_probe(model, changed)


def test_a_score_that_is_not_finite_is_neither_published_nor_passed(
    plain: PublishedModel, tmp_path: Path
) -> None:
    model = RewardModel.from_pretrained(plain.path)
    with torch.no_grad():
        model._scorer.model.score.weight.fill_(float("nan"))
    with pytest.raises(PublishError, match="cannot score its probe: input 0 of 16 got the score nan"):
        check_probe(model, manifest_of(plain))
    run = save_tiny(tmp_path / "run", chat=False)
    broken = tiny_model()
    with torch.no_grad():
        broken.score.weight.fill_(float("inf"))
    broken.save_pretrained(run)
    with pytest.raises(PublishError, match="not published, it cannot score a built-in text: input 0 of 16"):
        publish(run, tmp_path / "registry", "reward")
    assert list((tmp_path / "registry" / "reward").iterdir()) == []


def test_a_model_published_without_a_probe_passes_and_says_so(
    plain: PublishedModel, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = manifest_of(plain)
    del manifest["probe"]
    with caplog.at_level(logging.INFO, "rayrm.serve.probe"):
        check_probe(RewardModel.from_pretrained(plain.path), manifest)
    assert f"reward {plain.version} was published without a probe" in caplog.text


def test_a_users_probe_is_stored_with_the_distribution_of_its_scores(tmp_path: Path) -> None:
    run, file = save_tiny(tmp_path / "run", chat=False), user_probe(tmp_path / "probe.jsonl")
    published = publish(run, tmp_path, "reward", probe=file)
    manifest = manifest_of(published)
    scores = manifest["probe"]["scores"]
    assert len(scores) == 12
    assert [row["prompt"] for row in manifest["probe"]["inputs"]] == [text for text in ASKED for _ in "ab"]
    found = Distribution.stored(manifest)
    assert found == Distribution(
        pytest.approx(statistics.fmean(scores)), pytest.approx(statistics.pstdev(scores)), 12, str(file)
    )
    check_probe(RewardModel.from_pretrained(published.path), manifest)
    assert published.version == content_version(run)


def test_published_content_keeps_its_probe(tmp_path: Path) -> None:
    run, file = save_tiny(tmp_path / "run", chat=False), user_probe(tmp_path / "probe.jsonl")
    first = publish(run, tmp_path, "reward", probe=file)
    before = (first.path / "manifest.json").read_bytes()
    copied = tmp_path / "copy.jsonl.gz"
    copied.write_bytes(gzip.compress(file.read_bytes()))
    for again in (None, file, copied):
        assert not publish(run, tmp_path, "reward", probe=again).is_new
    other = user_probe(tmp_path / "other.jsonl", [*ASKED, "why?"])
    with pytest.raises(PublishError, match=rf"reward {first.version} is published already.*other\.jsonl"):
        publish(run, tmp_path, "reward", probe=other)
    assert (first.path / "manifest.json").read_bytes() == before
    assert current_version(tmp_path / "reward") == first.version
    publish(run, tmp_path, "without")
    with pytest.raises(PublishError, match="is published already"):
        publish(run, tmp_path, "without", probe=file)


def test_no_more_texts_are_read_than_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = user_probe(tmp_path / "probe.jsonl", [str(n) for n in range(MOST_TEXTS)])
    with caplog.at_level(logging.INFO, "rayrm.serve.probe"):
        texts = read_probe(file)
    assert [entry.prompt for entry in texts.inputs[::2]] == [str(n) for n in range(MOST_TEXTS // 2)]
    assert len(texts.inputs) == MOST_TEXTS
    assert "the others are not used" in caplog.text


def test_a_probe_that_is_no_probe_is_refused_with_what_to_type(tmp_path: Path) -> None:
    run, file = save_tiny(tmp_path / "run", chat=False), tmp_path / "probe.jsonl"

    def refused(content: str, error: type[Exception], match: str) -> None:
        file.write_text(content)
        with pytest.raises(error, match=match):
            publish(run, tmp_path / "registry", "reward", probe=file)

    refused("{", DataError, "probe.jsonl:1")
    refused('{"prompt": "a"}\n', ScoreError, r"probe\.jsonl:1: `completion` is missing")
    message = '{"completion": [{"role": "user", "content": "a"}]}\n'
    refused(message, PublishError, r"cannot score `probe` .*input 0 of 1: message lists given to a model")
    refused('{"completion": "a"}\n' * 3, PublishError, "all 3 texts score")
    file.unlink()
    with pytest.raises(DataError, match=r"probe\.jsonl"):
        publish(run, tmp_path / "registry", "reward", probe=file)
    assert not list((tmp_path / "registry").glob("reward/*"))


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no dialogues here') }}"])
def test_a_model_whose_template_takes_no_message_is_probed_with_rendered_text(
    template: str | None, tmp_path: Path
) -> None:
    run = save_tiny(tmp_path / "run", chat=False)
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(run)
    (run / "rayrm.json").write_text('{"text_form": "conversational"}')
    published = publish(run, tmp_path, "reward")
    manifest = manifest_of(published)
    assert [row["rendered"] for row in manifest["probe"]["inputs"]] == [True] * 16
    check_probe(RewardModel.from_pretrained(published.path), manifest)


def test_a_refused_dialogue_alone_is_given_as_rendered_text(tmp_path: Path) -> None:
    run = save_tiny(tmp_path / "run")
    tokenizer = tiny_tokenizer()
    once = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
    tokenizer.chat_template = once + tokenizer.chat_template
    tokenizer.save_pretrained(run)
    inputs = built_in_inputs(RewardModel.from_pretrained(run))
    assert [entry.rendered for entry in inputs] == [len(turns) > 2 for turns in PROBE]


def test_texts_beyond_the_models_positions_lose_their_beginning(tmp_path: Path) -> None:
    run = save_tiny(tmp_path / "run", chat=False, max_position_embeddings=24)
    published = publish(run, tmp_path, "reward")
    check_probe(RewardModel.from_pretrained(published.path), manifest_of(published))


def test_an_adapter_whose_base_is_elsewhere_is_published_without_a_probe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_tiny(tmp_path / "base", chat=False)
    adapted = add_adapter(load_model(str(base)), LoraConfig(r=4, target_modules="all-linear"))
    save_model(adapted, tiny_tokenizer(chat=False), tmp_path / "adapter", text_form="standard")
    kept = publish(tmp_path / "adapter", tmp_path, "here", merge_lora=False)
    check_probe(RewardModel.from_pretrained(kept.path), manifest_of(kept))
    assert len(manifest_of(kept)["probe"]["scores"]) == 16
    base.rename(tmp_path / "moved")
    file = user_probe(tmp_path / "probe.jsonl")
    with pytest.raises(PublishError, match="cannot be loaded"):
        publish(tmp_path / "adapter", tmp_path, "away", merge_lora=False, probe=file)
    published = publish(tmp_path / "adapter", tmp_path, "away", merge_lora=False)
    assert "probe" not in manifest_of(published)
    assert "published without a probe" in caplog.text


def test_a_check_changes_nothing_of_the_manifest(plain: PublishedModel) -> None:
    manifest = manifest_of(plain)
    before = copy.deepcopy(manifest)
    check_probe(RewardModel.from_pretrained(plain.path), manifest)
    assert manifest == before
