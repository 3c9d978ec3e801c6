"""Bulk scoring in this process: cut off anywhere, gone on with, refused where it is another's."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, DataError, RunDirectoryError, ScoreError
from rayrm.evaluation import bulk_score
from rayrm.evaluation.best_of import Selection
from rayrm.evaluation.bulk_score import BulkSummary, ScoreSettings, score_files
from rayrm.evaluation.score_ledger import Entry, ScoreLedger, open_ledger, partial_of
from tests.tiny import write_rows


class Cut(BaseException):
    """Stands for a kill: nothing catches it."""


def length(inputs: list[TextInput]) -> list[float]:
    if any(entry.completion == "bad" for entry in inputs):
        raise ScoreError("this word is refused")
    return [len(entry.completion) + 0.1 for entry in inputs]


@pytest.fixture
def scored_texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The model is a function of lengths; how many texts each of its calls had."""
    calls: list[int] = []

    def load(settings: ScoreSettings) -> Callable[[list[TextInput]], list[float]]:
        def score(inputs: list[TextInput]) -> list[float]:
            calls.append(len(inputs))
            return length(inputs)

        return score

    monkeypatch.setattr(ScoreSettings, "load", load)
    monkeypatch.setattr(bulk_score, "content_version", lambda model: f"version of {model}")
    return calls


def rows_with(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": n, "completion": "x" * (n % 11 + 1)} for n in range(start, start + count)]


def read(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def cut_after(num_chunks: int) -> Callable[[int, int], None]:
    told = [0]

    def on_progress(done: int, before: int) -> None:
        told[0] += done > before
        if told[0] == num_chunks:
            raise Cut

    return on_progress


def test_what_was_cut_off_goes_on_and_has_every_row_once_in_order(
    tmp_path: Path, scored_texts: list[int]
) -> None:
    rows = rows_with(2600)
    for part in range(3):
        write_rows(tmp_path / f"in-{part}.jsonl", rows[part * 1000 : (part + 1) * 1000])
    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    sources, settings = [str(tmp_path / "in-*.jsonl")], ScoreSettings("m")
    for _ in range(4):
        with pytest.raises(Cut):
            score_files(sources, out, settings, on_progress=cut_after(2))
        assert out.read_text() == "before\n"
        # A kill within a write leaves half a line.
        with (partial_of(out) / "scores.jsonl").open("ab") as ledger:
            ledger.write(b'{"piece": 1, "chunk": 3, "last": tr')
    assert sum(scored_texts) == 8 * 256 - 2 * 24  # the last chunk of a file has 232 rows
    assert score_files(sources, out, settings) == BulkSummary(2600, 2600, 0)
    assert sum(scored_texts) == 2600
    assert read(out) == [{**row, "score": len(row["completion"]) + 0.1} for row in rows]
    assert not partial_of(out).exists()


def test_a_cut_while_the_output_is_written_scores_nothing_again(
    tmp_path: Path, scored_texts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "in.jsonl", rows_with(700))
    out = tmp_path / "out.jsonl.gz"

    def cut(rows: Iterator[Any], path: Path, schema: Any) -> int:
        path.write_text(json.dumps(next(rows)))
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(bulk_score, "write_output", cut)
        with pytest.raises(Cut):
            score_files([str(tmp_path / "in.jsonl")], out, ScoreSettings("m"))
    assert score_files([str(tmp_path / "in.jsonl")], out, ScoreSettings("m")).num_written == 700
    assert sum(scored_texts) == 700
    assert [row["id"] for row in read(out)] == list(range(700))


def test_unfinished_scores_of_another_command_are_refused_by_what_differs(
    tmp_path: Path, scored_texts: list[int]
) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows_with(600))
    other = write_rows(tmp_path / "other.jsonl", rows_with(3))
    out = tmp_path / "out.jsonl"
    with pytest.raises(Cut):
        score_files([str(source)], out, ScoreSettings("m"), on_progress=cut_after(1))
    for sources, settings, selection, said in (
        ([source], ScoreSettings("n"), None, "the model was 'version of m', and is 'version of n'"),
        ([source], ScoreSettings("m", truncation="left"), None, "`--truncation` was None, and is 'left'"),
        ([source], ScoreSettings("m"), Selection("pairs"), "`--pairs` was False, and is True"),
        ([source, other], ScoreSettings("m"), None, "other.jsonl is no input of it"),
        ([other], ScoreSettings("m"), None, "other.jsonl is no input of it"),
    ):
        with pytest.raises(RunDirectoryError) as refusal:
            score_files(list(map(str, sources)), out, settings, selection=selection)
        assert said in str(refusal.value)
        assert f"rm -r {partial_of(out)}" in str(refusal.value)
    with source.open("a") as stream:
        stream.write("\n")
    with pytest.raises(RunDirectoryError, match=r"in\.jsonl was changed since"):
        score_files([str(source)], out, ScoreSettings("m"))
    os.utime(source, ns=(0, 0))
    assert sum(scored_texts) == 256


def test_two_processes_do_not_write_one_output(tmp_path: Path, scored_texts: list[int]) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows_with(3))
    out = tmp_path / "out.jsonl"
    with (
        open_ledger(out, {"format": 1}),
        pytest.raises(RunDirectoryError, match=f"process {os.getpid()}.*--output"),
    ):
        score_files([str(source)], out, ScoreSettings("m"))
    partial_of(out).mkdir()
    (partial_of(out) / "mine.txt").write_text("")
    with pytest.raises(RunDirectoryError, match=r"'mine\.txt'"):
        score_files([str(source)], out, ScoreSettings("m"))
    assert (partial_of(out) / "mine.txt").exists()


