"""Sources of several weights, limits and column names, trained on: each row as often as it weighs."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rayrm import DataConfig, RewardConfig, RewardTrainer, SourceConfig
from rayrm.errors import ConfigError
from rayrm.train.row_log import read_row_log
from tests.tiny import save_tiny, tiny_rows, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def sources(tmp_path: Path) -> list[str | SourceConfig]:
    """12 rows twice, of two files; 20 rows half, in columns of other names; the first 8 of a file once."""
    rows = tiny_rows(60)
    named = [{"good": row["chosen"], "bad": row["rejected"]} for row in rows[12:32]]
    for name, part in (("a/1", rows[:5]), ("a/2", rows[5:12]), ("b", named), ("c", rows[32:])):
        (tmp_path / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [
        SourceConfig(str(tmp_path / "a"), name="twice", weight=2),
        SourceConfig(
            str(tmp_path / "b.jsonl"),
            name="half",
            weight=0.5,
            columns={"chosen": "good", "rejected": "bad"},
        ),
        SourceConfig(str(tmp_path / "c.jsonl"), max_pairs=8),
    ]


def trained(directory: Path, data: DataConfig, **changes: Any) -> list[Counter[str]]:
    """How often two epochs of a run showed each row, by epoch."""
    config = RewardConfig(
        str(directory / "run"),
        per_device_train_batch_size=6,
        max_steps=18,  # an epoch is 24 + 8 rows and some of 20, so that these are two
        log_rows=True,
        **{"bf16": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **changes},
    )
    base = str(save_tiny(directory / "base"))
    RewardTrainer(base, config, data_config=data, processing_class=tiny_tokenizer()).train()
    seen: list[Counter[str]] = [Counter(), Counter()]
    for line in read_row_log(directory / "run"):
        if line["epoch"] < 2:
            seen[line["epoch"]].update(line["rows"])
    return seen


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_an_epoch_of_training_shows_each_row_as_often_as_its_source_weighs(
    mode: Any, shuffle: bool, sources: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("rayrm").propagate = True
    with caplog.at_level(logging.INFO, "rayrm"):
        epochs = trained(tmp_path, DataConfig(sources, mode=mode), shuffle=shuffle)
    if mode == "indexed":
        assert "  an epoch shows 24 of twice's 12 rows" in caplog.messages
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("a/1", "a/2", "b", "c")}
    expected = {f"{files['a/1']}:{n}": 4 for n in range(1, 6)} | {
        f"{files['a/2']}:{n}": 4 for n in range(1, 8)
    }
    expected |= {f"{files['b']}:{n}": 1 for n in range(1, 21)}  # each row in one of the two epochs
    expected |= {f"{files['c']}:{n}": 2 for n in range(1, 9)}
    assert epochs[0] + epochs[1] == expected
    assert {row: 2 * count for row, count in epochs[0].items() if row.startswith(files["c"])} == {
        row: count for row, count in expected.items() if row.startswith(files["c"])
    }
    if mode == "indexed":
        assert [epoch.total() for epoch in epochs] == [42, 42]


def test_a_column_of_no_field_is_refused_before_training(sources: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean `chosen`"):
        trained(tmp_path, DataConfig(sources, columns={"choosen": "good"}))
