"""A training run, an evaluation and a comparison as reports: what they say is true, whatever is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.cli import main
from rayrm.errors import RunDirectoryError
from rayrm.metrics.calibration import Bin
from rayrm.metrics.comparison import compare
from rayrm.report.compare import names_of, write_comparison
from rayrm.report.document import Number, Passage, Report, Section, Table, markdown, plain, write_report
from rayrm.report.evaluation_figures import (
    GroupAccuracy,
    agreement,
    group_bars,
    margins,
    reliability_curve,
    score_by_length,
)
from rayrm.report.figures import Curve, curves
from rayrm.report.run import write_run_report
from rayrm.report.run_files import read_run_files
from tests.planted_runs import EVIL, constant, planted_outcomes, records, write_planted, write_run
from tests.unit.test_rl_report import Page

CURVES = ["Loss", "Accuracy", "Margin", "Learning rate", "Gradient norm", "Throughput", "Wait for data"]
SCORES = ["Scores", "Margins", "Reliability", "Score against length", "Accuracy by group"]


def told(page: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.with_suffix(".json").read_text())
    return found


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_run(tmp_path_factory.mktemp("runs") / "first")
    write_planted(place / "evaluation", {"held": planted_outcomes()}, [f"scores follow length {EVIL}"])
    write_run_report(place)
    return place


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_the_page_loads_nothing_runs_nothing_and_obeys_nobody(page: Page) -> None:
    assert [there for there in page.refers if not there.startswith("#")] == []
    assert {"script", "link", "iframe", "object", "img"} & set(page.tags) == set()
    assert "default-src 'none'" in page.source
    assert "&lt;script&gt;alert" in page.source
    assert "&lt;U+202E&gt;right to left" in page.source
    assert "\u202e" not in page.source
    assert len(page.ids) == len(set(page.ids))
    assert {there.removeprefix("#") for there in page.refers} <= set(page.ids)


def test_every_picture_is_there_and_the_findings_stand_before_them(page: Page) -> None:
    assert page.of("h3") == ["Refused rows by reason", *CURVES, *SCORES]
    assert page.tags.count("svg") == len(CURVES) + len(SCORES)
    assert page.source.index("scores follow length") < page.source.index("<h2>")
    assert [text for text in page.of("p") if text.startswith("⚠")] == [page.of("p")[1]], (
        "the finding is the one warning of a sound run"
    )
    assert len([text for text in page.of("summary") if text.startswith("margin")]) == 20


def test_the_same_directory_gives_the_same_bytes(run_dir: Path) -> None:
    files = [run_dir / f"report.{suffix}" for suffix in ("html", "md", "json")]
    before = [file.read_bytes() for file in files]
    write_run_report(run_dir)
    assert [file.read_bytes() for file in files] == before


def test_the_cost_is_that_of_the_log(run_dir: Path) -> None:
    """60 steps of 16 pairs and 1600 tokens at 20,000 a second, 4 ms of whose 80 are waited, 1200 computed."""
    rows = {row[""]: row["value"] for row in told(run_dir / "report.html")["sections"]["cost"]["cost"]}
    assert rows["time in steps"] == pytest.approx(60 * 0.08)
    assert rows["pairs a second"] == pytest.approx(200)
    assert rows["tokens a second"] == pytest.approx(20000)
    assert rows["wait for data, of that time"] == pytest.approx(0.05)
    assert rows["tokens spared by sharing beginnings"] == pytest.approx(0.25)
    assert told(run_dir / "report.html")["facts"]["pairs trained on"] == pytest.approx(960)
    (lengths,) = told(run_dir / "report.html")["sections"]["data"]["lengths"]
    assert lengths["mean tokens of a pair"] == pytest.approx(100)


def test_the_curves_are_those_of_the_log_with_evaluations_over_them(run_dir: Path) -> None:
    loss = told(run_dir / "report.html")["sections"]["curves"]["loss"]
    log = records(60)
    assert loss["training"]["value"] == [record["loss"] for record in log if "loss" in record]
    assert loss["evaluation"]["value"] == [record["eval_loss"] for record in log if "eval_loss" in record]
    assert loss["evaluation"]["step"] == list(range(5, 61, 5))


def test_settings_that_differ_from_the_defaults_stand_first(run_dir: Path) -> None:
    settings = told(run_dir / "report.html")["sections"]["settings"]
    changed = {row["setting"]: (row["value"], row["default"]) for row in settings["changed"]}
    assert changed["learning_rate"] == ("3e-05", "0.0001")
    assert "max_length" not in changed, "it was typed, and is the default"
    assert {"setting": "max_length", "value": "1024"} in settings["all"]


def test_data_names_sources_and_what_was_refused_of_them(run_dir: Path) -> None:
    data = told(run_dir / "report.html")["sections"]["data"]
    assert [row["source"] for row in data["sources"]] == [
        "pairs/chat.jsonl",
        "pairs/code.jsonl (weight = 2)",
        "pairs/held.jsonl",
    ]
    assert data["refused"] == [
        {"source": "pairs/chat.jsonl", "too-long": 3, "missing-chosen": 0},
        {"source": "pairs/code.jsonl", "too-long": 0, "missing-chosen": 2},
    ]


def test_an_accuracy_comes_with_its_interval_wherever_it_stands(run_dir: Path) -> None:
    stored = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())["sets"]["held"]["metrics"]
    interval = {
        "value": stored["accuracy"],
        "low": stored["accuracy_low"],
        "high": stored["accuracy_high"],
    }
    found = told(run_dir / "report.html")
    assert found["facts"]["accuracy on held"] == interval
    measures = {row["measure"]: row["held"] for row in found["sections"]["evaluation"]["sets"]}
    assert measures["accuracy"] == interval
    assert measures["the longer one wins"] == stored["length_baseline_accuracy"]
    shown = f"{100 * stored['accuracy']:.1f}% ({100 * stored['accuracy_low']:.1f} to "
    assert shown in (run_dir / "report.md").read_text()
    assert shown in (run_dir / "report.html").read_text()


def test_markdown_says_what_the_page_says_and_texts_change_nothing_in_it(run_dir: Path) -> None:
    text = (run_dir / "report.md").read_text()
    assert "| learning_rate | 3e-05 | 0.0001 |" in text
    assert "> **Warning:** scores follow length &lt;script>" in text
    outside, fence = [], ""
    for line in text.splitlines():
        if not fence and re.fullmatch("~{3,}", line):
            fence = line
        elif line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert fence == ""
    assert len([line for line in outside if line.startswith("# ")]) == 1, "a text's own title is in its fence"
    table = Table("t", ("a", "b"), [("x | y", Number(0.5, "percent"))])
    made = markdown(Report("k", "n", "s", [], [], [Section("s", "S", [table])]))
    assert "| x \\| y | 50.0% |" in made
    fenced = Passage("one", [("text", "~~~~ inside")])
    assert "\n~~~~~\n" in markdown(Report("k", "n", "s", [], [], [Section("s", "S", [fenced])]))


def test_numbers_are_read_in_their_forms() -> None:
    shown = [
        str(Number(value, form))
        for value, form in [
            (0.1234, "percent"), (12345.0, "count"), (-0.5, "signed"), (0.021, "points"), (1e-9, "p"),
            (0.03, "p"), (90.0, "seconds"), (600.0, "seconds"), (9000.0, "seconds"), (float("nan"), "count"),
        ]
    ]  # fmt: skip
    assert shown == [
        "12.3%", "12,345", "-0.500", "+2.1", "< 0.0001", "0.0300", "90 s", "10 min", "2 h 30 min", "–",
    ]  # fmt: skip
    assert plain({"a": np.array([1.0, np.nan])}) == {"a": [1.0, None]}


def test_what_a_reviewer_must_not_miss_is_a_warning(tmp_path: Path) -> None:
    place = write_run(tmp_path / "bad", 40, finished=False)
    log = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    for record in log:
        if "eval_loss" in record and record["step"] > 20:
            record["eval_loss"] = 0.9
        if "data_wait_s" in record:
            record.update(data_wait_s=0.04, skipped_steps=int(record["step"] == 7))
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    with (place / "quarantine.jsonl").open("a") as out:
        out.writelines('{"source": "a", "reason": "missing-chosen"}\n' for _ in range(20))
    warnings = " ".join(told(write_run_report(place))["warnings"])
    assert "has not finished: step 40 of 80" in warnings
    assert "1 step was left out" in warnings
    assert re.search(r"loss on evaluation was least at step (15|20) .* rose to 0\.9", warnings)
    assert "waited for data 50% of its time" in warnings
    assert "22 rows were refused" in warnings, "the three that were too long are not held against the sources"


def test_what_is_not_there_is_a_sentence_and_no_picture(tmp_path: Path) -> None:
    empty = Page(write_run_report(write_run(tmp_path / "empty", 0)).read_text())
    assert "Nothing was logged yet, so that there are no curves to draw." in empty.text
    assert "The finished model was not evaluated on its own." in empty.text
    assert "svg" not in empty.tags
    one = Page(write_run_report(write_run(tmp_path / "one", 1, sets=())).read_text())
    assert "Only step 1 was logged: one point makes no curve." in one.text
    assert "No set was evaluated during training" in one.text
    assert "svg" not in one.tags
    flat = {"flat": constant(planted_outcomes(40), 0.25)}
    made = Page(write_run_report(write_planted(tmp_path / "flat", flat)).read_text())
    assert "Every score is 0.25: the model tells nothing apart" in made.text
    assert "svg" not in made.tags
    only = {"only": planted_outcomes(40, groups=("only",))}
    made = Page(write_run_report(write_planted(tmp_path / "only", only)).read_text())
    assert "All comparisons are of one group (only)" in made.text
    assert made.of("h3") == SCORES[:-1]


def test_a_damaged_file_costs_what_it_held_and_a_note(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run")
    write_planted(place / "evaluation", {"held": planted_outcomes(), "other": planted_outcomes()})
    (place / "run.toml").write_text("[model")
    (place / "progress.json").write_text("{")
    next((place / "evaluation").glob("outcomes-0-*")).write_bytes(b"no parquet")
    with (place / "metrics.jsonl").open("a") as out:
        out.write('{"step": 61, "lo')
    found = told(write_run_report(place))
    notes = " ".join(found["notes"])
    for part in (
        "run.toml is no whole TOML",
        "progress.json is no whole JSON",
        ".parquet cannot be read",
    ):
        assert part in notes
    assert "metrics.jsonl: line" in notes
    assert len(found["sections"]["curves"]["loss"]["training"]["value"]) == 60
    assert "margins" not in found["sections"]["set:held"]
    assert found["sections"]["set:other"]["margins"]["count"] == 800
    assert found["facts"]["accuracy on held"]["value"] > 0.5


def test_a_benchmark_shows_its_own_figures(tmp_path: Path) -> None:
    place = write_planted(tmp_path / "bench", {"held": planted_outcomes(30)})
    file = place / "evaluation.json"
    said = json.loads(file.read_text())
    said["sets"]["held"]["benchmark"] = {"name": "x", "total": 0.5, "sections": {"chat": {"accuracy": 0.75}}}
    file.write_text(json.dumps(said))
    rows = told(write_run_report(place))["sections"]["set:held"]["benchmark"]
    assert [list(row.values()) for row in rows] == [["total", 0.5], ["sections, chat, accuracy", 0.75]]


def test_what_holds_no_run_is_an_error_that_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="is no directory"):
        write_run_report(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match=r"holds no metrics\.jsonl, run\.toml or evaluation\.json"):
        write_run_report(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"It is a sweep: .*/trial-\* --compare"):
        write_run_report(tmp_path)
    place = write_planted(tmp_path / "newer", {"held": planted_outcomes(20)})
    (place / "evaluation.json").write_text('{"format": 2}')
    with pytest.raises(RunDirectoryError, match=r"has format 2, and this version of rayrm reads 1"):
        write_run_report(place)
    run = write_run(tmp_path / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text('{"format": 2}')
    assert "has format 2" in " ".join(told(write_run_report(run))["notes"])


def bars(svg: str, colour: str) -> list[tuple[float, float, float, float]]:
    """left, top, right, bottom of each filled path of a colour."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: var\(--{colour},', svg)
    boxes = []
    for path in found:
        places = np.array(re.findall(r"[ML] ([\d.e+-]+) ([\d.e+-]+)", path), np.float64)
        boxes.append((*places.min(axis=0).tolist(), *places.max(axis=0).tolist()))
    return boxes


