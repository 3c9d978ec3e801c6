"""Publishing: immutable, checked by content, refused when it is not a one-label safetensors model."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

from rayrm.config import DataConfig, ModelConfig, RewardConfig
from rayrm.errors import PublishError
from rayrm.model.adapters import add_adapter
from rayrm.model.reward_model import load_model
from rayrm.model.saving import save_model
from rayrm.runfile import Run, dump_run
from rayrm.serve import registry as registry_module
from rayrm.serve.registry import (
    content_version,
    current_version,
    list_versions,
    open_published,
    publish,
    set_current,
)
from rayrm.serve.saved import training_records
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "checkpoint", chat=False)


def test_the_same_content_has_one_version_and_is_written_once(checkpoint: Path, tmp_path: Path) -> None:
    first = publish(checkpoint, tmp_path / "registry", "reward")
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "optimizer.pt").write_bytes(b"not the model")
    before = {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()}
    second = publish(copy, tmp_path / "registry", "reward")
    assert (first.is_new, second.is_new) == (True, False)
    assert first == second
    assert first.version == content_version(checkpoint) == content_version(first.path)
    assert len(first.version) == 12
    assert {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()} == before
    assert not (first.path / "optimizer.pt").exists()


@pytest.mark.parametrize("change", ["weights", "tokenizer", "text form"])
def test_other_content_is_another_version(checkpoint: Path, tmp_path: Path, change: str) -> None:
    first = publish(checkpoint, tmp_path / "registry", "reward")
    if change == "weights":
        tiny_model(seed=1).save_pretrained(checkpoint)
    elif change == "tokenizer":
        tiny_tokenizer(bos=True, chat=False).save_pretrained(checkpoint)
    else:
        (checkpoint / "rayrm.json").write_text('{"text_form": "conversational"}')
    second = publish(checkpoint, tmp_path / "registry", "reward")
    assert second.version != first.version
    assert list_versions(tmp_path / "registry", "reward") == [first.version, second.version]
    assert open_published(tmp_path / "registry", "reward") == second
    assert open_published(tmp_path / "registry", "reward", first.version) == first
    assert open_published(first.path) == first


def test_a_published_model_is_read_only_and_scores_as_its_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    published = publish(checkpoint, tmp_path / "registry", "reward")
    assert all(p.stat().st_mode & 0o222 == 0 for p in published.path.rglob("*") if p.is_file())
    texts = (["the cat?", "a dog?"], [" sits", " runs away"])
    expected = RewardModel.from_pretrained(checkpoint).score(*texts)
    assert RewardModel.from_pretrained(published.path).score(*texts) == expected
    assert json.loads((published.path / "rayrm.json").read_text())["text_form"] == "standard"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("manifest.json", "files", None),
        ("manifest.json", "files", [1]),
        ("manifest.json", "files", {"config.json": {"bytes": 3}}),
        ("manifest.json", "version", 5),
        ("manifest.json", "name", None),
        ("manifest.json", "created", None),
        ("manifest.json", "probe", {"scores": [0.5]}),
        ("current.json", "version", None),
        ("current.json", "version", ["a"]),
    ],
)
def test_a_record_that_publish_did_not_write_is_refused_by_its_file_and_key(
    file: str, key: str, value: object, checkpoint: Path, tmp_path: Path
) -> None:
    published = publish(checkpoint, tmp_path / "registry", "reward")
    path = (published.path if file == "manifest.json" else published.path.parent) / file
    record = json.loads(path.read_text())
    if value is None:
        del record[key]
    else:
        record[key] = value
    path.chmod(0o644)
    path.write_text(json.dumps(record))
    with pytest.raises(PublishError, match=rf"{file}' is not as `rayrm publish` wrote it: `{key}"):
        open_published(published.path.parent)
    if file == "manifest.json":
        for reading in (
            lambda: publish(checkpoint, tmp_path / "registry", "reward"),
            lambda: open_published(published.path.parent, version="absent"),
        ):
            with pytest.raises(PublishError, match=rf"{file}' is not as `rayrm publish` wrote it: `{key}"):
                reading()


def test_the_pointer_moves_only_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    first = publish(checkpoint, tmp_path / "registry", "reward")
    tiny_model(seed=1).save_pretrained(checkpoint)
    second = publish(checkpoint, tmp_path / "registry", "reward", make_current=False)
    assert current_version(tmp_path / "registry" / "reward") == first.version
    set_current(tmp_path / "registry", "reward", second.version)
    assert open_published(tmp_path / "registry" / "reward") == second
    with pytest.raises(PublishError, match=f"'nope' of 'reward' is not published.*{first.version}"):
        set_current(tmp_path / "registry", "reward", "nope")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    published = publish(checkpoint, tmp_path / "registry", "reward")
    victim = published.path / "model.safetensors"
    content = bytearray(victim.read_bytes())
    victim.unlink()
    if damage == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-1])
    with pytest.raises(PublishError, match=r"model\.safetensors' (differs|is missing)"):
        open_published(tmp_path / "registry", "reward")


def test_shards_are_published_together_and_a_missing_one_is_named(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").unlink()
    tiny_model().save_pretrained(checkpoint, max_shard_size="40KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1
    published = publish(checkpoint, tmp_path / "registry", "reward")
    loaded = AutoModelForSequenceClassification.from_pretrained(published.path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tiny_model().state_dict().items())
    shards[0].unlink()
    with pytest.raises(PublishError, match=shards[0].name):
        publish(checkpoint, tmp_path / "registry", "reward")


@pytest.mark.parametrize("outside", [True, False])
def test_a_shard_outside_of_the_directory_is_refused_and_left_alone(tmp_path: Path, outside: bool) -> None:
    checkpoint = save_tiny(tmp_path / "checkpoint")
    weights = Path(shutil.move(checkpoint / "model.safetensors", tmp_path / "weights.safetensors"))
    content = weights.read_bytes()
    name = str(weights) if outside else f"../{weights.name}"
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_model().state_dict(), name)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PublishError, match="which must be a file of that directory"):
        publish(checkpoint, tmp_path / "registry", "reward")
    assert weights.read_bytes() == content
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(PublishError, match="has no object `weight_map`"):
        publish(checkpoint, tmp_path / "registry", "reward")


def test_an_adapter_is_merged_with_its_trained_head(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    base = save_tiny(tmp_path / "base", chat=False)
    adapted = add_adapter(load_model(str(base)), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(adapted, tokenizer, tmp_path / "adapter", text_form="standard")
    published = publish(tmp_path / "adapter", tmp_path / "registry", "reward")
    assert (published.path / "model.safetensors").is_file()
    assert not (published.path / "adapter_config.json").exists()

    adapted.eval()
    ids = tokenizer("the cat sits</s>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = float(adapted(input_ids=ids).logits)
    assert RewardModel.from_pretrained(published.path).score(["the cat"], [" sits"]) == pytest.approx(
        [expected], abs=1e-5
    )
    assert abs(expected - RewardModel.from_pretrained(base).score(["the cat"], [" sits"])[0]) > 1e-2
    assert publish(tmp_path / "adapter", tmp_path / "registry", "reward").is_new is False

    as_adapter = publish(tmp_path / "adapter", tmp_path / "registry", "adapter", merge_lora=False)
    assert RewardModel.from_pretrained(as_adapter.path).score(["the cat"], [" sits"]) == pytest.approx(
        [expected], abs=1e-5
    )
    shutil.rmtree(base)
    with pytest.raises(PublishError, match="cannot be merged into its base"):
        publish(tmp_path / "adapter", tmp_path / "registry", "reward")


def test_what_is_known_of_the_training_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    step = Path(shutil.move(checkpoint, tmp_path / "checkpoint-20"))
    (tmp_path / "run.toml").write_text('[model]\nname = "tiny"\n')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 10, "eval_accuracy": 0.5}\n{"step": 20, "eval_accuracy": 0.75}\n{"step": 20, "loss": 0.3}\n'
        '{"step": 30, "eval_accuracy": 0.9}\n{"step": 40, "eval_ac'  # of later weights, and cut off
    )
    published = publish(step, tmp_path / "registry", "reward")
    manifest = json.loads((published.path / "manifest.json").read_text())
    assert manifest["evaluation"] == {"step": 20.0, "eval_accuracy": 0.75}
    assert (published.path / "run.toml").read_text() == '[model]\nname = "tiny"\n'
    assert "| eval_accuracy | 0.75 |" in (published.path / "README.md").read_text()


@pytest.mark.parametrize(("best", "expected"), [(True, (10, 0.9, 0.8)), (False, (20, 0.5, 0.4))])
def test_the_evaluation_is_of_the_published_weights_on_all_sets(
    checkpoint: Path, best: bool, expected: tuple[float, ...]
) -> None:
    """A run that ends with its best checkpoint's weights was evaluated later too."""
    reward = RewardConfig(load_best_model_at_end=best, eval_strategy="steps", eval_steps=10, save_steps=10)
    (checkpoint / "run.toml").write_text(dump_run(Run(ModelConfig("m"), DataConfig("d"), reward)))
    standing = {"step": 20, "num_steps": 20, "finished": True, "best_checkpoint": "checkpoint-10"}
    (checkpoint / "progress.json").write_text(json.dumps(standing))
    records = [
        {"step": 10, "eval_a_accuracy": 0.9}, {"step": 10, "eval_b_accuracy": 0.8},
        {"step": 20, "eval_a_accuracy": 0.5}, {"step": 20, "eval_b_accuracy": 0.4},
        {"step": 20, "train_loss": 0.3},
    ]  # fmt: skip
    (checkpoint / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    _, evaluation = training_records(checkpoint)
    names = ("step", "eval_a_accuracy", "eval_b_accuracy")
    assert evaluation == dict(zip(names, expected, strict=True))


def test_a_directory_that_is_no_reward_model_is_refused_with_the_fix(
    checkpoint: Path, tmp_path: Path
) -> None:
    def refused(match: str) -> None:
        with pytest.raises(PublishError, match=match):
            publish(checkpoint, tmp_path / "registry", "reward")

    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    refused("LlamaForCausalLM: a reward model is")
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "id2label": {"0": "a", "1": "b", "2": "c"}})
    )
    refused("num_labels=3")
    (checkpoint / "config.json").write_text("{")
    refused(r"config\.json' cannot be read as JSON")
    (checkpoint / "config.json").write_text(json.dumps(config))
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("corrupt or cut short")
    (checkpoint / "model.safetensors").unlink()
    refused(r"has no model\.safetensors")
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    refused(r"only as pickles \(pytorch_model\.bin\).*save_pretrained")
    (checkpoint / "model.safetensors").write_bytes(weights)
    for file in checkpoint.glob("token*"):
        file.unlink()
    refused("no tokenizer files")
    (checkpoint / "config.json").unlink()
    refused(r"there is no config\.json")
    shutil.rmtree(checkpoint)
    refused("is not a directory")
    assert not (tmp_path / "registry").exists()


