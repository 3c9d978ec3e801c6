"""`rayrm evaluate` on several sets: by workers as in process, cut off and resumed, against another model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.data.ingest import ingest
from rayrm.data.tokenize import TextInput
from rayrm.errors import DataError
from rayrm.evaluation import scoring
from rayrm.evaluation.evaluate import evaluate
from rayrm.model.reward_model import load_saved
from rayrm.serve.scorer import RewardModel
from rayrm.train.evaluation_record import EVALUATION, read_evaluation, write_evaluation
from tests.tiny import save_tiny, tiny_rankings, tiny_rows, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("evaluated") / "model", chat=False)


def grouped_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two rows of each prompt, of three groups."""
    rows = [row | {"subset": f"part-{n % 3}"} for n, row in enumerate(tiny_rows(count // 2, seed=seed))]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    return [row for both in zip(rows, swapped, strict=True) for row in both]


@pytest.mark.ray
def test_workers_find_what_this_process_finds(ray_cluster: None, model: Path, tmp_path: Path) -> None:
    sources = {
        "pairs": str(write_rows(tmp_path / "pairs.jsonl", grouped_rows(600))),
        "ranked": str(write_rows(tmp_path / "ranked.jsonl", tiny_rankings(9))),
    }
    shown: list[tuple[str, int, int]] = []
    alone = evaluate(model, sources)
    together = evaluate(model, sources, num_workers=2, on_progress=lambda *one: shown.append(one))
    assert list(alone.sets) == list(together.sets) == ["pairs", "ranked", "all"]
    for name, one in alone.sets.items():
        other = together.sets[name]
        assert other.metrics == pytest.approx(one.metrics, abs=1e-5)
        assert list(other.groups) == list(one.groups)
        for group, figures in one.groups.items():
            assert other.groups[group] == pytest.approx(figures, abs=1e-5)
        np.testing.assert_array_equal(other.outcomes.prompt, one.outcomes.prompt)
    assert [one[1:] for one in shown if one[0] == "pairs"][-1] == (600, 600)
    assert len([one for one in shown if one[0] == "pairs"]) == 3


def test_its_figures_are_those_of_the_scorer(model: Path, tmp_path: Path) -> None:
    rows = grouped_rows(40)
    record = evaluate(model, [str(write_rows(tmp_path / "pairs.jsonl", rows))])
    (found,) = record.sets.values()
    scores = RewardModel.from_pretrained(model).score(
        [row["prompt"] for row in rows for _ in range(2)],
        [row[side] for row in rows for side in ("chosen", "rejected")],
    )
    margins = np.array(scores[0::2]) - np.array(scores[1::2])
    np.testing.assert_allclose(found.outcomes.margin, margins, atol=1e-5)
    # A pair and the same pair swapped: one of both is right.
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["margin"] == pytest.approx(0.0, abs=1e-6)
    assert len(np.unique(found.outcomes.prompt)) == 20
    # Of which each prompt has one: by prompts nothing varies, by rows it seems to.
    assert "accuracy_bootstrap_low" not in found.metrics
    assert found.metrics["accuracy_low"] < 0.5 < found.metrics["accuracy_high"]
    for number in range(3):
        of_group = [
            margin for margin, row in zip(margins, rows, strict=True) if row["subset"] == f"part-{number}"
        ]
        assert found.groups[f"part-{number}"]["num_pairs"] == len(of_group)
        assert found.groups[f"part-{number}"]["margin"] == pytest.approx(np.mean(of_group), abs=1e-5)
    worst = found.worst[0]
    assert worst["margin"] == pytest.approx(margins.min(), abs=1e-5)
    place = int(worst["where"].rpartition(":")[2]) - 1
    assert place == int(margins.argmin())
    assert (worst["prompt"] + worst["chosen"]).startswith(rows[place]["prompt"] + rows[place]["chosen"])
    assert len(found.worst) == 20


def test_a_record_is_read_back_as_it_was_written(model: Path, tmp_path: Path) -> None:
    source = str(write_rows(tmp_path / "pairs.jsonl", grouped_rows(20)))
    record = evaluate(model, [source])
    write_evaluation(record, tmp_path / "kept")
    write_evaluation(record, tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.parquet"))) == 1
    back = read_evaluation(tmp_path / "kept")
    (one,), (other,) = record.sets.values(), back.sets.values()
    assert (other.metrics, other.groups, other.worst) == (one.metrics, one.groups, one.worst)
    assert (other.findings, other.reliability) == (one.findings, one.reliability)
    np.testing.assert_array_equal(other.outcomes.margin, one.outcomes.margin)
    np.testing.assert_array_equal(other.outcomes.prompt, one.outcomes.prompt)
    for group in one.groups:
        np.testing.assert_array_equal(other.outcomes.of_group(group).row, one.outcomes.of_group(group).row)
    file = tmp_path / "kept" / EVALUATION
    file.write_text(file.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(DataError, match="format 7"):
        read_evaluation(tmp_path / "kept")
    file.write_text(file.read_text()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        read_evaluation(tmp_path / "kept")
    with pytest.raises(DataError, match=r"rayrm evaluate MODEL DATA --output .*none"):
        read_evaluation(tmp_path / "none")


def test_an_evaluation_that_was_killed_computes_the_missing_scores_only(model: Path, tmp_path: Path) -> None:
    # 8 chunks; each is kept as soon as it is scored.
    rows = write_rows(tmp_path / "pairs.jsonl", grouped_rows(2048))
    kept = tmp_path / "kept"
    command = [sys.executable, "-m", "rayrm.cli", "evaluate", str(model), str(rows), "--output", str(kept)]
    environment = os.environ | {"RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 120
    while not list(kept.glob(".partial/*/*.npy")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (kept / EVALUATION).exists()
    before = {file.name for file in kept.glob(".partial/*/[0-9]*.npy")}
    assert 0 < len(before) < 8
    shown: list[int] = []
    resumed = evaluate(
        model, [str(rows)], keep=kept / ".partial", on_progress=lambda name, done, of: shown.append(done)
    )
    assert len(shown) == 1 + 8 - len(before)
    assert not (kept / ".partial").exists()
    anew = evaluate(model, [str(rows)])
    assert resumed.sets[str(rows)].metrics == pytest.approx(anew.sets[str(rows)].metrics, abs=1e-6)


def test_scores_of_another_model_or_of_other_rows_are_not_taken(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", tiny_rows(30))
    other = save_tiny(tmp_path / "other", seed=1, chat=False)
    keep = tmp_path / "keep"
    others = write_rows(tmp_path / "others.jsonl", tiny_rows(30, seed=1))
    for source, path in ((rows, model), (rows, other), (others, model)):
        loaded = load_saved(path)
        scored = ingest(str(source), loaded.tokenizer, max_length=None, here=True)
        kept = scoring.Scoring(loaded, path, keep=keep).scores(scored, "x")
        np.testing.assert_array_equal(kept, scoring.Scoring(loaded, path).scores(scored, "x"))
    assert len(list(keep.iterdir())) == 3


def test_the_command_compares_two_models_on_the_same_pairs(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayrm.cli import main

    monkeypatch.chdir(tmp_path)
    other = save_tiny(tmp_path / "other", seed=1, chat=False)
    write_rows(Path("pairs.jsonl"), grouped_rows(40) + tiny_rows(20, seed=3))
    command = ["evaluate", str(model), "pairs.jsonl", "--against", str(other), "--output", "kept"]
    assert main(command) == 0
    out = capfd.readouterr().out
    assert f"{model} against {other}, the same pairs:" in out
    (line,) = [line for line in out.splitlines()[2:] if line.startswith("pairs.jsonl  ") and "/" in line]
    first, second, difference = (float(word) for word in line.split()[1:4])
    assert difference == pytest.approx(first - second, abs=2e-3)
    assert first == pytest.approx(
        read_evaluation(Path("kept")).sets["pairs.jsonl"].metrics["accuracy"], abs=1e-3
    )
    assert [line.split()[0] for line in out.splitlines() if line.startswith("part-")]
    assert json.loads(Path("kept", EVALUATION).read_text())["model"] == str(model)
    write_rows(Path("others.jsonl"), tiny_rows(4))
    for words in ([str(other), "pairs.jsonl"], [str(model), "others.jsonl"]):
        assert main(["evaluate", *words, "--output", "kept"]) == 2
        assert f"holds the evaluation of {model} on pairs.jsonl" in capfd.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").touch()
    for words, said in (
        (["--output", "run"], "is the directory of a run. Type another, such as run/heldout"),
        (["--output", "pairs.jsonl"], "`--output` (pairs.jsonl) can be no directory"),
        (["--json", "none/figures.json"], "type mkdir -p none"),
    ):
        assert main(["evaluate", str(model), "pairs.jsonl", *words]) == 2
        assert said in capfd.readouterr().err
    assert main(["evaluate", str(model), "pairs.jsonl", "--consistency", "-3"]) == 2
    assert "`consistency_rows` (-3)" in capfd.readouterr().err


@pytest.mark.parametrize("chat", [False, True])
def test_a_benchmark_is_known_by_its_rows_and_gives_its_own_numbers(tmp_path: Path, chat: bool) -> None:
    """RewardBench's section is weighted by the published sizes of its subsets, of which each has one row."""
    path = save_tiny(tmp_path / "model", seed=4, chat=chat)
    subsets = ["alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"]
    rows = [
        row | {"subset": subset, "id": number, "chosen_model": "a", "rejected_model": "b"}
        for number, (row, subset) in enumerate(zip(tiny_rows(5), subsets, strict=True))
    ]
    source = str(write_rows(tmp_path / "rewardbench.jsonl", rows))
    plain = str(write_rows(tmp_path / "plain.jsonl", tiny_rows(5, conversational=chat)))
    both = evaluate(path, [source, plain], consistency_rows=5).sets
    assert both[plain].metrics["accuracy"] == both[source].metrics["accuracy"]  # the same texts
    found = both[source]
    assert found.benchmark is not None
    assert found.benchmark["name"] == "rewardbench"
    scorer = RewardModel.from_pretrained(path)
    right = [
        chosen > rejected
        for row in rows
        for chosen, rejected in [
            scorer.score_inputs([as_input(row, side, chat) for side in ("chosen", "rejected")])
        ]
    ]
    sizes = [100, 95, 95, 28, 40]
    weighted = sum(size * hit for size, hit in zip(sizes, right, strict=True)) / sum(sizes)
    assert found.benchmark["metrics"]["chat"] == pytest.approx(weighted)
    assert found.metrics["accuracy"] == pytest.approx(sum(right) / 5)
    assert set(found.groups) == set(subsets)
    assert 0 <= found.metrics["consistency_trailing_space_kept"] <= 1
    write_evaluation(evaluate(path, [source]), tmp_path / "kept")
    assert read_evaluation(tmp_path / "kept").sets[source].benchmark == found.benchmark


def as_input(row: dict[str, Any], side: str, chat: bool) -> TextInput:
    if not chat:
        return TextInput(row["prompt"], row[side])
    return TextInput(
        [{"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": row[side]}]
    )


def test_a_first_row_that_is_bad_is_counted_as_any_other(model: Path, tmp_path: Path) -> None:
    """Though it is the row by which a benchmark would be known."""
    source = tmp_path / "pairs.jsonl"
    write_rows(source, tiny_rows(20))
    source.write_text("no JSON\n" + source.read_text())
    found = evaluate(model, [str(source)], max_bad_row_fraction=0.1).sets[str(source)]
    assert found.metrics["num_pairs"] == 20
    with pytest.raises(DataError, match=r"1 of 21 rows .* were refused"):
        evaluate(model, [str(source)])