def test_the_orange_part_of_the_margins_is_the_share_that_is_wrong() -> None:
    margin = planted_outcomes(5000, skill=0.8).margin
    picture = margins("", margin)
    assert picture is not None
    areas = [
        sum((right - left) * (bottom - top) for left, top, right, bottom in bars(picture.svg, colour))
        for colour in ("c0", "c1")
    ]
    assert areas[1] / sum(areas) == pytest.approx(np.mean(margin <= 0), abs=0.002)
    assert margins("", np.full(5, 1.0)) is None


def test_groups_stand_from_the_best_to_the_worst_and_the_smallest_are_left_to_the_table() -> None:
    groups = [GroupAccuracy(f"g{i:02d}", i / 100, 0.0, 1.0, 0.5, 100 + i) for i in range(70)]
    picture = group_bars("", groups)
    assert picture is not None
    names = re.findall(r">(g\d\d)</text>", picture.svg)
    assert names == [f"g{i:02d}" for i in range(10, 70)], "drawn from below: the best is on top"
    assert "10 smaller groups are in the table alone" in picture.caption
    lengths = sorted(right - left for left, _, right, _ in bars(picture.svg, "c0") if right - left > 8)
    assert lengths[-1] / lengths[0] == pytest.approx(0.69 / 0.10, rel=0.01)
    assert group_bars("", groups[:1]) is None


