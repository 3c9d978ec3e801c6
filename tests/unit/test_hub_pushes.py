"""What of a run goes to the hub, and that a token goes nowhere else."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from rayrm.config import DataConfig, ModelConfig, RewardConfig
from rayrm.errors import ConfigError, RayrmError
from rayrm.model.saving import save_model
from rayrm.runfile import Run, dump_run
from rayrm.train.callbacks import CallbackArgs
from rayrm.train.hub import HubRepository
from rayrm.train.rank import Rank
from rayrm.train.rundir import identity_of
from tests.hub_server import HubServer, hub_server
from tests.tiny import tiny_model, tiny_tokenizer

TOKEN = "hf_secret_of_this_test"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server(monkeypatch) as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory, as training leaves it."""
    save_model(tiny_model(), tiny_tokenizer(), tmp_path, text_form="conversational")
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("quarantine.jsonl", "run.toml", "metrics.jsonl", "checkpoint-3/model.safetensors"):
        (tmp_path / name).write_text("a row of the data")
    return tmp_path


def of(run: Path, **fields: object) -> HubRepository:
    return HubRepository(RewardConfig(str(run), push_to_hub=True, hub_token=TOKEN, **fields), run)


def test_the_models_files_alone_are_pushed_where_the_settings_say(hub: HubServer, run: Path) -> None:
    before = (run / "README.md").read_bytes()
    repository = of(run, hub_model_id="org/reward", hub_private_repo=True, hub_revision="second")
    told = repository.push(run, "End of training", card={"dataset_name": "org/pairs", "tags": "mine"})
    assert told.oid == "abc"
    assert repository.name == "org/reward"
    assert (hub.created[0]["organization"], hub.created[0]["name"]) == ("org", "reward")
    assert hub.created[0]["visibility"] == "private"
    assert hub.branches == ["second"]
    (commit,) = hub.commits
    assert (commit.repo, commit.revision, commit.message) == ("org/reward", "second", "End of training")
    assert {"model.safetensors", "config.json", "rayrm.json", "tokenizer.json", "README.md"} <= set(
        commit.files
    )
    assert commit.files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert not [name for name, content in commit.files.items() if b"a row of the data" in content]
    card = commit.files["README.md"].decode()
    assert "datasets:\n- org/pairs\n" in card
    assert "tags:\n- reward-trainer\n- rayrm\n- mine\n" in card
    assert (run / "README.md").read_bytes() == before
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert not list(run.glob(".push-*"))


def test_without_a_name_it_is_called_as_the_directory(hub: HubServer, run: Path) -> None:
    assert of(run).create() == f"me/{run.name}"
    assert "visibility" not in hub.created[0]
    assert hub.branches == []


def test_what_the_hub_refuses_says_what_to_type(hub: HubServer, run: Path) -> None:
    repository = of(run)
    hub.refuses, hub.says = 403, f"{TOKEN} may not write to https://me:{TOKEN}@hub.invalid"
    with pytest.raises(
        RayrmError, match=rf"could not be pushed to me/{run.name}.*may not write.*`hf upload me/{run.name} "
    ) as error:
        repository.push(run, "End of training")
    assert TOKEN not in str(error.value)
    with pytest.raises(RayrmError, match="`hf upload"):
        repository.push(run, "End of training", blocking=False).result()
    with pytest.raises(ConfigError, match=r"`dataset` is nothing .*dataset_name"):
        repository.push(run, "End of training", card={"dataset": "x"})
    assert not list(run.glob(".push-*"))
    with pytest.raises(ConfigError, match=r"`hub_model_id` \('a/b/c'\) cannot be pushed to: .*hf auth login"):
        of(run, hub_model_id="a/b/c").create()


def uploaded_by(command: str, directory: Path) -> set[str]:
    """What of the directory the command line of the hub would upload."""
    words = shlex.split(command)
    assert words[:2] == ["hf", "upload"]
    assert words[3] == str(directory)
    wanted = [after for word, after in itertools.pairwise(words) if word == "--include"]
    there = [str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()]
    return set(filter_repo_objects(there, allow_patterns=wanted))


@pytest.mark.parametrize("sharded", [False, True])
def test_what_a_refused_push_says_to_type_uploads_the_models_files_alone(
    hub: HubServer, run: Path, sharded: bool
) -> None:
    if sharded:
        (run / "model.safetensors").rename(run / "model-00001-of-00002.safetensors")
        for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
            (run / name).write_text("{}")
    (run / "checkpoint-3" / "model-00001-of-00002.safetensors").write_text("a row of the data")
    repository = of(run, hub_revision="second")
    pushed = repository.push(run, "End of training") and set(hub.commits[0].files)
    hub.refuses = 403
    with pytest.raises(RayrmError) as error:
        repository.push(run, "End of training")
    (command,) = re.findall(r"`(hf upload [^`]*)`", str(error.value))
    assert " --revision second " in command
    assert uploaded_by(command, run) == pushed
    assert "run.toml" not in pushed


