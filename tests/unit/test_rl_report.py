"""A run directory of RL as a page: what it shows, that it loads nothing, and damaged files."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.errors import RunDirectoryError
from rayrm.report.figures import Curve, curves, hacking_picture, histogram, paired_dots, shares
from rayrm.report.page import visible
from rayrm.report.rl import write_rl_report
from rayrm.rl.guard import GuardSettings
from rayrm.rl.heldout import paired_gain

VERSIONS = ("3f2a91bc04de", "77c01d2e9a10")
ROLL = 60
EVIL = 'Sure <script>alert("x")</script> <img src="http://evil.example/x.png"> \x1b[31m\u202e\ud800'
VOID = {"meta", "img", "br", "path", "use", "rect"}
CURVES = [
    "Reward",
    "KL from the reference",
    "Entropy",
    "Completion length",
    "Score beside gold",
    "Spread of the ensemble",
    "Length correlation",
    "Repetition",
    "Latency of a reward call",
    "Retries",
    "Truncated texts",
]
HELDOUT = ["Held-out rewards", "Held-out reward by prompt"]


def records(steps: int, *, hacked: bool, seed: int = 0) -> list[dict[str, Any]]:
    """A run's log. `hacked`: the score rises throughout, and from step 50 on everything else goes wrong."""
    rng = np.random.default_rng(seed)
    made = []
    for step in range(1, steps + 1):
        noise = rng.standard_normal(12).tolist()
        wrong, rise = (max(step - 50, 0), 0.012 * step) if hacked else (0, 0.0)
        newer = float(step > ROLL) if step != ROLL else 0.5
        made.append(
            {
                "step": step,
                "loss": 0.1 * noise[0],
                "reward": -0.4 + rise + 0.1 * noise[1],
                "reward_std": 0.6,
                "kl": 0.05 + 0.012 * wrong + 0.005 * noise[2],
                "entropy": 2.0 + 0.05 * noise[3],
                "completions/mean_length": 48 + 0.9 * wrong + 4 * noise[4],
                "rm/score_mean": -0.4 + rise + 0.1 * noise[1],
                "rm/score_std": 0.6,
                "rm/gold_mean": -0.3 - 0.012 * wrong + 0.1 * noise[5],
                "rm/spread": 0.2 + 0.004 * wrong + 0.02 * noise[6],
                "rm/length_correlation": 0.1 + 0.6 * (wrong > 0) + 0.1 * noise[7],
                "rm/repetition": 0.1 + 0.003 * wrong + 0.02 * noise[8],
                "rm/latency_s": 0.05 + 0.005 * noise[9],
                "rm/retries": float(step == ROLL),
                "rm/truncated": 0.0,
                f"rm/version/{VERSIONS[0]}": 1 - newer,
                "versions": list(VERSIONS),
            }
            | ({f"rm/version/{VERSIONS[1]}": newer} if newer else {})
        )
    return [*made, {"step": steps, "train_runtime": 400.0}]


