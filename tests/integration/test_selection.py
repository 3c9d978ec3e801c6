"""Selection and refusals on real Ray: parts of files, counts, and a bad source among good ones."""

from __future__ import annotations

import gzip
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm import DataConfig, RewardConfig, RewardTrainer
from rayrm.data import cuts
from rayrm.data.ingest import ingest
from rayrm.data.preference import parse_row
from rayrm.data.selection import Selection, excluded_prompts
from rayrm.data.sources import place_of
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, DataError
from rayrm.train.row_log import read_row_log
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

TOKENIZER = tiny_tokenizer()
# Three pairs of each of 200 prompts.
ROWS = [{**row, "chosen": f" yes {number}"} for number in range(3) for row in tiny_rows(200)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(rows: TokenizedSet) -> list[str]:
    """Each pair's two sides, as one string."""
    fetched = rows.fetch(np.arange(rows.num_rows))
    return ["|".join(TOKENIZER.decode(ids) for ids in row.sequences) for row in fetched]


def prompts(rows: TokenizedSet) -> set[str]:
    return {text.partition("?")[0] for text in texts(rows)}


def test_the_parts_of_two_orders_of_a_file_are_the_same_rows_and_share_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "BYTES_PER_PIECE", 2**13)  # several tasks
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    import ray

    given = [write(tmp_path / "rows.jsonl", ROWS), shuffled, ray.data.from_items(shuffled)]
    parts = [
        {
            part: ingest(one, TOKENIZER, max_length=None, selection=Selection(part, 0.2))
            for part in ("train", "eval")
        }
        for one in given
    ]
    found = [{part: sorted(texts(rows)) for part, rows in both.items()} for both in parts]
    assert found[1:] == found[:1] * 2
    assert sorted(found[0]["train"] + found[0]["eval"]) == sorted(
        texts(ingest(ROWS, TOKENIZER, max_length=None))
    )
    assert not prompts(parts[0]["train"]) & prompts(parts[0]["eval"])
    assert 20 < len(prompts(parts[0]["eval"])) < 60
    for rows in parts[0].values():
        assert rows.report.num_rows == 600
        assert rows.report.refused == {"held-out": 600 - rows.num_rows}


def test_the_trainer_splits_its_source_and_leaves_out_excluded_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    benchmark = write(tmp_path / "benchmark.jsonl", [{"prompt": ROWS[5]["prompt"].upper()}])
    data = DataConfig(write(tmp_path / "rows.jsonl", ROWS), eval_fraction=0.2, exclude_prompts_of=benchmark)
    with caplog.at_level(logging.INFO):
        trainer = RewardTrainer(
            tiny_model(),
            RewardConfig(str(tmp_path / "run"), eval_strategy="epoch", use_cpu=True, bf16=False),
            processing_class=TOKENIZER,
            data_config=data,
        )
    train, evaluation = trainer.train_set, trainer.eval_sets[""]
    assert not prompts(train) & prompts(evaluation)
    assert train.report.refused["held-out"] == evaluation.num_rows
    assert train.report.refused["excluded-prompt"] == 3
    assert train.num_rows + evaluation.num_rows + 3 == 600
    assert f"train: 600 rows, {train.num_rows} kept, {evaluation.num_rows} of the other part" in caplog.text
    assert "one of 1 prompts" in caplog.text
    selection = Selection("train", 0.2, excluded_prompts(benchmark))
    alone = ingest(ROWS, TOKENIZER, max_length=1024, selection=selection)
    assert alone.report.fingerprint == train.report.fingerprint
    assert alone.report.fingerprint != ingest(ROWS, TOKENIZER, max_length=1024).report.fingerprint


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_a_split_of_the_first_rows_leaves_all_held_out_prompts_out_of_training(
    tmp_path: Path, mode: Any
) -> None:
    """A stream's evaluation set is known before training: of its first rows, and of no other."""
    source = write(tmp_path / "rows.jsonl", ROWS)
    config = RewardConfig(
        str(tmp_path / mode), max_steps=len(ROWS) // 8, per_device_train_batch_size=8, max_length=200,
        log_rows=True, use_cpu=True, bf16=False, save_strategy="no", eval_strategy="steps", eval_steps=50,
        gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        tiny_model(),
        config,
        processing_class=TOKENIZER,
        data_config=DataConfig(source, eval_fraction=0.3, max_eval_pairs=200, mode=mode),
    )
    whole = Selection("eval", 0.3)
    held_out = [number for number, row in enumerate(ROWS) if whole.reason(parse_row(row)) is None]
    (evaluation,) = trainer.eval_sets.values()
    evaluated = [row.place[1] for row in evaluation.fetch(range(evaluation.num_rows))]
    assert evaluated == [number for number in held_out if number < 200]
    trainer.train()
    assert any("eval_accuracy" in record for record in trainer.state.log_history)
    trained = {place_of(name)[1] for line in read_row_log(tmp_path / mode) for name in line["rows"]}
    assert trained
    assert not trained & set(held_out)


def test_a_split_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    tokenized = ingest(ROWS[:20], TOKENIZER, max_length=None)
    for given, named in (
        ({"train_dataset": ROWS, "eval_dataset": ROWS}, "eval_dataset"),
        ({"train_dataset": tokenized}, "TokenizedSet"),
    ):
        with pytest.raises(ConfigError, match=named):
            RewardTrainer(
                tiny_model(),
                RewardConfig(str(tmp_path / "run"), use_cpu=True, bf16=False),
                processing_class=TOKENIZER,
                data_config=DataConfig(eval_fraction=0.1),
                **given,
            )


def test_one_bad_source_among_good_ones_ends_the_reading_before_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [write(tmp_path / f"good-{number}.jsonl", ROWS) for number in range(3)]
    many = tmp_path / "bad.jsonl.gz"
    lines = [json.dumps(ROWS[number % 600]) if number % 4 else "{" for number in range(80_000)]
    many.write_bytes(gzip.compress("\n".join(lines).encode(), 1))
    with pytest.raises(DataError) as error:
        ingest([*good, str(many)], TOKENIZER, max_length=None, quarantine_path=tmp_path / "q.jsonl")
    said = str(error.value)
    assert f"rows read so far of {many} (25" in said
    assert "bad-json x " in said
    assert f"{many}:1: " in said
    assert str(tmp_path / "q.jsonl") in said
    num_kept = len((tmp_path / "q.jsonl").read_text().splitlines())
    assert 10 < num_kept < 10_000
    # Ray is free for other work at once.
    assert ingest(ROWS[:9], TOKENIZER, max_length=None).num_rows == 9


def test_a_small_bad_source_is_judged_at_the_end_by_its_own_rows(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", ROWS * 3)
    bad = write(tmp_path / "bad.jsonl", [*ROWS[:97], *[{"chosen": "x"}] * 3])
    with pytest.raises(DataError, match=r"3 of 100 rows of .*bad\.jsonl \(3\.0%\)"):
        ingest([good, bad], TOKENIZER, max_length=None)
    kept = ingest(str(tmp_path / "*.jsonl"), TOKENIZER, max_length=None)
    assert kept.report.refused == {"missing-rejected": 3}