def test_on_the_hub_a_card_names_the_repository(hub: HubServer, run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    save_model(tiny_model(), tiny_tokenizer(), checkpoint, text_form="conversational")
    repository = of(run, hub_model_id="org/reward")
    repository.push_beside(checkpoint)
    repository.close()
    repository.push(run, "End of training")
    for commit in hub.commits:
        card = commit.files["README.md"].decode()
        assert card.count('from_pretrained("org/reward"') == 2
        assert "\n# org/reward\n" in card
        assert run.name not in card
    assert len(hub.commits) == 2
    assert f'from_pretrained("{run.name}"' in (run / "README.md").read_text()


def test_a_models_own_code_is_pushed_and_a_script_beside_it_is_not(hub: HubServer, run: Path) -> None:
    (run / "modeling_mine.py").write_text("class Mine: ...")
    repository = of(run)
    repository.push(run, "without")
    config = json.loads((run / "config.json").read_text())
    mapped = {"AutoModelForSequenceClassification": "modeling_mine.Mine"}
    (run / "config.json").write_text(json.dumps({**config, "auto_map": mapped}))
    repository.push(run, "with")
    assert ["modeling_mine.py" in commit.files for commit in hub.commits] == [False, True]


def test_a_checkpoint_that_cannot_be_pushed_leaves_no_copy(
    hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tiny_model(), tiny_tokenizer(), run / "checkpoint-3", text_form="conversational")
    repository = of(run, hub_model_id="a/b/c")
    repository.push_beside(run / "checkpoint-3")
    repository.close()
    assert "`hub_model_id` ('a/b/c') cannot be pushed to" in caplog.text
    assert "could not be pushed" not in caplog.text
    assert not list(run.glob(".push-*"))
    nowhere = HubRepository(RewardConfig(str(run), hub_token=TOKEN), run / "gone")
    nowhere.push_beside(run / "checkpoint-3")
    assert "was not pushed, since its files could not be copied aside" in caplog.text
    with pytest.raises(RayrmError, match="could not be copied aside"):
        HubRepository(RewardConfig(str(run), hub_token=TOKEN), run / "gone").push(run, "End of training")


def test_a_checkpoint_is_pushed_beside_unless_one_is_on_its_way(
    hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = run / "checkpoint-3"
    save_model(tiny_model(seed=3), tiny_tokenizer(), checkpoint, text_form="conversational")
    repository = of(run)
    hub.holds = threading.Event()
    with caplog.at_level(logging.INFO, "rayrm.train"):
        repository.push_beside(checkpoint)
        repository.push_beside(checkpoint)
        assert "checkpoint-3 is not pushed: the one before is still on its way" in caplog.text
        hub.holds.set()
        repository.close()
        assert [commit.message for commit in hub.commits] == ["Training in progress, step 3"]
        assert hub.commits[0].files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
        hub.refuses, hub.says = 403, f"no {TOKEN}"
        repository.push_beside(checkpoint)
        repository.close()
    assert "could not be pushed" in caplog.text
    assert TOKEN not in caplog.text


def test_no_failure_of_a_push_beside_ends_the_run_and_none_keeps_it_waiting(
    hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = run / "checkpoint-3"
    save_model(tiny_model(seed=3), tiny_tokenizer(), checkpoint, text_form="conversational")
    repository = of(run)
    hub.refuses = 200  # an answer without what the library looks for in it
    repository.push_beside(checkpoint)
    repository.close()
    assert "checkpoint-3 was not pushed, and the run goes on: KeyError" in caplog.text
    caplog.clear()
    of_none = of(run, hub_model_id="a/b/c")
    of_none.push_beside(checkpoint)
    of_none.close()
    assert "checkpoint-3 was not pushed, and the run goes on: `hub_model_id` ('a/b/c')" in caplog.text
    assert not list(run.glob(".push-*"))
    hub.refuses, hub.holds = None, threading.Event()
    repository.push_beside(checkpoint)
    began = time.monotonic()
    repository.close(patience_s=0.2)
    assert time.monotonic() - began < 30
    assert f"the upload to me/{run.name} has not ended in 0 s and is left" in caplog.text
    hub.holds.set()
    repository.close()
    assert [commit.message for commit in hub.commits] == ["Training in progress, step 3"]


def test_a_token_is_in_no_file_and_no_words() -> None:
    config = RewardConfig("x", push_to_hub=True, hub_token=TOKEN)
    assert TOKEN not in repr(config)
    assert TOKEN not in dump_run(Run(ModelConfig("m"), DataConfig("d"), config))
    assert TOKEN not in str(identity_of(config, model="m", adapter=None, data="d", rows_per_step=8))


@pytest.mark.parametrize("key", ["token", "use_auth_token"])
def test_nor_is_one_among_the_arguments_of_loading_which_another_start_may_have_changed(key: str) -> None:
    def told(config: RewardConfig) -> tuple[str, dict[str, Any]]:
        identity = identity_of(config, model="m", adapter=None, data="d", rows_per_step=8)
        return dump_run(Run(ModelConfig("m"), DataConfig("d"), config)), identity

    kept = {"revision": "v2", "attn_implementation": "sdpa"}
    with_token = RewardConfig("x", model_init_kwargs={**kept, key: TOKEN})
    assert told(with_token) == told(RewardConfig("x", model_init_kwargs=kept))
    alone = RewardConfig("x", model_init_kwargs={key: TOKEN})
    assert told(alone)[1] == told(RewardConfig("x"))[1]
    shown = CallbackArgs(with_token, Rank(0, 1, torch.device("cpu")))
    assert TOKEN not in str([shown.to_dict(), shown.to_sanitized_dict()])
    assert with_token.model_init_kwargs == {**kept, key: TOKEN}  # what loads the model still has it
