"""`rayrm publish --gate`: a model that breaks a rule is not published, and is told which and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrm.cli import main
from rayrm.evaluation.evaluate import evaluate_model
from rayrm.evaluation.gate import broken_rules, check_gate
from rayrm.evaluation.gate_settings import GateSet
from rayrm.serve.registry import list_versions, open_published
from rayrm.serve.scorer import RewardModel
from tests.tiny import save_tiny, tiny_rows, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model, whose preferences the pairs are, and another."""
    home = tmp_path_factory.mktemp("gate")
    good = RewardModel.from_pretrained(save_tiny(home / "good", seed=2, chat=False))
    save_tiny(home / "other", seed=3, chat=False)
    rows = tiny_rows(120)
    chosen, rejected = (
        good.score([row["prompt"] for row in rows], [row[side] for row in rows])
        for side in ("chosen", "rejected")
    )
    write_rows(home / "pairs.jsonl", [_in_order(*one) for one in zip(rows, chosen, rejected, strict=True)])
    return home


def _in_order(row: dict[str, Any], chosen: float, rejected: float) -> dict[str, Any]:
    if chosen > rejected:
        return row
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def test_a_limit_holds_up_to_the_figure_itself_and_no_further(home: Path) -> None:
    data = str(home / "pairs.jsonl")
    (figures,) = evaluate_model(home / "other", [data]).values()
    accuracy, ece, slope = (figures[name] for name in ("accuracy", "ece", "length_margin_correlation"))
    at = {"min_accuracy": accuracy, "max_ece": ece, "max_length_correlation": abs(slope)}
    checks = check_gate(home / "other", {"a": GateSet(data, **at)})
    assert [check.holds for check in checks] == [True] * 3
    beyond = {
        "min_accuracy": accuracy + 0.01,
        "max_ece": ece - 0.01,
        "max_length_correlation": abs(slope) - 0.01,
    }
    checks = check_gate(home / "other", {"a": GateSet(data, **beyond)})
    assert [check.holds for check in checks] == [False] * 3
    said = broken_rules(checks)
    assert said is not None
    assert "3 of 3 rules are broken" in said
    assert f"a: accuracy is {accuracy:.3f}" in said
    assert "0.010 too low" in said
    assert said.count("0.010 too high") == 2


def test_a_model_is_no_worse_than_itself_and_worse_than_the_one_that_made_the_pairs(home: Path) -> None:
    asked = {"a": GateSet(str(home / "pairs.jsonl"), no_worse=True)}
    good, other = home / "good", home / "other"
    assert broken_rules(check_gate(good, asked, current=good)) is None
    assert broken_rules(check_gate(good, asked, current=other)) is None
    assert broken_rules(check_gate(other, asked)) is None  # the first version
    said = broken_rules(check_gate(other, asked, current=good))
    assert said is not None
    assert "against 1.000 of the current version" in said
    assert "worse by more than `allowed_drop` (0)" in said
    allowed = {"a": GateSet(str(home / "pairs.jsonl"), no_worse=True, allowed_drop=0.9)}
    assert broken_rules(check_gate(other, allowed, current=good)) is None


def test_what_a_set_cannot_tell_is_no_pass(home: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": " a", "score": 1.0},
        {"prompt": "q", "completion": " b", "score": 0.0},
    ]
    data = str(write_rows(tmp_path / "scored.jsonl", rows))
    (check,) = check_gate(home / "good", {"a": GateSet(data, min_accuracy=0.1)})
    assert not check.holds
    assert "its 2 rows have no accuracy" in check.said


def test_publication_is_refused_until_the_model_passes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gate.toml"
    file.write_text(
        f'[sets.held-out]\ndata = "{home / "pairs.jsonl"}"\nmin_accuracy = 0.9\nno_worse = true\n'
    )
    registry = str(tmp_path / "registry")
    words = ["--registry", registry, "--name", "chat", "--gate", str(file)]
    assert main(["publish", str(home / "other"), *words]) == 2
    said = capsys.readouterr()
    assert "BROKEN  held-out: accuracy is" in said.out
    assert "nothing was published. 1 of 2 rules are broken" in said.err
    assert not Path(registry, "chat").exists()
    assert main(["publish", str(home / "good"), *words]) == 0
    assert "holds   held-out: accuracy is 1.000" in capsys.readouterr().out
    version = open_published(registry, "chat").version
    file.write_text(f'[sets.held-out]\ndata = "{home / "pairs.jsonl"}"\nno_worse = true\n')
    assert main(["publish", str(home / "other"), *words]) == 2
    assert "of the current version" in capsys.readouterr().err
    assert list_versions(registry, "chat") == [version]
