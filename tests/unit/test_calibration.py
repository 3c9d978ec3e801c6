"""Calibrations: mean and spread of a model's own scores, kept with its version and told with its answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from rayrm import cli
from rayrm.errors import ConfigError, DataError, PublishError, ScoreError
from rayrm.serve.calibration import (
    MOST_CALIBRATION_TEXTS,
    _digest,
    calibration_files,
    read_publication_texts,
    stored_calibration,
)
from rayrm.serve.http import build_app
from rayrm.serve.loaded import LoadedModel
from rayrm.serve.registry import PublishedModel, content_version, current_version, open_published, publish
from rayrm.serve.request import ModelPlace, ScoreRequest, ScoreResult
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny
from tests.unit.test_probe import manifest_of, user_probe

COUNTED = [f"count {'to ' * n}?" for n in range(5)]


def scores_of(model: PublishedModel, file: Path) -> list[float]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [(row["prompt"], text) for row in rows for text in row["completions"]]
    return RewardModel.from_pretrained(model.path).score(*map(list, zip(*asked, strict=True)))


def test_each_files_mean_spread_and_count_are_kept(tmp_path: Path) -> None:
    run = save_tiny(tmp_path / "run", chat=False)
    files = {"chat": user_probe(tmp_path / "chat.jsonl"), "maths": user_probe(tmp_path / "m.jsonl", COUNTED)}
    published = publish(run, tmp_path, "reward", calibrate=files)
    manifest = manifest_of(published)
    assert list(manifest["calibration"]) == ["chat", "maths"]
    for name, file in files.items():
        scores = scores_of(published, file)
        kept = manifest["calibration"][name]
        assert kept["mean"] == pytest.approx(np.mean(scores), abs=1e-5)
        assert kept["std"] == pytest.approx(np.std(scores), abs=1e-5)
        assert (kept["count"], kept["source"]) == (len(scores), str(file))
        assert stored_calibration(manifest)[name] == (kept["mean"], kept["std"])
    assert manifest["calibration"]["chat"]["mean"] != manifest["calibration"]["maths"]["mean"]
    # The built-in probe is there all the same, and the version is the content's alone.
    assert len(manifest["probe"]["scores"]) == 16
    assert published.version == content_version(run) == open_published(published.path).version


def test_published_content_keeps_its_calibration(tmp_path: Path) -> None:
    run, chat = save_tiny(tmp_path / "run", chat=False), user_probe(tmp_path / "chat.jsonl")
    maths = user_probe(tmp_path / "maths.jsonl", COUNTED)
    first = publish(run, tmp_path, "reward", calibrate={"chat": chat})
    before = (first.path / "manifest.json").read_bytes()
    moved = user_probe(tmp_path / "moved.jsonl")
    for same in (None, {}, {"chat": chat}, {"chat": moved}):
        assert not publish(run, tmp_path, "reward", calibrate=same).is_new
    for other in ({"chat": maths}, {"talk": chat}, {"chat": chat, "maths": maths}):
        with pytest.raises(
            PublishError, match=f"reward {first.version} is published already, with the calibr"
        ):
            publish(run, tmp_path, "reward", calibrate=other)
    with pytest.raises(PublishError, match="is published already, without the texts of `probe`"):
        publish(run, tmp_path, "reward", calibrate={"chat": chat}, probe=maths)
    assert (first.path / "manifest.json").read_bytes() == before
    assert current_version(tmp_path / "reward") == first.version
    publish(run, tmp_path, "without")
    with pytest.raises(PublishError, match=r"with no calibration, and not by .* \(chat=.*another name"):
        publish(run, tmp_path, "without", calibrate={"chat": chat})


def test_no_more_texts_are_read_than_are_used(tmp_path: Path) -> None:
    asked = [str(n) for n in range(MOST_CALIBRATION_TEXTS)]
    texts = read_publication_texts(None, {"chat": user_probe(tmp_path / "chat.jsonl", asked)})
    assert texts.probe is None
    assert len(texts.calibrate["chat"].inputs) == MOST_CALIBRATION_TEXTS


def test_what_is_no_calibration_is_refused_and_nothing_is_published(tmp_path: Path) -> None:
    run, file = save_tiny(tmp_path / "run", chat=False), tmp_path / "chat.jsonl"

    def refused(content: str, error: type[Exception], match: str, name: str = "chat") -> None:
        file.write_text(content)
        with pytest.raises(error, match=match):
            publish(run, tmp_path / "registry", "reward", calibrate={name: file})

    refused("", PublishError, r"`calibrate` chat \(.*chat\.jsonl'\) has no row")
    refused("{", DataError, r"chat\.jsonl:1")
    refused('{"completion": "a"}\n', PublishError, r"`calibrate` chat \(.*has one text.*needs two")
    refused('{"completion": "a"}\n' * 3, PublishError, "`calibrate` chat .*all 3 texts score")
    refused('{"prompt": "a"}\n', ScoreError, r"chat\.jsonl:1: `completion` is missing")
    message = '{"completion": [{"role": "user", "content": "a"}]}\n'
    refused(message * 2, PublishError, r"cannot score `calibrate` chat .*message lists given to a model")
    refused('{"completion": "a"}\n{"completion": "b"}\n', PublishError, "has no name", " ")
    assert not list((tmp_path / "registry").glob("reward/*"))


def test_a_loaded_version_tells_its_calibration_with_each_answer(tmp_path: Path) -> None:
    file = user_probe(tmp_path / "chat.jsonl")
    calibrated = publish(save_tiny(tmp_path / "run", chat=False), tmp_path, "a", calibrate={"chat": file})
    plain = publish(save_tiny(tmp_path / "other", seed=1, chat=False), tmp_path, "b")
    for model, stored in ((calibrated, manifest_of(calibrated)["calibration"]["chat"]), (plain, None)):
        loaded = LoadedModel.load("reward", ModelPlace(str(model.path), model.version), None)
        expected = {} if stored is None else {"chat": (stored["mean"], stored["std"])}
        assert loaded.calibration == expected


def test_http_tells_it_with_the_details_alone() -> None:
    async def score(wanted: ScoreRequest) -> ScoreResult:
        return ScoreResult([0.5], "v1", "reward", [1], calibration={"chat": (1.5, 2.0)})

    async def ready() -> dict[str, object]:
        return {}

    http = TestClient(build_app(score, ready))
    body = {"ids": [[1]]}
    assert "calibration" not in http.post("/v1/score", json=body).json()
    told = http.post("/v1/score", json={**body, "details": True}).json()
    assert told["calibration"] == {"chat": {"mean": 1.5, "std": 2.0}}


def test_the_command_takes_a_file_for_each_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "run", chat=False)
    user_probe(tmp_path / "a.jsonl")
    user_probe(tmp_path / "b=2.jsonl", COUNTED)
    monkeypatch.chdir(tmp_path)
    words = ["publish", "run", "--calibrate", "chat=a.jsonl", "--calibrate", "maths=b=2.jsonl"]
    assert cli.main(words) == 0
    (path,) = Path("registry/reward").glob("*/manifest.json")
    assert list(json.loads(path.read_text())["calibration"]) == ["chat", "maths"]
    capsys.readouterr()
    for wrong in (["a.jsonl"], ["=a.jsonl"], ["chat="], ["chat=a.jsonl", "--calibrate", "chat=a.jsonl"]):
        assert cli.main(["publish", "run", "--calibrate", *wrong]) == 2
        assert "must be NAME=FILE, each name once" in capsys.readouterr().err
    assert os.listdir("registry") == ["reward"]


def test_a_successor_is_calibrated_by_the_same_texts_or_by_those_that_are_named(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "c"}\n')
    stored = {
        "source": str(chat),
        "sha256": _digest(read_publication_texts(None, {"c": chat}).calibrate["c"]),
    }
    manifest = {"name": "reward", "version": "v1", "calibration": {"chat": stored}}
    assert calibration_files(manifest, {}) == {"chat": str(chat)}
    assert calibration_files({"name": "reward", "version": "v1"}, {}) == {}
    other = tmp_path / "other.jsonl"
    chat.rename(other)
    fix = r"Put them back, or name a file of texts: refresh\.calibrate\.chat=FILE"
    with pytest.raises(ConfigError, match=rf"(?s)chat.*reward v1 .*cannot be read.*{fix}"):
        calibration_files(manifest, {})
    chat.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "d"}\n')
    with pytest.raises(ConfigError, match=rf"these are others now.*{fix}"):
        calibration_files(manifest, {})
    assert calibration_files(manifest, {"chat": str(other)}) == {"chat": str(other)}
