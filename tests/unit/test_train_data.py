"""How a training set is read: which mode, why, and what a stream cannot be asked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import ray

from rayrm import DataConfig, RewardConfig, RewardTrainer
from rayrm.config import ModelConfig
from rayrm.errors import ConfigError, DataError
from rayrm.runfile import Run
from rayrm.train import train_data
from rayrm.train.launch import train_run
from rayrm.train.train_data import choose_mode
from tests.tiny import save_tiny, tiny_rows, write_rows


def config(**settings: Any) -> RewardConfig:
    return RewardConfig("run", **settings)


def test_a_set_that_fits_is_indexed_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with caplog.at_level(logging.INFO, "rayrm.train"):
        assert choose_mode(DataConfig(), str(tmp_path / "a.jsonl"), config(max_steps=5)) == "indexed"
    assert "data.mode: indexed, since the set fits an index" in caplog.text


def test_a_large_source_is_streamed_where_the_number_of_steps_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_data, "LARGE_BYTES", 100)
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("x" * 60)
    with caplog.at_level(logging.INFO, "rayrm.train"):
        assert choose_mode(DataConfig(), str(tmp_path), config(max_steps=5)) == "streaming"
        assert choose_mode(DataConfig(), str(tmp_path / "*.jsonl"), config(max_steps=5)) == "streaming"
        assert choose_mode(DataConfig(), [str(tmp_path / "[12].jsonl")], config(max_steps=5)) == "streaming"
        assert choose_mode(DataConfig(), str(tmp_path), config()) == "indexed"
    assert "streaming, since the source is large" in caplog.text
    assert "indexed, since `max_steps` is not set" in caplog.text


def test_an_iterable_dataset_is_streamed_where_the_number_of_steps_is_known() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}]).to_iterable_dataset()
    assert choose_mode(DataConfig(), rows, config(max_steps=5)) == "streaming"
    assert choose_mode(DataConfig(), rows, config()) == "indexed"
    assert choose_mode(DataConfig(mode="indexed"), rows, config(max_steps=5)) == "indexed"


@pytest.mark.parametrize(
    ("settings", "data", "said"),
    [
        ({}, {}, "`max_steps` (-1): a stream has no known length"),
        ({"max_steps": 5, "max_length": None}, {}, "`max_length` (None)"),
        ({"max_steps": 5, "save_strategy": "epoch"}, {}, '`save_strategy` ("epoch")'),
        ({"max_steps": 5, "logging_strategy": "epoch"}, {}, '`logging_strategy` ("epoch")'),
        ({"max_steps": 5}, {"eval_fraction": 0.1}, "`data.eval_fraction` (0.1)"),
    ],
)
def test_what_a_stream_cannot_be_asked_is_refused_by_name(
    settings: dict[str, Any], data: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_mode(DataConfig(mode="streaming", **data), "a.jsonl", config(**settings))
    assert said in str(refused.value)
    assert "Type `" in str(refused.value)


@pytest.mark.parametrize("missing", ["train", "eval"])
def test_a_file_that_is_not_there_is_told_before_ray_starts(tmp_path: Path, missing: str) -> None:
    """Whatever lies after it: of the two sets the other one would be tokenized first, on a Ray of its own."""
    started = ray.is_initialized()
    model = save_tiny(tmp_path / "model")
    rows = str(write_rows(tmp_path / "rows.jsonl", tiny_rows(4)))
    places = {"train": rows, "eval": rows} | {missing: str(tmp_path / "none.jsonl")}
    data = DataConfig(train=places["train"], eval={"held-out": places["eval"]})
    run = Run(ModelConfig(str(model)), data, RewardConfig(str(tmp_path / "run")))
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        train_run(run)
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        RewardTrainer(str(model), run.reward, data_config=run.data)
    assert ray.is_initialized() == started