def test_length_and_reliability_are_drawn_where_there_is_something() -> None:
    length = np.linspace(10, 500, 200)
    picture = score_by_length("", length, 0.004 * length + 1)
    assert picture is not None
    assert "+0.4 of score for 100 tokens more" in picture.caption
    assert score_by_length("", np.full(9, 3.0), length[:9]) is None
    assert reliability_curve("", [Bin(0.5, 0.6, 0.55, 0.5, 0, 0.0)]) is None
    drawn = agreement("", "a", "b", np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, 1]))
    assert drawn is not None
    assert "Top left, 50.0%: b alone is right. Bottom right, 25.0%: a alone is right." in drawn.caption


def test_very_small_numbers_on_an_axis_are_short() -> None:
    picture = curves("Rate", "", [Curve("a", np.arange(5.0), np.arange(5.0) * 1e-7)])
    assert picture is not None
    assert {"1e-7", "2e-7", "3e-7", "4e-7"} <= set(re.findall(r">([^<]+)</text>", picture.svg))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    home = tmp_path_factory.mktemp("compared")
    first, second = write_run(home / "a" / "run", rate=3e-5), write_run(home / "b" / "run", rate=1e-4, seed=1)
    write_planted(first / "evaluation", {"held": planted_outcomes(), "own": planted_outcomes(50)})
    write_planted(second / "evaluation", {"held": planted_outcomes(skill=1.5), "own": planted_outcomes(60)})
    return first, second, write_comparison([first, second], home / "comparison.html")


