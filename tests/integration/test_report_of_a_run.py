"""The report of a run that was trained, with what it logged and evaluated itself."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rayrm.config import RewardConfig
from rayrm.model.saving import copy_saved
from rayrm.report.card import illustrate_card
from rayrm.report.run import write_run_report
from rayrm.serve.registry import publish
from rayrm.train.evaluation_record import read_evaluation
from rayrm.train.trainer import RewardTrainer
from tests.tiny import save_tiny, tiny_rows, write_rows

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("report")
    model = save_tiny(home / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    rows = tiny_rows(40)
    del rows[3]["chosen"]
    train, held = write_rows(home / "train.jsonl", rows), write_rows(home / "held.jsonl", tiny_rows(20))
    config = RewardConfig(
        output_dir=str(home / "run"),
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        max_bad_row_fraction=0.1,
        disable_tqdm=True,
    )
    RewardTrainer(
        model=str(model), args=config, train_dataset=str(train), eval_dataset={"held": str(held)}
    ).train()
    return home / "run"


def test_the_report_of_a_real_run_says_what_it_logged(run: Path) -> None:
    found = json.loads(write_run_report(run).with_suffix(".json").read_text())
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["notes"] == []
    curve = found["sections"]["curves"]["loss"]
    assert curve["training"]["value"] == [record["loss"] for record in log if "loss" in record]
    assert curve["held"]["step"] == [2, 4]
    last = [record["eval_held_accuracy"] for record in log if "eval_held_accuracy" in record][-1]
    assert found["facts"]["accuracy on held"]["value"] == last
    assert found["facts"]["pairs trained on"] == pytest.approx(16)
    assert found["sections"]["set:held"]["margins"]["count"] == 20, "training evaluates at its end"
    (refused,) = found["sections"]["data"]["refused"]
    assert refused["missing-chosen"] == 1


def test_what_is_logged_of_an_evaluation_is_what_its_record_says(run: Path) -> None:
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in log if "eval_held_accuracy" in record][-1]
    record = read_evaluation(run / "evaluation")
    assert record.step == last["step"] == 4
    kept = record.sets["held"].metrics
    for name in ("accuracy", "loss", "ece", "length_controlled_accuracy", "length_margin_correlation"):
        assert last[f"eval_held_{name}"] == pytest.approx(kept[name], abs=1e-9), name


def test_the_card_says_what_is_known_of_the_model_and_goes_where_it_goes(run: Path, tmp_path: Path) -> None:
    held = read_evaluation(run / "evaluation").sets["held"].metrics
    drawn = illustrate_card(run)
    illustrate_card(run)  # a second time changes nothing
    published = publish(run, tmp_path / "registry", "reward")
    copy_saved(run, tmp_path / "copy")
    for place in (run, tmp_path / "copy", published.path):
        card = (place / "README.md").read_text()
        assert "39 preference rows with 78 completions" in card
        assert "Left out: 1 of 40 rows read (1 missing-chosen)." in card
        assert f"| held | 20 | {held['accuracy']:.3f} | {held['accuracy_low']:.3f} to" in card
        assert "held: Few rows (20)" in card
        assert "`apache-2.0`" in card
        for file in drawn:
            assert card.count(f"]({file.name})") == 1
            assert ElementTree.fromstring((place / file.name).read_text()).tag.endswith("svg")
    assert len(drawn) == 2
