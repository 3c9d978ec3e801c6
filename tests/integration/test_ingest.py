"""A source becomes a tokenized set: every row a pair or refused, in the data's own order, on real Ray."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrm.data import cuts
from rayrm.data.ingest import ingest
from rayrm.data.preference import parse_row
from rayrm.data.tokenize import TokenizedRow, tokenize_rows
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, DataError
from tests.tiny import tiny_rankings, tiny_rows, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TOKENIZER = tiny_tokenizer()
ROWS = tiny_rows(1100, margin=True)


def lines_of(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def expected(rows: list[dict[str, Any]], max_length: int | None = None) -> list[TokenizedRow]:
    outcomes = tokenize_rows(TOKENIZER, [parse_row(row) for row in rows], max_length)
    return [outcome for outcome in outcomes if isinstance(outcome, TokenizedRow)]


def assert_same_pairs(tokenized: TokenizedSet, pairs: list[TokenizedRow]) -> None:
    assert tokenized.num_rows == tokenized.report.num_accepted == len(pairs)
    assert tokenized.index.prefix_lengths.tolist() == [pair.prefix_length for pair in pairs]
    assert tokenized.index.lengths.tolist() == [length for pair in pairs for length in pair.lengths]
    assert tokenized.index.ranks.tolist() == [rank for pair in pairs for rank in pair.ranks]
    for fetched, pair in zip(tokenized.fetch(np.arange(len(pairs))), pairs, strict=True):
        assert fetched.ids.dtype == np.int32
        assert fetched.ids.tolist() == pair.ids.tolist()
        assert (fetched.lengths, fetched.ranks) == (pair.lengths, pair.ranks)
        assert (fetched.prefix_length, fetched.margin) == (pair.prefix_length, pair.margin)


def test_every_kind_of_source_gives_the_same_pairs_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(cuts, "BYTES_PER_PIECE", 2**16)  # the files are cut into several pieces
    for name in ("whole.jsonl", "whole.jsonl.gz", "cut/1.jsonl", "cut/2.jsonl.gz"):
        rows = {"cut/1.jsonl": ROWS[:300], "cut/2.jsonl.gz": ROWS[300:]}.get(name, ROWS)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(lines_of(rows)) if name[-1] == "z" else lines_of(rows))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "whole.parquet", row_group_size=150)
    fingerprints = []
    for source in (
        str(tmp_path / "whole.jsonl"),
        tmp_path / "whole.jsonl.gz",
        str(tmp_path / "whole.parquet"),
        str(tmp_path / "cut"),
        str(tmp_path / "cut" / "*.json*"),
        [str(tmp_path / "cut" / "1.jsonl"), str(tmp_path / "cut" / "2.jsonl.gz")],
        ROWS,
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        ray.data.from_items(ROWS, override_num_blocks=5),
        ray.data.from_items(ROWS, override_num_blocks=40).map(lambda row: row),
    ):
        tokenized = ingest(source, TOKENIZER, max_length=20)
        fingerprints.append(tokenized.report.fingerprint)
    assert_same_pairs(tokenized, expected(ROWS, 20))
    assert fingerprints == fingerprints[:1] * 11
    assert 0 < tokenized.num_rows < 1100
    assert tokenized.report.refused == {"too-long": 1100 - tokenized.num_rows}


def test_this_process_reads_what_tasks_read(tmp_path: Path) -> None:
    rows: list[Any] = [*tiny_rows(30), {"chosen": "no rejected"}, *tiny_rankings(9)]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines_of(rows))
    options: dict[str, Any] = {"max_length": 40, "max_bad_row_fraction": 0.1}
    tasks, this = (
        ingest(
            str(source), tiny_tokenizer(), here=here, quarantine_path=tmp_path / f"{here}.jsonl", **options
        )
        for here in (False, True)
    )
    assert this.report == tasks.report
    assert this.report.refused["missing-rejected"] == 1
    assert_same_pairs(this, tasks.fetch(range(tasks.num_rows)))
    assert this.labels().groups == tasks.labels().groups
    assert (tmp_path / "True.jsonl").read_text() == (tmp_path / "False.jsonl").read_text()
    with pytest.raises(DataError, match=r"1 of 40 rows .* were refused"):
        ingest(str(source), tiny_tokenizer(), here=True, max_length=40)


def test_the_order_is_the_datas_own_whatever_the_number_of_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines_of(ROWS)))
    pairs = expected(ROWS)
    for bytes_per_part in (2**30, 2**16, 2**10):
        monkeypatch.setattr(cuts, "BYTES_PER_COMPRESSED_PART", bytes_per_part)
        assert_same_pairs(ingest(str(tmp_path / "pairs.jsonl.gz"), TOKENIZER, max_length=None), pairs)


def test_columns_are_read_under_our_names_in_every_kind_of_source(tmp_path: Path) -> None:
    import ray

    theirs = {"chosen": "good", "rejected": "bad"}
    rows = [{theirs.get(name, name): value for name, value in row.items()} for row in ROWS[:50]]
    (tmp_path / "pairs.jsonl").write_bytes(lines_of(rows))
    for source in (str(tmp_path), rows, ray.data.from_items(rows, override_num_blocks=3)):
        tokenized = ingest(source, TOKENIZER, max_length=None, columns=theirs)
        assert_same_pairs(tokenized, expected(ROWS[:50]))


def test_max_rows_takes_the_first_rows_of_every_kind_of_source(tmp_path: Path) -> None:
    import ray

    (tmp_path / "pairs.jsonl").write_bytes(lines_of(ROWS))
    pairs = expected(ROWS[:70])
    for source in (str(tmp_path), ROWS, ray.data.from_items(ROWS, override_num_blocks=30)):
        assert_same_pairs(ingest(source, TOKENIZER, max_length=None, max_rows=70), pairs)


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("explicit_prompt", [False, True])
def test_each_text_form_is_ingested_and_reported(conversational: bool, explicit_prompt: bool) -> None:
    rows = tiny_rows(20, conversational=conversational, explicit_prompt=explicit_prompt)
    tokenized = ingest(rows, TOKENIZER, max_length=None)
    assert tokenized.report.text_form == ("conversational" if conversational else "standard")
    pairs = expected(rows)
    assert_same_pairs(tokenized, pairs)
    assert tokenized.report.num_tokens == sum(sum(p.lengths) for p in pairs)
    assert tokenized.report.num_shared_tokens == sum(p.prefix_length for p in pairs)


@pytest.mark.parametrize("conversational", [False, True])
def test_rankings_among_pairs_survive_arrow_in_their_place(tmp_path: Path, conversational: bool) -> None:
    import ray

    pairs = tiny_rows(60, margin=True, conversational=conversational)
    rankings = tiny_rankings(60, conversational=conversational)
    rankings[7]["ranks"] = [3] * len(rankings[7]["ranks"])
    rows = [row for both in zip(pairs, rankings, strict=True) for row in both]
    wanted = expected([row for row in rows if row is not rankings[7]])
    pq.write_table(pa.Table.from_pylist(rows, _mixed_schema(rows)), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_bytes(lines_of(rows))
    found = [
        ingest(source, TOKENIZER, max_length=None)
        for source in (str(tmp_path / "rows.parquet"), str(tmp_path / "rows.jsonl"), rows)
    ]
    table = ray.data.read_parquet(str(tmp_path / "rows.parquet"))
    found.append(ingest(table, TOKENIZER, max_length=None))
    for tokenized in found:
        assert_same_pairs(tokenized, wanted)
        assert tokenized.report.refused == {"all-tied": 1}
        assert tokenized.report.num_completions == sum(len(row.lengths) for row in wanted)
        assert tokenized.report.fingerprint == found[0].report.fingerprint


def _mixed_schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """Every column that some row has: Arrow fills the others with nulls."""
    return pa.unify_schemas([pa.Table.from_pylist(rows[place : place + 1]).schema for place in (0, 1)])


def test_rows_with_tools_survive_arrow(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
    rows: list[dict[str, Any]] = [{**row, "tools": None} for row in tiny_rows(6, conversational=True)]
    rows[3]["chosen"] = [call, {"role": "tool", "content": "3"}, *rows[3]["chosen"]]
    rows[3]["tools"] = '[{"name": "look"}]'
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    from_parquet, from_list = (
        ingest(source, TOKENIZER, max_length=None) for source in (str(tmp_path / "rows.parquet"), rows)
    )
    assert from_parquet.report.fingerprint == from_list.report.fingerprint
    assert from_parquet.num_rows == 6


def test_rows_tokenized_beforehand_are_taken_as_they_are() -> None:
    rows = [{"chosen_ids": [5, number + 1], "rejected_ids": [5, 0]} for number in range(9)]
    tokenized = ingest(rows, TOKENIZER, max_length=None)
    assert tokenized.report.text_form == "tokenized"
    assert [pair.sequences[0].tolist() for pair in tokenized.fetch([8, 0])] == [[5, 9], [5, 1]]


def test_refused_rows_are_counted_logged_and_kept_with_their_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, quarantine = tmp_path / "pairs.jsonl", tmp_path / "run" / "quarantine.jsonl"
    long = {"prompt": "cat " * 500, "chosen": "yes", "rejected": "no"}
    same = {"prompt": "cat", "chosen": "yes", "rejected": "yes"}
    bad = [b'{"prompt": "x", \n', lines_of([long]), lines_of([same]), b'{"chosen": "\xff"}\n', b'{"a": 1}\n']
    path.write_bytes(lines_of(ROWS[:50]) + b"".join(bad) + lines_of(ROWS[50:80]))
    with caplog.at_level(logging.INFO, logger="rayrm.data"):
        tokenized = ingest(
            str(path), TOKENIZER, max_length=64, quarantine_path=quarantine, max_bad_row_fraction=0.1
        )
    assert_same_pairs(tokenized, expected(ROWS[:80]))
    reasons = ["bad-json", "too-long", "identical", "not-utf8", "missing-chosen"]
    assert tokenized.report.refused == dict.fromkeys(reasons, 1)
    assert tokenized.report.num_rows == 85
    kept = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(entry["source"], entry["row"]) for entry in kept] == [(str(path), 50 + i) for i in range(5)]
    assert [entry["reason"] for entry in kept] == reasons
    for entry, line in zip(kept, range(51, 56), strict=True):
        assert entry["message"].startswith(f"{path}:{line}: ")
        assert entry["raw"] == path.read_bytes().splitlines()[line - 1].decode("utf-8", "replace")
    assert "85 rows, 80 kept" in caplog.text
    assert "not-utf8 1" in caplog.text


def test_the_quarantine_of_a_second_set_is_appended(tmp_path: Path) -> None:
    rows = [*ROWS[:9], {"rejected": "b" * 9000}]
    for name in ("train", "eval"):
        ingest(
            rows,
            TOKENIZER,
            max_length=None,
            quarantine_path=tmp_path / "q.jsonl",
            name=name,
            max_bad_row_fraction=0.5,
        )
    kept = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(entry["source"], entry["row"]) for entry in kept] == [("train", 9), ("eval", 9)]
    assert kept[0]["message"].startswith("train[9]: `chosen` is missing")
    assert len(kept[0]["raw"]) == 4096


def test_too_many_bad_rows_are_an_error_with_reasons_and_places(tmp_path: Path) -> None:
    rows = [*ROWS[:90], *[{"chosen": "x"}] * 3, {"chosen": "x", "rejected": "x"}]
    (tmp_path / "pairs.jsonl").write_bytes(lines_of(rows))
    with pytest.raises(DataError) as error:
        ingest(str(tmp_path / "pairs.jsonl"), TOKENIZER, max_length=None, quarantine_path=tmp_path / "q")
    said = str(error.value)
    assert "4 of 94 rows" in said
    assert "`max_bad_row_fraction` (0.01)" in said
    assert f"missing-rejected x 3, first: {tmp_path}/pairs.jsonl:91: " in said
    assert "identical x 1" in said
    assert len((tmp_path / "q").read_text().splitlines()) == 4
    assert ingest(rows, TOKENIZER, max_length=None, max_bad_row_fraction=4 / 94).num_rows == 90


def test_a_filtered_pair_is_not_held_against_the_source_unless_none_is_left() -> None:
    kept = ingest(ROWS[:60], TOKENIZER, max_length=20, max_bad_row_fraction=0.0)
    assert 0 < kept.num_rows < 30
    with pytest.raises(DataError, match=r"(?s)all 60 rows.*`max_length` allows 3"):
        ingest(ROWS[:60], TOKENIZER, max_length=3)


def test_a_source_that_mixes_text_forms_is_refused_with_a_row_of_each() -> None:
    rows = [*ROWS[:3], *tiny_rows(2, conversational=True)]
    with pytest.raises(DataError, match=r"train\[0\] is standard; train\[3\] is conversational"):
        ingest(rows, TOKENIZER, max_length=None)


def test_messages_without_a_chat_template_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="chat_template_path"):
        ingest(tiny_rows(3, conversational=True), tiny_tokenizer(chat=False), max_length=None)


def test_a_file_damaged_in_its_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines_of(ROWS))[:-300])
    with pytest.raises(DataError, match=r"pairs\.jsonl\.gz cannot be read"):
        ingest(str(tmp_path / "pairs.jsonl.gz"), TOKENIZER, max_length=None)


def test_missing_and_empty_sources_are_errors(tmp_path: Path) -> None:
    import ray

    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    for source in (str(tmp_path / "empty.jsonl"), ray.data.from_items([{"a": 1}]).limit(0)):
        with pytest.raises(DataError, match="no rows"):
            ingest(source, TOKENIZER, max_length=None)
    with pytest.raises(DataError, match="does not exist"):
        ingest(str(tmp_path / "nowhere.jsonl"), TOKENIZER, max_length=None)


def test_fetch_gives_any_rows_in_any_order_as_copies() -> None:
    tokenized, pairs = ingest(ROWS, TOKENIZER, max_length=None), expected(ROWS)
    wanted = np.random.default_rng(0).integers(0, 1100, 300)
    fetched = tokenized.fetch(wanted)
    assert [pair.ids.tolist() for pair in fetched] == [pairs[row].ids.tolist() for row in wanted]
    fetched[0].ids[:] = 0  # writable: no view of the object store
    assert tokenized.fetch(wanted[:1])[0].ids.tolist() == pairs[wanted[0]].ids.tolist()


def test_a_set_made_of_pairs_fetches_without_ray() -> None:
    script = """