def make_run(place: Path, steps: int, *, hacked: bool = False, prompts: int = 32) -> Path:
    """A whole run directory, as a training run leaves it."""
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in records(steps, hacked=hacked))
    )
    rng = np.random.default_rng(1)
    before = (rng.standard_normal((prompts, 1)) + 0.4 * rng.standard_normal((prompts, 4))).tolist()
    after = [[reward + 0.9 * hacked + 0.1 * float(rng.standard_normal()) for reward in row] for row in before]
    heldout = {
        "prompts": [f"Topic {place} & why?" for place in range(prompts)],
        "before": before,
        "after": after,
        "gain": dataclasses.asdict(paired_gain(before, after)),
        "samples_before": [[EVIL, "second", "third", "fourth"] for _ in range(prompts)],
        "samples_after": [
            [[{"role": "assistant", "content": f"learned {place}"}]] * 4 for place in range(prompts)
        ],
    }
    (place / "heldout.json").write_text(json.dumps(heldout))
    samples = [
        {
            "step": step,
            "prompt": [{"role": "user", "content": f"Question {(step + one) % 8}"}],
            "completion": [{"role": "assistant", "content": f"answer of step {step}, number {one}"}],
            "score": step + 0.1 * one,
        }
        for step in range(1, steps + 1)
        for one in range(4)
    ]
    (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (place / "run.toml").write_text('[policy]\nname = "<b>tiny</b>"\n')
    return place


class Page(HTMLParser):
    """The page as a reader's program sees it: tags balanced, texts, references, ids."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._attributes(attrs)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name.rpartition(":")[2] in ("src", "href", "srcset", "action", "data"):
                self.refers.append(str(value))
            self.refers += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(text for _, text in self.texts))


def page(run_dir: Path) -> Page:
    return Page(write_rl_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hacked(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page(make_run(tmp_path_factory.mktemp("rl") / "hacked", 120, hacked=True))


@pytest.fixture(scope="module")
def quiet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("rl") / "quiet", 60)


def test_the_page_loads_nothing_and_runs_nothing(hacked: Page) -> None:
    assert hacked.refers
    assert [there for there in hacked.refers if not there.startswith("#")] == []
    assert {"script", "link", "iframe", "object", "img"} & set(hacked.tags) == set()
    assert "@import" not in hacked.source
    assert "default-src 'none'" in hacked.source


def test_every_id_is_told_once_and_every_reference_is_met(hacked: Page) -> None:
    """Fifteen pictures in one page, each with clips and marks of its own."""
    assert len(hacked.ids) == len(set(hacked.ids))
    assert {there.removeprefix("#") for there in hacked.refers} <= set(hacked.ids)


def test_each_plot_has_its_title_and_text_that_stays_text(hacked: Page) -> None:
    wanted = ["Reward against its checks", *HELDOUT, *CURVES, "Versions of the reward model"]
    assert hacked.of("h3")[: len(wanted)] == wanted
    assert hacked.of("title")[1:] == wanted
    assert hacked.tags.count("svg") == len(wanted)
    assert hacked.of("text").count("step") == len(wanted) - len(HELDOUT)
    for unit in (
        "nats per token",
        "tokens",
        "seconds",
        "share of n-grams that came before",
        "a prompt's mean reward",
    ):
        assert unit in hacked.of("text")


def test_pictures_have_colours_of_the_page_in_light_and_in_dark(hacked: Page) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", hacked.source, flags=re.S)
    used = set(re.findall(r"var\((--\w+)", hacked.source))
    assert {"--ink", "--muted", "--grid", "--c0", "--c1"} <= used
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", scheme))
    drawn = hacked.source[hacked.source.index("<svg") :]
    bare = re.sub(r"var\([^)]*\)", "", drawn)
    assert re.findall(r"(?:fill|stroke): (?:#\w+|black|white)", bare) == []


def test_warnings_stand_on_top_and_their_panels_are_shaded(hacked: Page) -> None:
    warned = [text for text in hacked.of("p") if text.startswith("⚠")]
    assert len(warned) == 5
    for sign in (
        "gold reward falls",
        "members' spread grows",
        "tracks length",
        "repeat themselves",
        "the KL from",
    ):
        assert sum(sign in text for text in warned) == 1
    assert hacked.source.index("⚠") < hacked.source.index("<svg")
    first = hacked.source[hacked.source.index("<svg") : hacked.source.index("</svg>")]
    assert first.count("opacity: 0.14") == 5
    assert "No sign" not in hacked.text


def test_the_gain_is_the_headline(hacked: Page) -> None:
    assert re.search(
        r"gain \+0\.\d+ \(95% interval \+0\.8\d+ to \+0\.9\d+\), 128 fresh samples of 32 prompts", hacked.text
    )
    assert "got better" in hacked.text
    assert "32 of 32 prompts gained" in hacked.text


def test_what_a_policy_wrote_is_shown_and_never_obeyed(hacked: Page) -> None:
    assert "&lt;script&gt;alert" in hacked.source
    shown = next(text for text in hacked.of("pre") if text.startswith("Sure"))
    assert shown == (
        'Sure <script>alert("x")</script> <img src="http://evil.example/x.png"> <U+001B>[31m<U+202E><U+D800>'
    )
    assert "[assistant] learned 0" in " ".join(hacked.of("pre")) or "[assistant] learned" in hacked.text
    assert '[policy] name = "<b>tiny</b>"' in hacked.text
    assert "b" in hacked.tags  # the headline's own
    assert "<b>tiny" not in hacked.source


def test_versions_and_the_roll_between_them_are_told(hacked: Page) -> None:
    """Version 1 gives steps 1-59 and half of 60 (49.6% of 120 steps), version 2 the rest."""
    cells = hacked.of("td")
    assert cells == [VERSIONS[0], "1", "60", "49.6%", VERSIONS[1], "60", "120", "50.4%"]


def test_the_highest_scores_lately_are_listed(hacked: Page) -> None:
    tops = [text for text in hacked.of("pre") if text.startswith("[assistant] answer")]
    assert tops == [f"[assistant] answer of step {step}, number {one}" for step, one in
                    [(120, 3), (120, 2), (120, 1), (120, 0), (119, 3)]]  # fmt: skip


def test_noise_has_no_sign_and_the_same_directory_gives_the_same_bytes(quiet_dir: Path) -> None:
    first = write_rl_report(quiet_dir).read_bytes()
    assert "No sign was found in what was watched." in first.decode()
    assert "The interval holds zero" in first.decode() or "by this reward" in first.decode()
    assert write_rl_report(quiet_dir).read_bytes() == first
    assert [file.name for file in quiet_dir.iterdir() if "report" in file.name] == ["report.html"]


def test_settings_of_the_guard_reach_the_report(tmp_path: Path) -> None:
    rows = [{"step": step, "kl": 0.05} for step in range(1, 16)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "beyond the bound" not in page(tmp_path).text
    strict = write_rl_report(tmp_path, GuardSettings(max_kl=0.01)).read_text(encoding="utf-8")
    assert "beyond the bound of 0.01" in strict


def test_half_a_line_of_a_killed_run_is_left_out_with_a_note(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4, "rew')
    with (run / "samples.jsonl").open("ab") as out:
        out.write(b'[1]\n\n{"prompt": "\xff')
    made = page(run)
    assert "metrics.jsonl: line 5 holds no whole JSON object" in made.text
    assert "samples.jsonl: 2 lines, the first 13, holds no whole JSON object" in made.text
    assert "the last at step 3" in made.text


def test_a_run_of_one_step_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", 1)
    (run / "heldout.json").unlink()
    made = page(run)
    assert set(CURVES) <= set(made.of("h3"))
    assert "1 logging event, the last at step 1" in made.text
    assert "trends need 20, and this run has 1." in made.text
    assert "running mean" not in made.text
    assert "heldout.json is missing" in made.text
    assert "Held-out" not in " ".join(made.of("h3"))


def test_a_run_that_logged_nothing_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    made = page(tmp_path)
    assert "svg" not in made.tags
    assert "nothing was logged" in made.text
    assert "Nothing was watched" in made.text
    for file in ("heldout.json", "samples*.jsonl", "run.toml"):
        assert f"{file} is missing" in made.text


def test_what_the_log_lacks_is_named(tmp_path: Path) -> None:
    rows = [{"step": step, "reward": 0.1 * step, "kl": float("nan")} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = page(tmp_path)
    assert made.of("h3") == ["Reward"]
    assert "Not in this run's log: KL from the reference; Entropy;" in made.text
    assert "Nothing was watched" in made.text
    assert "no gold reward, no spread of an ensemble" in made.text


def test_of_several_rewards_the_completions_are_drawn_once_beside_the_weighted_sum(tmp_path: Path) -> None:
    rows = [
        {"step": step, "kl": 0.1, "completions/mean_length": 9.0, "a+b/score_mean": 1.5 * step}
        | {f"{name}/{key}": 0.1 * step for name in "ab" for key in ("score_mean", "repetition", "spread")}
        for step in range(1, 6)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = page(tmp_path).of("text")
    assert found.count("weighted sum of scores") == 1
    assert found.count("reward model's score") == 2
    assert found.count("ensemble's spread") == 2
    assert found.count("completion length (tokens)") == found.count("KL (nats per token)") == 1
    assert found.count("repetition (share of n-grams)") == 1


def test_without_held_out_texts_the_first_and_last_completion_of_a_prompt_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 30)
    (run / "heldout.json").unlink()
    made = page(run)
    # Question 1 is asked first as number 0 of step 1, last as number 3 of step 30.
    pres = made.of("pre")
    place = pres.index("[user] Question 1")
    assert pres[place + 1] == "[assistant] answer of step 1, number 0"
    assert pres[place + 2] == "[assistant] answer of step 30, number 3"


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    told = [1, 2, 3, 4, 3, 4, 5]
    rows = [{"step": step, "reward": float(place)} for place, step in enumerate(told)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = page(tmp_path)
    assert "5 logging events, the last at step 5" in made.text


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("{", "no whole JSON"),
        ("[]", "holds no JSON object"),
        ('{"before": [[1.0]]}', "KeyError"),
        ('{"before": [[1.0]], "after": [[NaN]]}', "no finite number"),
        ('{"before": [[1.0]], "after": [[1.0], [2.0]]}', "1 and 2 prompts"),
        (
            '{"before": [[1.0]], "after": [[2.0]], "gain": {"before": 1, "after": 2, "gain": 3.0, "low": 1, '
            '"high": 1, "num_samples": 1, "num_prompts": 1}}',
            "its gain is 3 and its rewards give 1",
        ),
    ],
)
def test_a_heldout_file_that_holds_something_else_is_left_out_with_a_note(
    tmp_path: Path, text: str, note: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "heldout.json").write_text(text)
    made = page(tmp_path)
    assert note in made.text
    assert "heldout.json" in made.text
    assert "svg" not in made.tags


def test_a_directory_that_no_run_left_is_an_error_that_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"holds no metrics.jsonl.*rayrm rl run.toml"):
        write_rl_report(tmp_path)
    with pytest.raises(RunDirectoryError, match="is no directory"):
        write_rl_report(tmp_path / "nowhere")


def test_invisible_characters_are_written_out() -> None:
    assert visible("a\r\nb\tc\rd\x00\u202ee") == "a\nb\tc<U+000D>d<U+0000><U+202E>e"
    assert visible("naïve 日本 👍🏽") == "naïve 日本 👍🏽"


def line_points(svg: str, colour: str, width: str) -> np.ndarray:
    """The corners of the line that is drawn so, in the picture's points."""
    found = re.findall(
        r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--(\w+)[^"]*stroke-width: ([\d.]+)', svg
    )
    # A legend's stroke has the same look and two corners.
    path = max((d for d, name, drawn in found if (name, drawn) == (colour, width)), key=len)
    return np.array([[float(x) for x in pair.split()] for pair in re.split(r"[ML]", path) if pair.strip()])


def test_a_curve_lies_where_its_values_say() -> None:
    """Steps 1, 2, 4 with values 0, 1, 3 lie on one line, and the second a third of the way."""
    picture = curves("T", "u", [Curve("", np.array([1.0, 2, 3, 4]), np.array([0.0, 1, np.nan, 3]))])
    assert picture is not None
    points = line_points(picture.svg, "c0", "1.6")
    (x1, y1), (x2, y2), (x3, y3) = points
    assert (x2 - x1) / (x3 - x1) == pytest.approx(1 / 3, abs=1e-3)
    assert (y2 - y1) / (y3 - y1) == pytest.approx(1 / 3, abs=1e-3)
    assert y3 < y1  # upwards


def test_a_long_curve_is_thinned_to_its_means() -> None:
    """4000 values of a line are 400 means of 10: the first is 4.5, and the ends of the picture stay."""
    values = np.arange(4000.0)
    picture = curves("T", "u", [Curve("", values, values)])
    assert picture is not None
    assert len(picture.svg) < 60_000
    points = line_points(picture.svg, "c0", "0.8")
    assert len(points) <= 400
    straight = np.interp(points[:, 0], points[[0, -1], 0], points[[0, -1], 1])
    assert np.abs(points[:, 1] - straight).max() < 0.5


def test_a_histogram_holds_shares_of_each_group() -> None:
    """Three of four values in the first bin, one in the last: a third as high, and nothing between."""
    picture = histogram("T", "u", {"before": np.array([0.0, 0, 0, 1])})
    assert picture is not None
    heights = line_points(picture.svg, "c1", "1.6")[:, 1]
    ground = heights.max()
    tall, low = sorted(set((ground - heights).round(3)) - {0.0}, reverse=True)
    assert tall / low == pytest.approx(3, abs=0.01)
    # The upright axis ends between 0.6 and 0.8, the other at 1.0: three of four, not three.
    assert [picture.svg.count(f">{tick}<") for tick in ("0.6", "0.8", "1.0")] == [2, 1, 1]


def test_the_hacking_picture_draws_what_there_is() -> None:
    steps = np.arange(1.0, 31.0)
    nothing = np.full(30, np.nan)
    series = {"score": ("", steps), "gold": ("", nothing), "length": ("tokens", steps)}
    picture = hacking_picture(series, steps, {"length": 10.0}, rolls=[5.0])
    assert picture is not None
    assert picture.svg.count("opacity: 0.14") == 1
    assert "gold" not in picture.svg
    assert "length (tokens)" in picture.svg
    assert hacking_picture({"score": ("", nothing)}, steps, {}) is None


def test_pictures_of_nothing_are_none() -> None:
    nothing = np.array([], np.float64)
    assert curves("T", "u", [Curve("", nothing, nothing)]) is None
    assert histogram("T", "u", {"a": nothing}) is None
    assert paired_dots("T", "u", nothing, nothing) is None
    assert shares("T", nothing, {}) is None


def test_names_with_marks_of_markup_or_formulas_are_drawn_as_they_are() -> None:
    one = np.ones(3)
    drawn = [Curve("a_$x^2$ <b> & 日本", np.arange(3.0), one), Curve("other", np.arange(3.0), one)]
    picture = curves('T "quoted" <b>', "$u_1$", drawn)
    assert picture is not None
    assert "a_$x^2$ &lt;b&gt; &amp; 日本" in picture.svg
    assert "$u_1$" in picture.svg
    assert "<b>" not in picture.svg


def test_the_report_is_imported_without_matplotlib_torch_or_ray() -> None:
    code = "import sys, rayrm.report.rl; print(*{'matplotlib', 'torch', 'ray', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
