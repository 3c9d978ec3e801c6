"""What a script overrides or sets on a trainer takes effect, or is refused with what stands for it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from ray.train import ScalingConfig
from transformers import Trainer, TrainerCallback

from rayrm import RewardConfig, RewardTrainer
from rayrm.data.labels import ANY_LABELS
from rayrm.data.preference import parse_row
from rayrm.data.tokenize import TokenizedRow, tokenize_rows
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError
from rayrm.train.given import check_types
from rayrm.train.script_words import Rows, check_overrides
from tests.tiny import tiny_model, tiny_rankings, tiny_rows, tiny_tokenizer


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("compute_loss", "`center_rewards_coefficient`, `label_smoothing`"),
        ("training_step", "use a callback"),
        ("prediction_step", "`compute_metrics`"),
        ("get_train_dataloader", "the rows are `train_dataset`"),
        ("create_optimizer", "pass `optimizers` or `optimizer_cls_and_kwargs`"),
        ("log", "callbacks have `on_log`"),
        ("_save_checkpoint", "`on_save`"),
        ("_prepare_dataset", "change the data before"),
        ("floating_point_ops", "RewardTrainer has no `floating_point_ops`[.]"),
    ],
)
def test_a_class_that_overrides_what_is_never_called_is_refused_when_it_is_made(
    name: str, instead: str
) -> None:
    with pytest.raises(ConfigError, match=f"class Mine: its `{name}` would never be called.*{instead}"):
        type("Mine", (RewardTrainer,), {name: lambda self: None})
    mixin = type("Mixin", (), {name: lambda self: None})
    with pytest.raises(ConfigError, match=f"`{name}` would never be called"):
        type("Mine", (mixin, RewardTrainer), {})


def test_every_method_of_transformers_trainer_that_is_not_ours_is_refused() -> None:
    theirs = [name for name in dir(Trainer) if callable(getattr(Trainer, name)) and not hasattr(object, name)]
    refused = []
    for name in theirs:
        try:
            type("Mine", (RewardTrainer,), {name: lambda self: None})
        except ConfigError:
            refused.append(name)
    assert len(refused) > 60
    assert set(theirs) - set(refused) == {
        "add_callback", "end", "evaluate", "is_local_process_zero", "is_world_process_zero", "log_metrics",
        "pop_callback", "predict", "push_to_hub", "remove_callback", "save_metrics", "save_model",
        "save_state", "train",
    }  # fmt: skip


class Mine(RewardTrainer):
    """What takes effect: methods that scripts call, and names of one's own."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return super().predict(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return super().evaluate(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        super().save_model(*args, **kwargs)

    def my_report(self) -> None:
        pass


def test_what_trl_calls_while_it_trains_may_be_overridden_where_training_has_none_of_it() -> None:
    silent = RewardConfig(save_strategy="no")
    check_overrides(Mine, RewardTrainer, silent)
    check_overrides(RewardTrainer, RewardTrainer, RewardConfig(eval_strategy="steps"))
    with pytest.raises(ConfigError, match=r"Mine.save_model would not be called during training.*`on_save`"):
        check_overrides(Mine, RewardTrainer, RewardConfig())
    for evaluates in ({"eval_strategy": "steps"}, {"eval_on_start": True}):
        config = RewardConfig(save_strategy="no", **evaluates)
        with pytest.raises(ConfigError, match=r"Mine.evaluate would not be called .*`compute_metrics`"):
            check_overrides(Mine, RewardTrainer, config)
    # By the constructor, before anything is read.
    with pytest.raises(ConfigError, match=r"Mine.save_model would not be called"):
        Mine(tiny_model(), RewardConfig(), train_dataset=tiny_rows(4), processing_class=tiny_tokenizer())


def test_what_nothing_would_read_cannot_be_set_on_a_trainer() -> None:
    trainer = RewardTrainer.__new__(RewardTrainer)
    for name in ("compute_loss", "compute_metrics", "data_collator", "optimizer", "get_train_dataloader"):
        with pytest.raises(
            AttributeError, match=f"nothing would read `{name}`: RewardTrainer has no `{name}`"
        ):
            setattr(trainer, name, lambda: None)
    trainer.my_own = 3  # type: ignore[attr-defined]
    assert trainer.my_own == 3  # type: ignore[attr-defined]


def test_a_launcher_of_several_processes_is_refused_with_what_to_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"`WORLD_SIZE` is 4.*ScalingConfig\(num_workers=4, use_gpu=True\)"):
        check_types("m", None, None)
    check_types("m", None, ScalingConfig(num_workers=2))
    with pytest.raises(ConfigError, match="`WORLD_SIZE` is 4"):
        RewardTrainer(tiny_model(), train_dataset=tiny_rows(4), processing_class=tiny_tokenizer())
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_types("m", None, None)


class Locked(TrainerCallback):
    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_a_callback_that_is_added_must_cross_to_workers() -> None:
    trainer = RewardTrainer.__new__(RewardTrainer)
    trainer._callbacks, trainer.num_workers = [], 0
    trainer.add_callback(Locked)
    trainer.num_workers = 2
    with pytest.raises(ConfigError, match=r"`callback` \(Locked\) cannot be sent to workers"):
        trainer.add_callback(Locked)
    assert len(trainer._callbacks) == 1


def rows_of(*parsed: dict[str, Any]) -> Rows:
    rows = tokenize_rows(tiny_tokenizer(), [parse_row(row, ANY_LABELS) for row in parsed], 512)
    assert all(isinstance(row, TokenizedRow) for row in rows)
    return Rows(TokenizedSet.from_rows([row for row in rows if isinstance(row, TokenizedRow)]))


def test_tokenized_rows_are_indexed_as_a_dataset_is() -> None:
    rows = rows_of(*tiny_rows(6, margin=True))
    same = Dataset.from_list(list(rows))
    assert rows.column_names == same.column_names == ["chosen_ids", "rejected_ids", "margin"]
    assert rows.features == same.features
    assert (rows.num_rows, rows.num_columns, rows.shape) == (6, 3, (6, 3))
    for name in rows.column_names:
        assert rows[name] == list(same[name])
    assert any(rows["margin"])
    assert rows[1:4] == same[1:4]
    assert rows[::-2] == same[::-2]
    assert rows[[4, 0]] == rows[np.array([4, 0])] == same[[4, 0]]
    assert rows[-1] == rows[np.int64(5)] == same[-1]
    with pytest.raises(IndexError, match="row 6 of 6"):
        _ = rows[6]
    with pytest.raises(KeyError, match=r"no column `chosen` .* chosen_ids, rejected_ids, margin"):
        _ = rows["chosen"]
    with pytest.raises(AttributeError, match=r"no `map`: .*Dataset.from_list\(list\(rows\)\)"):
        _ = rows.map


def test_rows_of_several_kinds_have_the_columns_of_all() -> None:
    scored = {"prompt": "a b", "completion": "c d", "score": 0.5}
    rows = rows_of(tiny_rows(1)[0], tiny_rankings(1)[0], scored)
    assert rows.column_names == ["chosen_ids", "rejected_ids", "completion_ids", "scores", "ranks"]
    assert [row["scores"] for row in rows] == [None, None, [0.5]]
    assert [row["ranks"] is None for row in rows] == [True, False, True]
    assert rows["chosen_ids"][0]
    assert rows["chosen_ids"][1:] == [None, None]
    assert Rows(TokenizedSet.from_rows([])).column_names == []
