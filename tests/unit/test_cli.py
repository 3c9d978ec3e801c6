"""The command line without a cluster: what it prints, what it refuses, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rayrm import cli
from rayrm.runfile import read_run
from tests.tiny import save_tiny

RUN_FILE = """
[model]
name = "base"
[data]
train = "pairs.jsonl"
[reward]
learning_rate = 1e-5
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE)
    return str(file)


def rayrm(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rayrm.cli", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = cli.main(list(words))
    return status, capsys.readouterr().err


def test_config_prints_a_run_file_that_reads_back_as_the_same_run(run_file: str, tmp_path: Path) -> None:
    done = rayrm("config", run_file, "learning_rate=3e-6", "cluster.num_workers=2")
    assert done.returncode == 0
    assert tomllib.loads(done.stdout)["reward"]["learning_rate"] == 3e-6
    printed = tmp_path / "printed.toml"
    printed.write_text(done.stdout)
    assert read_run(printed) == read_run(run_file, ["learning_rate=3e-6", "cluster.num_workers=2"])


def test_the_run_file_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "model.name=base", "data.train=pairs.jsonl"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["model"]["name"] == "base"


def test_help_and_config_load_neither_torch_nor_ray(run_file: str) -> None:
    code = (
        "import sys; from rayrm.cli import main; main(sys.argv[1:]);"
        "print(*sorted({'torch', 'ray', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "config", run_file], capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == []


def test_a_users_mistake_is_one_message_and_status_two(run_file: str) -> None:
    done = rayrm("train", run_file, "learning_rat=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("rayrm: error: ")
    assert "learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_adds_the_stack_trace(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = error_of(capsys, "config", "--debug", run_file, "learning_rat=1")
    assert status == 2
    assert "Traceback" in said


@pytest.mark.parametrize(
    ("words", "named", "fix"),
    [
        (["train", "absent.toml"], "absent.toml", "Type the path"),
        (["config", "model.nam=x", "data.train=y"], "nam", "name"),
        (["score", "no-such-model", "rows.jsonl"], "no-such-model", "Type the directory"),
        (["score", "rows.jsonl"], "rows.jsonl", "MODEL and INPUT"),
        (["score", "model", "rows.jsonl", "--served", "reward"], "model rows.jsonl", "INPUT alone"),
        (["score", "model", "rows.jsonl", "--num-workers", "2"], "--num-workers (2)", "--output FILE"),
        (["score", "model", "rows.jsonl", "--min-margin", "1"], "--min-margin (1)", "--pairs"),
        (["score", "model", "rows.jsonl", "--min-score", "1"], "--min-score (1)", "--best-of"),
        (["score", "model", "-", "--output", "a.parquet"], "a.parquet", ".jsonl"),
        (["score", "model", "rows.jsonl", "--output", "./rows.jsonl"], "rows.jsonl", "Type a name elsewhere"),
        (["score", "model", "rows", "--output", "rows/scored.jsonl"], "rows", "Type a name elsewhere"),
        (["score", "model", "rows.jsonl", "--output", "none/a.jsonl"], "none/a.jsonl", "mkdir -p none"),
        (["evaluate", "no-such-model", "rows.jsonl"], "no-such-model", "Type the directory"),
        (["publish", "no-such-run"], "no-such-run", "output_dir"),
        (["serve", "no-such-model"], "no-such-model", "Type the directory"),
        (["serve", "no-such-model", "num_replica=2"], "num_replica", "num_replicas"),
        (["serve", "no-such-model", "two"], "two", "key=value"),
        (["sweep", "model.name=m", "data.train=d"], "parameter", "--param"),
    ],
)
def test_each_refusal_names_the_thing_and_what_to_type(
    words: list[str],
    named: str,
    fix: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = error_of(capsys, *words)
    assert status == 2
    assert named in said
    assert fix in said
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_pip_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "_doctor", lambda options: __import__("no_such_package.inner"))
    status, said = error_of(capsys, "doctor")
    assert status == 1
    assert (
        said
        == "rayrm: error: the package 'no_such_package' is not installed. Type: pip install no_such_package\n"
    )


def test_an_interrupt_ends_with_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert error_of(capsys, "doctor") == (130, "\nrayrm: interrupted\n")


def test_score_reads_stdin_and_writes_the_rows_with_their_scores_in_order(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    ask = [{"role": "user", "content": "the red cat?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("yes thanks", "no", "never")]
    rows = [{"id": 7, "prompt": ask, "completions": answers}, {"prompt": ask, "completion": answers[1]}]
    done = rayrm("score", str(model), "-", stdin="\n".join(json.dumps(row) for row in rows) + "\n")
    assert done.returncode == 0, done.stderr
    group, single = (json.loads(line) for line in done.stdout.splitlines())
    assert {key: group[key] for key in rows[0]} == rows[0]
    assert len(group["score"]) == 3
    assert len(set(group["score"])) == 3
    assert single["score"] == pytest.approx(group["score"][1], abs=1e-5)


def test_a_row_that_cannot_be_scored_leaves_no_output_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    good = json.dumps({"completion": [{"role": "assistant", "content": "yes"}]})
    rows.write_text(f"{good}\n{good}\n" + json.dumps({"completion": "a string"}) + "\n")
    status, said = error_of(capsys, "score", str(model), str(rows), "--output", str(tmp_path / "out.jsonl"))
    assert status == 2
    assert f"{rows}:3" in said
    assert "message lists" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]


def test_scoring_into_a_reader_that_stops_is_no_stack_trace(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    row = json.dumps({"completion": [{"role": "assistant", "content": "yes " * 40}]}) + "\n"
    rows.write_text(row * 1200)
    command = f"{sys.executable} -m rayrm.cli score {model} {rows} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_publish_then_score_by_the_name_in_the_registry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "run")
    Path("rows.jsonl").write_text(
        json.dumps({"completion": [{"role": "assistant", "content": "yes"}]}) + "\n"
    )
    assert cli.main(["publish", "run", "--name", "helpful"]) == 0
    assert "helpful" in capsys.readouterr().out
    assert cli.main(["publish", "run", "--name", "helpful"]) == 0
    assert "already published" in capsys.readouterr().out
    scores = []
    for model in ("run", "helpful", "registry/helpful"):
        assert cli.main(["score", model, "rows.jsonl"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["score"])
    assert scores == [scores[0]] * 3


def test_publish_takes_a_probe_file_and_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "run", chat=False)
    Path("probe.jsonl").write_text('{"completion": "yes"}\n{"completion": "no, never"}\n')
    Path("other.jsonl").write_text('{"completion": "perhaps"}\n{"completion": "no, never"}\n')
    assert cli.main(["publish", "run", "--probe", "probe.jsonl"]) == 0
    (manifest,) = Path("registry/reward").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["distribution"]["count"] == 2
    assert cli.main(["publish", "run", "--probe", "other.jsonl"]) == 2
    assert "another name" in capsys.readouterr().err