import pickle, sys
import numpy as np
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.data.tokenize import TokenizedRow
pairs = [TokenizedRow(np.arange(i + 3, dtype=np.int32), 1, (2, i + 2), (0, 1), 0.5) for i in range(5)]
tokenized = pickle.loads(pickle.dumps(TokenizedSet.from_rows(pairs)))
assert tokenized.fetch([4, 0])[0].ids.tolist() == [0, 1, 2, 3, 4, 5, 6]
assert tokenized.index.lengths[1::2].tolist() == [2, 3, 4, 5, 6]
assert "ray" not in sys.modules, "fetching from memory imported ray"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    empty = TokenizedSet.from_rows([])
    assert (empty.num_rows, empty.fetch([])) == (0, [])


def test_train_workers_fetch_from_a_set_in_their_config(tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    tokenized = ingest(ROWS[:200], TOKENIZER, max_length=None)
    assert len(pickle.dumps(tokenized.index)) < 108 * tokenized.num_rows + 1000  # what RowIndex says it costs

    def work(config: dict[str, Any]) -> None:
        from ray import train

        rank = train.get_context().get_world_rank()
        rows = np.arange(rank, config["pairs"].num_rows, 2)
        sums = [int(pair.ids.sum()) for pair in config["pairs"].fetch(rows)]
        Path(config["directory"], f"rank-{rank}.json").write_text(json.dumps(sums))

    TorchTrainer(
        work,
        train_loop_config={"pairs": tokenized, "directory": str(tmp_path)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="fetch", storage_path=str(tmp_path / "runs")),
    ).fit()
    sums = [int(pair.ids.sum()) for pair in expected(ROWS[:200])]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == sums[rank::2]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real preference data is not at {SHARED}")
def test_real_preference_data_is_ingested_whole() -> None:
    path = SHARED / "val_permissive.jsonl.gz"
    with gzip.open(path) as stream:
        rows = [json.loads(line) for line in stream]
    tokenized = ingest(str(path), TOKENIZER, max_length=1024)
    assert tokenized.report.num_rows == 872
    assert tokenized.report.num_accepted + tokenized.report.refused["too-long"] == 872
    assert_same_pairs(tokenized, expected(rows, 1024))