def test_nothing_published_is_said_with_what_is(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="No version is published there"):
        open_published(tmp_path / "registry", "reward")
    published = publish(checkpoint, tmp_path / "registry", "reward")
    with pytest.raises(PublishError, match=f"Published versions there: {published.version}"):
        open_published(tmp_path / "registry", "reward", "000000000000")
    with pytest.raises(PublishError, match=r"name \('\.\./up'\)"):
        publish(checkpoint, tmp_path / "registry", "../up")


def test_an_interrupted_publish_leaves_no_version(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry_module.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(checkpoint, tmp_path / "registry", "reward")
    monkeypatch.undo()
    assert list((tmp_path / "registry" / "reward").iterdir()) == []
    assert publish(checkpoint, tmp_path / "registry", "reward").is_new


def test_two_publishers_of_one_content_agree(checkpoint: Path, tmp_path: Path) -> None:
    found: list[registry_module.PublishedModel] = []
    threads = [
        threading.Thread(target=lambda: found.append(publish(checkpoint, tmp_path / "registry", "reward")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert sum(p.is_new for p in found) == 1
    assert open_published(tmp_path / "registry", "reward") == found[0]
    assert sorted(os.listdir(tmp_path / "registry" / "reward")) == sorted([found[0].version, "current.json"])