def test_a_row_that_cannot_be_scored_ends_it_or_is_put_aside_below_the_limit(
    tmp_path: Path, scored_texts: list[int]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = rows_with(300)
    lines = [json.dumps(row) for row in good]
    lines[280:280] = [json.dumps({"completion": "bad"}), "{oops"]
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"in\.jsonl:281: this word is refused.*--max-bad-row-fraction"):
        score_files([str(source)], out, ScoreSettings("m"))
    assert not out.exists()
    with pytest.raises(DataError, match=r"2 of 302 rows .*max_bad_row_fraction"):
        score_files([str(source)], out, ScoreSettings("m"), max_bad_row_fraction=0.001)
    done = score_files([str(source)], out, ScoreSettings("m"), max_bad_row_fraction=0.01)
    assert done == BulkSummary(300, 300, 2)
    assert [row["id"] for row in read(out)] == list(range(300))
    refused = read(tmp_path / "out.jsonl.refused.jsonl")
    assert [(row["line"], row["reason"], row["raw"]) for row in refused] == [
        (281, "not-scored", '{"completion": "bad"}'),
        (282, "bad-json", "{oops"),
    ]
    write_rows(source, good)
    score_files([str(source)], out, ScoreSettings("m"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_parquet_in_is_parquet_out_with_its_types(tmp_path: Path, scored_texts: list[int]) -> None:
    chat = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema(
        [("id", pa.int32()), ("prompt", chat), ("when", pa.timestamp("us")), ("completions", pa.list_(chat))]
    )
    ask = [{"role": "user", "content": "q"}]
    rows = [
        {
            "id": None if n == 5 else n,
            "prompt": ask,
            "when": 10**15 + n,
            "completions": [[{"role": "assistant", "content": "a" * k}] for k in range(1 + n % 3)],
        }
        for n in range(900)
    ]
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=100)
    score_files([str(tmp_path / "in.parquet")], tmp_path / "out.parquet", ScoreSettings("m"))
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.drop_columns("score").equals(table)
    assert written.schema.field("score").type == pa.list_(pa.float64())
    assert [len(scores) for scores in written.column("score").to_pylist()] == [1 + n % 3 for n in range(900)]


def test_jsonl_becomes_parquet_with_types_that_hold_all_rows(tmp_path: Path, scored_texts: list[int]) -> None:
    rows: list[dict[str, Any]] = [{"id": n, "completion": "a"} for n in range(1500)]
    rows[1200] |= {"late": 0.5, "prompt": [{"role": "user", "content": "q"}]}
    rows[1300] |= {"late": 1, "prompt": [{"role": "user", "content": "q", "name": "me"}]}
    source = write_rows(tmp_path / "in.jsonl", rows)
    score_files([str(source)], tmp_path / "out.parquet", ScoreSettings("m"))
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.schema.field("id").type == pa.int64()
    assert written.schema.field("late").type == pa.float64()
    assert written.column("prompt")[1300].as_py() == rows[1300]["prompt"]
    assert written.column("score").to_pylist() == [1.1] * 1500
    write_rows(source, [{"id": 1, "completion": "a"}, {"id": "one", "completion": "a"}])
    with pytest.raises(DataError, match=r"several types.*--output\s+FILE\.jsonl"):
        score_files([str(source)], tmp_path / "two.parquet", ScoreSettings("m"))


def test_pairs_of_flat_rows_do_not_break_where_chunks_and_files_do(
    tmp_path: Path, scored_texts: list[int]
) -> None:
    rows = [{"prompt": f"p{n // 7}", "completion": "x" * (n % 7 + 1)} for n in range(7 * 150)]
    write_rows(tmp_path / "a.jsonl", rows[:500])
    write_rows(tmp_path / "b.jsonl", rows[500:])
    done = score_files(
        [str(tmp_path)], tmp_path / "out.json", ScoreSettings("m"), selection=Selection("pairs")
    )
    assert (done.num_scored, done.num_written) == (1050, 150)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in read(tmp_path / "out.json")] == [
        (f"p{n}", "x" * 7, "x") for n in range(150)
    ]


def test_an_output_of_no_known_kind_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for output, said in ((tmp_path / "a.zst", r"\.jsonl\.gz"), (tmp_path, "is a directory")):
        with pytest.raises(ConfigError, match=said):
            score_files(["absent.jsonl"], output, ScoreSettings("m"))


def test_the_ledger_gives_back_what_was_added_and_knows_which_pieces_are_whole(tmp_path: Path) -> None:
    entries = [
        Entry(0, 1, True, [0.1, None], {1: ("bad-json", "é")}),
        Entry(0, 0, False, [[1 / 3, -2e-8], 5.0]),
        Entry(1, 1, True, [1.0]),
    ]
    ledger = ScoreLedger(tmp_path)
    assert [ledger.add(entry) for entry in [*entries, entries[0]]] == [True, True, True, False]
    ledger.close()
    again = ScoreLedger(tmp_path)
    assert list(again.load()) == entries
    assert [again.entry(entry.piece, entry.number) for entry in entries] == entries
    assert (again.is_done(0), again.is_done(1), again.is_done(2)) == (True, False, False)
    assert again.chunks_done(1) == {1}
    assert again.entry(1, 0) is None
    again.close()
