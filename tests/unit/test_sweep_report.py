"""A sweep as a page: what it shows, that it loads nothing, and where the pictures put the trials."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from rayrm.report.sweep import write_sweep_report
from rayrm.report.sweep_figures import Point, Scale, by_parameter, over_steps, parallel_coordinates
from rayrm.train.sweep_record import Sweep, Trial, best_of
from tests.unit.test_rl_report import Page

EVIL = "<script>alert(1)</script>\u202e"


def write_curve(directory: Path, values: list[float]) -> None:
    directory.mkdir(parents=True)
    rows = [{"step": step, "eval_accuracy": value} for step, value in enumerate(values, start=1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "progress.json").write_text(json.dumps({"num_steps": 10, "finished": len(values) == 10}))


def make_sweep(home: Path, num_trials: int = 16, mode: str = "max") -> Sweep:
    """Trials of which every fourth was stopped at 30% and the last failed."""
    draw, trials = random.Random(0), []
    for number in range(1, num_trials + 1):
        rate = 10 ** draw.uniform(-6, -3)
        words = (
            f"learning_rate={rate!r}",
            f"model.lora.r={draw.choice((4, 8, 16))}",
            f"lr_scheduler_type={draw.choice(('linear', 'cosine'))}",
            f"warmup_steps={draw.uniform(0, 0.2):.4g}",
        )
        directory = home / f"trial-{number:02d}"
        if number == num_trials:
            trials.append(Trial(words, directory, failure=EVIL))
            continue
        top = 0.75 - 0.05 * (math.log10(rate) + 4.5) ** 2
        values = [0.5 + (top - 0.5) * step / 10 + 0.01 * draw.gauss(0, 1) for step in range(1, 11)]
        stopped = number % 4 == 0
        values = values[:3] if stopped else values
        write_curve(directory, values)
        trials.append(Trial(words, directory, values[-1], stopped_at=30.0 if stopped else None))
    return Sweep("eval_accuracy", "max", home, trials, best_of(trials, "max"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    sweep = make_sweep(tmp_path_factory.mktemp("report") / "sweep")
    return Page(write_sweep_report(sweep).read_text(encoding="utf-8"))


def test_the_page_loads_nothing_runs_nothing_and_obeys_nobody(page: Page) -> None:
    assert [there for there in page.refers if not there.startswith("#")] == []
    assert {"script", "link", "iframe", "object", "img"} & set(page.tags) == set()
    assert "default-src 'none'" in page.source
    assert "failed: &lt;script&gt;alert(1)&lt;/script&gt;&lt;U+202E&gt;" in page.source
    assert len(page.ids) == len(set(page.ids))


def test_the_page_has_each_picture_and_every_trial(page: Page, tmp_path: Path) -> None:
    assert page.of("h3") == [
        "All parameters",
        "Over the steps",
        "learning_rate",
        "model.lora.r",
        "lr_scheduler_type",
        "warmup_steps",
    ]
    assert "A sweep of 16 trials, 3 stopped early, 1 failed; more eval_accuracy is better." in page.text
    names = [text for text in [*page.of("td"), *page.of("b")] if text.startswith("trial-")]
    assert len(set(names)) == 16
    assert page.of("td").count("stopped at 30% of its steps") == 3
    assert page.of("td").count("best") == 1
    again = make_sweep(tmp_path / "sweep")
    assert write_sweep_report(again).read_bytes() == write_sweep_report(again).read_bytes()


def test_an_axis_is_logarithmic_from_a_factor_of_ten_and_has_a_place_for_each_word() -> None:
    assert Scale.of(["1e-5", "1e-4"]).log
    assert not Scale.of(["1e-5", "9e-5"]).log
    assert not Scale.of(["0", "100"]).log
    words = Scale.of(["linear", "cosine", "linear"])
    assert [words.place(word) for word in ("linear", "cosine")] == [0.0, 1.0]


def lines(svg: str) -> dict[str, np.ndarray]:
    """The corners of each drawn line, by its colour."""
    dashes = r"(?:-dasharray: [^;]*; stroke-dashoffset: [^;]*; stroke)?"
    found = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke' + dashes + r": var\(--(\w+)", svg)
    return {
        colour: np.array([[float(x) for x in pair.split()] for pair in re.split(r"[ML]", d) if pair.strip()])
        for d, colour in found
        if d.count("L") == 2
    }


def test_a_trial_s_line_goes_through_its_values() -> None:
    """Rates 1e-6, 1e-5 and 1e-2 lie at 0, a quarter and 1 of a logarithmic axis, ranks 2, 4, 6 evenly, and of
    losses 1, 2, 5 the second lies a quarter of the way."""
    points = [
        Point("trial-01", ("1e-6", "2"), 1.0, best=True),
        Point("trial-02", ("1e-5", "4"), 2.0),
        Point("trial-03", ("1e-2", "6"), 5.0, stopped=True),
    ]
    picture = parallel_coordinates(("learning_rate", "r"), "eval_loss", points)
    assert picture is not None
    drawn = lines(picture.svg)
    best, other, stopped = (drawn[colour][:, 1] for colour in ("c1", "c0", "muted"))
    # Upwards the picture's numbers fall.
    assert (best - other) / (best - stopped) == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)
    assert picture.caption == "Orange: the best trial; the fainter, the worse. Grey, dashed: stopped early."


def test_what_there_is_too_little_of_is_not_drawn() -> None:
    one = [Point("trial-01", ("1e-6",), 1.0, best=True, curve=[(100.0, 1.0)])]
    assert parallel_coordinates(("learning_rate",), "eval_loss", one) is None
    assert by_parameter("learning_rate", 0, "eval_loss", one) is None
    assert over_steps("eval_loss", one) is None


def test_a_sweep_without_a_best_has_a_page(tmp_path: Path) -> None:
    trials = [Trial(("seed=1",), tmp_path / "trial-01", failure="lost")]
    made = Page(write_sweep_report(Sweep("eval_loss", "min", tmp_path, trials, None)).read_text())
    assert "No trial came to its end." in made.text
    assert "svg" not in made.tags
