"""The whole way by the command line on a tiny model, and every kind of bad input on it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rayrm import cli
from tests.tiny import save_tiny, tiny_rankings, tiny_rows, write_rows

pytestmark = pytest.mark.ray
STEPS = ["bf16=false", "max_steps=3", "per_device_train_batch_size=4", "learning_rate=1e-3", "save_steps=2"]


@dataclass
class Shell:
    """`rayrm` typed in a directory with a tiny model and data."""

    home: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *words: str) -> tuple[int, str, str]:
        status = cli.main(list(words))
        said = self.capture.readouterr()
        return status, said.out, said.err

    def train(self, *words: str) -> tuple[int, str, str]:
        return self("train", "run.toml", *STEPS, *words)


@pytest.fixture
def shell(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Shell:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(24, conversational=True))
    write_rows(tmp_path / "heldout.jsonl", tiny_rows(10, seed=5, conversational=True))
    (tmp_path / "run.toml").write_text(
        '[model]\nname = "base"\n[data]\ntrain = "pairs.jsonl"\neval = "heldout.jsonl"\n'
        '[reward]\noutput_dir = "out"\neval_strategy = "epoch"\n'
    )
    return Shell(tmp_path, capfd)


@pytest.mark.parametrize("workers", [0, 2])
def test_train_evaluate_publish_and_score_agree(shell: Shell, workers: int) -> None:
    status, out, err = shell.train(f"cluster.num_workers={workers}", "zero_stage=2")
    assert status == 0, err
    assert "trained 3 steps" in out
    assert str(shell.home / "out") in out

    status, out, err = shell("evaluate", "out", "heldout.jsonl", "pairs.jsonl", "--json", "metrics.json")
    assert status == 0, err
    metrics = json.loads(Path("metrics.json").read_text())
    assert [line.split()[0] for line in out.splitlines()] == ["source", "heldout.jsonl", "pairs.jsonl", "all"]
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    during = [record for record in records if "eval_loss" in record][-1]
    assert during["step"] == 3
    assert metrics["heldout.jsonl"]["loss"] == pytest.approx(during["eval_loss"], abs=1e-5)
    assert metrics["all"]["num_pairs"] == 34

    assert shell("publish", "out", "--name", "tiny")[0] == 0
    pairs = [json.loads(line) for line in Path("heldout.jsonl").read_text().splitlines()]
    sides = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in pairs]
    Path("sides.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in sides).encode()))
    status, _, err = shell("score", "tiny", "sides.jsonl.gz", "--output", "scored.jsonl")
    assert status == 0, err
    scored = [json.loads(line)["score"] for line in Path("scored.jsonl").read_text().splitlines()]
    margin = sum(chosen - rejected for chosen, rejected in scored) / len(scored)
    assert margin == pytest.approx(metrics["heldout.jsonl"]["margin"], abs=1e-5)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_rankings_train_beside_pairs_and_are_evaluated(shell: Shell, workers: int) -> None:
    rankings = tiny_rankings(12, conversational=True)
    for ranking in rankings[:2]:
        ranking["ranks"] = [1] * len(ranking["ranks"])
    mixed = [row for both in zip(tiny_rows(12, conversational=True), rankings, strict=True) for row in both]
    write_rows(Path("mixed.jsonl"), mixed)
    held_out = tiny_rankings(5, seed=5, conversational=True)
    write_rows(Path("ranked.jsonl"), held_out)
    sources = ["data.train=mixed.jsonl", "data.eval=ranked.jsonl", "max_bad_row_fraction=0.1"]
    status, _, err = shell.train(*sources, f"cluster.num_workers={workers}", "zero_stage=2")
    assert status == 0, err
    assert [json.loads(line)["reason"] for line in Path("out/quarantine.jsonl").read_text().splitlines()] == [
        "all-tied"
    ] * 2

    status, out, err = shell("evaluate", "out", "ranked.jsonl", "heldout.jsonl", "--json", "metrics.json")
    assert status == 0, err
    num_pairs = sum(above < below for row in held_out for above in row["ranks"] for below in row["ranks"])
    table = [line.split()[:3] for line in out.splitlines()]
    assert table == [
        ["source", "rows", "pairs"],
        ["ranked.jsonl", "5", str(num_pairs)],
        ["heldout.jsonl", "10", "10"],
        ["all", "15", str(num_pairs + 10)],
    ]
    metrics = json.loads(Path("metrics.json").read_text())
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    during = [record for record in records if "eval_loss" in record][-1]
    for name, value in metrics["ranked.jsonl"].items():
        assert during[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name
    whole = (5 * metrics["ranked.jsonl"]["loss"] + 10 * metrics["heldout.jsonl"]["loss"]) / 15
    assert metrics["all"]["loss"] == pytest.approx(whole)

    # What every completion scores by the command is what its comparisons are made of.
    status, _, err = shell("score", "out", "ranked.jsonl", "--output", "scored.jsonl")
    assert status == 0, err
    margin = 0.0
    for row in map(json.loads, Path("scored.jsonl").read_text().splitlines()):
        ranked = list(zip(row["ranks"], row["score"], strict=True))
        each = [high - low for above, high in ranked for below, low in ranked if above < below]
        margin += sum(each) / len(each)
    assert metrics["ranked.jsonl"]["margin"] == pytest.approx(margin / 5, abs=1e-5)


def test_lora_trains_its_head_and_publishes_merged(shell: Shell) -> None:
    status, _, err = shell.train("model.lora.r=4")
    assert status == 0, err
    assert Path("out/adapter_config.json").is_file()
    assert shell("publish", "out")[0] == 0
    rows = [{"completion": [{"role": "assistant", "content": "yes thanks"}]}]
    write_rows(Path("rows.jsonl"), rows)
    scores = [
        json.loads(shell("score", model, "rows.jsonl")[1])["score"] for model in ("out", "reward", "base")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert abs(scores[0] - scores[2]) > 1e-3


@pytest.mark.parametrize("lora", [[], ["model.lora.r=4"]], ids=["full", "lora"])
def test_a_run_that_was_cut_off_goes_on_by_itself_and_a_finished_one_is_refused(
    shell: Shell, lora: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert shell.train(*lora, "output_dir=whole")[0] == 0
    assert shell.train(*lora)[0] == 0
    # As a kill after step 2 leaves it: the checkpoint, and no mark that the run is finished.
    shutil.rmtree("out/checkpoint-3")
    Path("out/progress.json").write_text('{"step": 2, "num_steps": 3, "finished": false}')
    status, _, err = shell.train(*lora)
    assert status == 0, err
    assert "resuming after step 2" in caplog.text
    assert last_loss("out") == pytest.approx(last_loss("whole"), abs=1e-6)
    before = tree("out")
    status, _, err = shell.train(*lora)
    assert status == 2
    assert "finished" in err
    assert tree("out") == before


def last_loss(directory: str) -> float:
    records = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    return float([record for record in records if "eval_loss" in record][-1]["eval_loss"])


def tree(directory: str | Path) -> dict[str, bytes]:
    root = Path(directory)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


Spoil = Callable[[Path], list[str]]
"""Spoils something in the directory; returns the words to add to the command."""


def empty_file(home: Path) -> list[str]:
    (home / "pairs.jsonl").write_text("")
    return []


def rows_without_chosen(home: Path) -> list[str]:
    rows = tiny_rows(24, conversational=True)
    del rows[3]["chosen"]
    write_rows(home / "pairs.jsonl", rows)
    return []


def wrong_roles(home: Path) -> list[str]:
    rows = tiny_rows(24, conversational=True)
    rows[6]["chosen"] = [{"role": "gpt", "content": "yes"}]
    write_rows(home / "pairs.jsonl", rows)
    return []


def broken_line(home: Path) -> list[str]:
    text = (home / "pairs.jsonl").read_text().splitlines()
    (home / "pairs.jsonl").write_text("\n".join([text[0], text[1][:20], *text[2:]]))
    return []


def cut_gzip(home: Path) -> list[str]:
    (home / "pairs.jsonl.gz").write_bytes(gzip.compress((home / "pairs.jsonl").read_bytes())[:-20])
    return ["data.train=pairs.jsonl.gz"]


def three_labels(home: Path) -> list[str]:
    save_tiny(home / "three", num_labels=3)
    return ["model.name=three", 'model_init_kwargs={"num_labels" = 3}']


def no_template(home: Path) -> list[str]:
    save_tiny(home / "plain", chat=False)
    return ["model.name=plain"]


def cut_weights(home: Path) -> list[str]:
    weights = home / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return []


def mixed_forms(home: Path) -> list[str]:
    write_rows(home / "heldout.jsonl", tiny_rows(10, conversational=False))
    return []


def words(*added: str) -> Spoil:
    return lambda home: list(added)


BAD_INPUT: list[tuple[str, Spoil, list[str]]] = [
    ("a missing data file", words("data.train=absent.jsonl"), ["absent.jsonl", "correct the path"]),
    ("an empty data set", empty_file, ["pairs.jsonl", "no rows", "give a source"]),
    ("a row without chosen", rows_without_chosen, ["pairs.jsonl:4", "`chosen` is missing", "add it"]),
    ("wrong roles", wrong_roles, ["pairs.jsonl:7", "'gpt'", "rename it"]),
    ("a line that is no JSON", broken_line, ["pairs.jsonl:2", "not JSON", "correct it"]),
    ("a damaged archive", cut_gzip, ["pairs.jsonl.gz", "cannot be read", "copy it again"]),
    ("three labels", three_labels, ["num_labels=3", "num_labels=1", "Remove it"]),
    ("an eos token outside", words("eos_token=<eos>"), ["`eos_token` ('<eos>')", "vocabulary", "name one"]),
    ("a pad token outside", words("pad_token=<nil>"), ["`pad_token` ('<nil>')", "vocabulary", "name one"]),
    ("no chat template", no_template, ["no chat template", "chat_template_path"]),
    (
        "a small token budget",
        words("max_tokens_per_microbatch=8"),
        ["`max_tokens_per_microbatch` (8)", "longest pair", "Raise it to"],
    ),
    (
        "more workers than the cluster has",
        words("cluster.num_workers=64"),
        ["64 workers", "64 CPU", "Lower `cluster.num_workers`"],
    ),
    ("a missing model", words("model.name=./absent"), ["./absent", "not a directory", "config.json"]),
    ("damaged weights", cut_weights, ["base", "could not be loaded", "copy or save them again"]),
    ("evaluation data of the other form", mixed_forms, ["conversational", "standard", "write both"]),
    ("a length that no pair has", words("max_length=3"), ["all 24 rows", "too-long", "max_length"]),
    ("an unknown setting", words("learning_rat=1"), ["learning_rat", "learning_rate"]),
]


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in BAD_INPUT], ids=[c[0] for c in BAD_INPUT])
def test_bad_input_is_refused_with_the_thing_and_the_fix_and_nothing_is_written(
    shell: Shell, spoil: Spoil, said: list[str]
) -> None:
    added = spoil(shell.home)
    before = tree(shell.home)
    status, _, err = shell.train(*added)
    last = err[err.index("rayrm: error: ") :]
    for part in said:
        assert part in last
    assert "Traceback" not in err
    assert status == (1 if "num_workers" in " ".join(added) else 2)
    written = {name for name in tree(shell.home).items() ^ before.items()}
    assert {name for name, _ in written if "quarantine" not in name} == set()


def test_a_directory_of_another_run_is_kept_whole(shell: Shell) -> None:
    assert shell.train("max_steps=1")[0] == 0
    before = tree("out")
    status, _, err = shell.train("learning_rate=0.5")
    assert status == 2
    for part in ("out", "holds another run", "learning_rate", "0.5", "Choose another `output_dir`"):
        assert part in err
    assert tree("out") == before


def test_a_corrupt_checkpoint_is_named_and_nothing_is_trained_on_it(shell: Shell) -> None:
    assert shell.train()[0] == 0
    shutil.rmtree("out/checkpoint-3")
    Path("out/progress.json").write_text('{"step": 2, "num_steps": 3, "finished": false}')
    weights = Path("out/checkpoint-2/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    before = tree("out")
    status, _, err = shell.train()
    assert status == 2
    for part in ("checkpoint-2/model.safetensors", "corrupt", "Delete"):
        assert part in err
    assert tree("out") == before


def test_a_classifier_with_three_labels_is_neither_evaluated_nor_scored_nor_published(shell: Shell) -> None:
    save_tiny(shell.home / "three", num_labels=3)
    rows = write_rows(shell.home / "rows.jsonl", [{"completion": [{"role": "assistant", "content": "yes"}]}])
    for command in (
        ["evaluate", "three", "pairs.jsonl"],
        ["score", "three", str(rows)],
        ["publish", "three"],
    ):
        status, _, err = shell(*command)
        assert status == 2
        assert "num_labels=3" in err
        assert "num_labels=1" in err
    assert not Path("registry").exists()


def test_evaluation_refuses_text_of_the_other_form(shell: Shell) -> None:
    write_rows(shell.home / "plain.jsonl", tiny_rows(4))
    status, _, err = shell("evaluate", "base", "plain.jsonl")
    assert status == 2
    assert "plain.jsonl is standard" in err
    assert "message lists" in err
