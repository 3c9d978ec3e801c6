"""Groups of ranks that compute rows together: what they ask of workers and models, and what each computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrm import RewardConfig, RewardTrainer
from rayrm.data.packing import PackedBatch, pack_rows, padded_to
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError
from rayrm.model.attention import attention_of, dense_mask
from rayrm.model.forward import DeviceBatch, to_device
from rayrm.model.layout import Layout, choose_layout
from rayrm.model.sequence import Attend, SequencePart
from rayrm.train.budget import Demand
from rayrm.train.sequence import check_heads, check_layout, check_workers
from rayrm.train.step import computed_tokens
from rayrm.train.zero_config import deepspeed_config
from tests.numerics.ranks import tokenized
from tests.tiny import save_tiny, tiny_llama_config, tiny_model

CPU = torch.device("cpu")


def config_of(size: int, **settings: Any) -> RewardConfig:
    return RewardConfig(sequence_parallel_size=size, **settings)


def batch_of(num_rows: int) -> PackedBatch:
    return pack_rows(tokenized(num_rows), 0)


def no_exchange(query: Any, key: Any, value: Any, positions: Any, attend: Attend) -> torch.Tensor:
    raise AssertionError("no attention is computed here")


def part_of(batch: PackedBatch, place: int, size: int) -> DeviceBatch:
    part = SequencePart(place, size, None, no_exchange)  # type: ignore[arg-type]
    return to_device(batch, CPU, "loop", part)


@pytest.mark.parametrize(
    ("size", "workers", "typed"),
    [(2, 0, 2), (2, 1, 2), (2, 3, 2), (4, 6, 4), (4, 2, 4)],
)
def test_workers_that_make_no_whole_groups_are_refused_with_a_number_that_does(
    size: int, workers: int, typed: int
) -> None:
    have = rf"the number of workers \({workers}\)" if workers else "the workers, and this process is one"
    said = rf"`sequence_parallel_size` \({size}\) must divide {have}"
    with pytest.raises(ConfigError, match=rf"{said}.*`cluster\.num_workers={typed}`"):
        check_workers(config_of(size), workers)
    check_workers(config_of(size), typed)
    check_workers(config_of(1), workers)


def test_the_trainer_refuses_workers_and_heads_before_it_starts_one(tmp_path: Path) -> None:
    rows = TokenizedSet.from_rows(tokenized(8))

    def trainer(size: int, workers: int) -> RewardTrainer:
        from ray.train import ScalingConfig

        args = config_of(size, output_dir=str(tmp_path / "run"))
        model = str(save_tiny(tmp_path / "model"))
        return RewardTrainer(
            model, args, train_dataset=rows, scaling_config=ScalingConfig(num_workers=workers)
        )

    with pytest.raises(ConfigError, match=r"must divide the number of workers \(3\)"):
        trainer(2, 3)
    with pytest.raises(ConfigError, match=r"\(3\): the model's 4 heads of attention, over 2 .*be 1, 2, 4\."):
        trainer(3, 3)


@pytest.mark.parametrize(
    ("shape", "size", "fits"),
    [
        ({}, 2, True),
        ({}, 4, True),  # each of two keys' heads on two workers
        ({}, 3, False),
        ({}, 8, False),
        ({"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48}, 4, False),
        ({"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48}, 6, True),
        ({"num_key_value_heads": 1}, 4, True),
    ],
)
def test_heads_that_cannot_be_dealt_evenly_are_refused(shape: dict[str, Any], size: int, fits: bool) -> None:
    model = tiny_llama_config(**shape)
    if fits:
        check_heads(model, config_of(size))
        return
    with pytest.raises(ConfigError, match=rf"`sequence_parallel_size` \({size}\): the model's"):
        check_heads(model, config_of(size))
    check_heads(model, config_of(1))


def test_rows_that_are_padded_are_refused_with_the_reason() -> None:
    layout = Layout("padded", "a sliding window (64) shorter than the longest row (100)")
    with pytest.raises(ConfigError, match=r"are padded: a sliding window \(64\).*`sequence_parallel_size=1`"):
        check_layout(layout, config_of(2))
    check_layout(layout, config_of(1))
    check_layout(choose_layout(tiny_model()), config_of(2))


def test_a_group_takes_the_rows_of_one_worker() -> None:
    config = config_of(2, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert [config.train_batch_rows(workers) for workers in (0, 2, 4, 8)] == [6, 6, 12, 24]


def test_deepspeed_is_not_told_of_groups_which_would_average_over_fewer_ranks() -> None:
    config = config_of(2, deepspeed={"sequence_parallel_size": 2, "data_parallel_size": 2})
    assert not {"sequence_parallel_size", "data_parallel_size"} & set(deepspeed_config(config, "fp32", 4))


@pytest.mark.parametrize("size", [2, 3, 4, 64])
def test_the_parts_are_neighbouring_tokens_and_together_the_batch(size: int) -> None:
    batch = batch_of(3)
    parts = [part_of(batch, place, size) for place in range(size)]
    assert {part.ids.shape for part in parts} == {(1, computed_tokens(batch, padded=False, parts=size))}
    ids, positions = (torch.cat([getattr(p, name)[0] for p in parts]) for name in ("ids", "positions"))
    assert ids[: batch.num_tokens].tolist() == batch.ids.tolist()
    assert positions[: batch.num_tokens].tolist() == batch.positions.tolist()
    assert len(ids) - batch.num_tokens < size
    # Each score is read by one rank, at its own token.
    mine = torch.stack([part.mine for part in parts if part.mine is not None])
    assert mine.sum(dim=0).tolist() == [1] * batch.num_scores
    for score, token in enumerate(batch.pooled.tolist()):
        holder = int(mine[:, score].int().argmax())
        assert holder * len(ids) // size + int(parts[holder].pooled[score]) == token


def test_a_segment_that_fills_up_is_seen_by_no_other_and_sees_none() -> None:
    batch = batch_of(3)
    longer = padded_to(batch, batch.num_tokens - 1)
    seen = dense_mask(longer)
    assert longer.num_tokens == 2 * (batch.num_tokens - 1)
    assert np.array_equal(seen[: batch.num_tokens, : batch.num_tokens], dense_mask(batch))
    assert not seen[batch.num_tokens :, : batch.num_tokens].any()
    assert not seen[: batch.num_tokens, batch.num_tokens :].any()
    assert padded_to(batch, batch.num_tokens) is batch
    query = torch.randn(1, 2, longer.num_tokens, 8, generator=torch.Generator().manual_seed(0))
    attended = attention_of(longer, "tiled", CPU).attend(query, query, query, None)
    alone = query[:, :, : batch.num_tokens]
    torch.testing.assert_close(
        attended[:, :, : batch.num_tokens],
        attention_of(batch, "tiled", CPU).attend(alone, alone, alone, None),
    )


def test_a_rank_is_asked_for_its_part_of_the_longest_row_and_of_a_step() -> None:
    index = TokenizedSet.from_rows(tokenized(16)).index
    whole, half = (Demand.of(index, "shared", rows_per_rank=4, num_ranks=2, parts=parts) for parts in (1, 2))
    assert half.longest == -(-whole.longest // 2)
    assert half.most_tokens == -(-whole.most_tokens // 2)
    # As many scores as in twice the tokens.
    assert half.most_scores(20) == pytest.approx(whole.most_scores(40), rel=0.05)
