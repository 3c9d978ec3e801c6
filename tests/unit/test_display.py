"""What is seen of a run while it trains: plain lines, and a dashboard where there is a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrm.train.display import Display, dashboard, describe, sparkline
from rayrm.train.records import read_records

RECORDS: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 0.7 - step / 100,
        "accuracy": 0.5 + step / 100,
        "margin": step / 10,
        "grad_norm": 1.5,
        "learning_rate": 2e-6,
        "pairs_per_second": 12.25,
        "tokens_per_second": 34567.0,
        "data_wait_s": 0.25,
    }
    for step in (10, 20, 30)
]
EVALUATED = {"step": 20, "eval_chat_loss": 0.61, "eval_chat_accuracy": 0.625, "eval_chat_margin": 0.4}


def seen(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run_directory(tmp_path: Path) -> Path:
    records = [*RECORDS[:2], EVALUATED, RECORDS[2]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    standing = {"step": 30, "num_steps": 120, "finished": False, "memory_bytes": 3 * 2**29}
    (tmp_path / "progress.json").write_text(json.dumps(standing))
    return tmp_path


def test_the_dashboard_says_where_the_run_stands_and_how_it_came_there(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    records = read_records(run_directory(tmp_path))
    console.print(dashboard("first", "", records, {"memory_bytes": 3 * 2**29}))
    text = seen(console)
    for said in (
        "first", "0.4000", "80.0%", "+3.000", "12.2", "34,567", "0.25 s", "1.50 GiB",
        "eval_chat at step 20: loss 0.61, accuracy 0.625, margin 0.4",
    ):  # fmt: skip
        assert said in text, said
    assert "█▅▁" in text or "█▄▁" in text  # the loss fell


def test_a_run_without_a_logged_step_has_a_dashboard() -> None:
    console = Console(file=io.StringIO(), width=60)
    console.print(dashboard("first", "waiting", [], {}))
    assert "waiting" in seen(console)


def test_a_line_of_bars_spans_its_own_values_and_leaves_out_what_is_no_number() -> None:
    assert sparkline([0.0, 7.0]) == "▁█"
    assert sparkline([5.0, float("nan"), 5.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(500)))) < 50


def test_a_terminal_has_a_dashboard_that_leaves_and_lines_that_stay(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display(tmp_path, console=console):
        run_directory(tmp_path)
    text = seen(console)
    assert "30/120" in text
    assert "eval_chat_accuracy 0.625" in text
    assert text.index("step 30/120") < text.rindex("\x1b[")


def test_elsewhere_there_are_plain_lines_alone(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    with Display(tmp_path, console=console):
        run_directory(tmp_path)
    expected = [describe(record, 120) for record in read_records(tmp_path)]
    assert seen(console).splitlines() == expected
    assert "\x1b" not in seen(console)