def test_a_comparison_shows_the_settings_that_differ_and_the_curves_of_both(
    compared: tuple[Path, Path, Path],
) -> None:
    sections = told(compared[2])["sections"]
    assert sections["settings"]["settings"] == [
        {"setting": "learning_rate", "a/run": "3e-05", "b/run": "0.0001"}
    ]
    assert set(sections["curves"]["loss"]) == {"a/run", "b/run"}
    assert set(sections["curves"]["eval_accuracy"]) == {"a/run", "b/run"}
    first = {row["measure"]: row for row in sections["evaluation"]["set:held"]}
    assert first["accuracy"]["b/run"]["value"] > first["accuracy"]["a/run"]["value"]


def test_the_paired_test_is_of_the_second_against_the_first(compared: tuple[Path, Path, Path]) -> None:
    first, second, page = compared
    (row,) = told(page)["sections"]["paired"]["paired"]
    sets = [read_run_files(place).evaluation for place in (first, second)]
    a, b = (one.sets[0].outcomes for one in sets if one is not None)
    assert a is not None
    assert b is not None
    test = compare(b, a)
    assert row["difference (points)"] == {"value": test.difference, "low": test.low, "high": test.high}
    assert test.difference == pytest.approx(np.mean(b.margin > 0) - np.mean(a.margin > 0))
    assert test.difference > 0
    assert row["only model right"] == np.sum((b.margin > 0) & (a.margin <= 0))
    assert row["only a/run right"] == np.sum((a.margin > 0) & (b.margin <= 0))
    assert row["p"] == test.p_value


def test_sets_of_other_comparisons_have_a_sentence_instead_of_a_test(
    compared: tuple[Path, Path, Path],
) -> None:
    (sentence,) = [
        text for text in told(compared[2])["sections"]["paired"]["sentences"] if text.startswith("own")
    ]
    assert "no paired test" in sentence
    assert "50" in sentence
    assert "60" in sentence


def test_runs_of_one_name_are_told_apart_and_one_run_is_no_comparison(tmp_path: Path) -> None:
    places = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"]
    runs = [read_run_files(write_run(place, 2)) for place in places]
    assert names_of(runs[1:]) == ["run", "other"]
    assert names_of(runs) == ["x/run", "y/run", "y/other"]
    with pytest.raises(RunDirectoryError, match="takes two directories or more, and got 1"):
        write_comparison([places[0]], tmp_path / "c.html")


def test_the_command_writes_each_report_and_one_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", 6)
    write_run(tmp_path / "b", 6)
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "report: a/report.html\n"
    assert main(["report", "a", "b", "nowhere"]) == 2
    shown = capsys.readouterr()
    assert "report: b/report.html" in shown.out
    assert "`nowhere` is no directory" in shown.err
    assert main(["report", "a", "b", "--compare"]) == 0
    assert main(["report", "a", "--output", "there"]) == 0
    assert main(["report", "a", "--output", "mine.html"]) == 0
    for stem in ("comparison", "there/report", "mine", "b/report"):
        assert all((tmp_path / f"{stem}.{suffix}").is_file() for suffix in ("html", "md", "json"))
    assert main(["report", "a", "b", "--output", "there"]) == 2
    assert "`--output` (there) names one place, and there are 2 reports" in capsys.readouterr().err
    assert main(["report", "a", "--output", "mine.md"]) == 2
    assert "`--output` (mine.md) is a file" in capsys.readouterr().err
    assert main(["report", "a", "--compare"]) == 2


def test_a_disk_that_takes_no_file_is_an_error_of_ours(tmp_path: Path) -> None:
    report = Report("k", "n", "s", [], [], [])
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        write_report(report, tmp_path / "nowhere" / "report.html")
