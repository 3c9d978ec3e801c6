"""The reports in a real Chromium: drawn, silent, loading nothing, and legible on a desktop and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rayrm.report.compare import write_comparison
from rayrm.report.run import write_run_report
from tests.chromium import PROGRAM, Chromium
from tests.planted_runs import constant, planted_outcomes, write_planted, write_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine (apt install chromium)")

DESKTOP, PHONE = 1280, 360
VIEWS = [(DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)]
PLOTS = {"run": 12, "evaluation": 9, "comparison": 14, "onestep": 0, "empty": 0}

OVERLAPPING = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const drawn = svg.getBoundingClientRect();
    if (!drawn.width || !drawn.height) continue;
    const boxes = [...svg.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()])
      .filter(([text, box]) => text.trim() && box.width > 0);
    boxes.forEach(([text, box], i) => {
      if (box.left < drawn.left - 1 || box.right > drawn.right + 1 || box.top < drawn.top - 1
          || box.bottom > drawn.bottom + 1) found.push("cut: " + text);
      for (const [other, that] of boxes.slice(i + 1)) {
        const across = Math.min(box.right, that.right) - Math.max(box.left, that.left);
        const down = Math.min(box.bottom, that.bottom) - Math.max(box.top, that.top);
        if (across > 0.5 && down > 3) found.push(text + " / " + other);
      }
    });
  }
  return found;
})()"""
"""Texts of a picture that lie on each other or are cut; boxes may touch by the empty part of a line."""

FAINT = """(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(one => one / 255)
      .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const text of document.querySelectorAll("svg text, td, p, dd, dt, figcaption, h2")) {
    let behind = text.parentElement;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const style = getComputedStyle(text);
    const two = [light(text.namespaceURI.endsWith("svg") ? style.fill : style.color),
                 light(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
    if ((two[0] + 0.05) / (two[1] + 0.05) < 4.5) found.push(text.textContent);
  }
  return found;
})()"""
"""Texts whose contrast is below 4.5, the least of WCAG 2.2, 1.4.3 (https://www.w3.org/TR/WCAG22/)."""

DRAWN = """[...document.querySelectorAll("svg")].filter(svg => {
  const box = svg.getBoundingClientRect();
  return box.width > 200 && box.height > 60 && svg.querySelectorAll("path, use").length > 8;
}).length"""
BEYOND = """Math.max(document.documentElement.scrollWidth,
  ...[...document.querySelectorAll("body > *")].map(one => one.getBoundingClientRect().right))"""
"""How far the page reaches: not by `innerWidth`, which grows with it on a phone."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with everything and long names, several sets, two runs, and runs that have hardly begun."""
    home = tmp_path_factory.mktemp("pages")
    forty = [f"source-{place:02d}/" + "long/name/" * (place % 4) for place in range(40)]
    first = write_run(home / "first", sets=("", "a set of a long name that says what it is"))
    second = write_run(home / "second", rate=1e-6, seed=1, sets=("",))
    for run, skill in ((first, 1.0), (second, 1.4)):
        columns = planted_outcomes(1200, groups=forty, skill=skill, by_length=0.4)
        write_planted(run / "evaluation", {"held": columns}, ["Scores follow length: by 0.53."])
    sets = {
        "chat": planted_outcomes(300),
        "one": planted_outcomes(60, groups=("only",)),
        "flat": constant(planted_outcomes(40), 0.0),
    }
    return {
        "run": write_run_report(first),
        "evaluation": write_run_report(write_planted(home / "evaluation", sets)),
        "comparison": write_comparison([first, second], home / "comparison.html"),
        "onestep": write_run_report(write_run(home / "onestep", 1)),
        "empty": write_run_report(write_run(home / ("empty" * 15), 0)),
    }


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_a_page_is_drawn_silent_and_legible(
    browser: Chromium, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    page = browser.open(pages[name], width, dark=dark)
    assert page.said == []
    assert page.requests == [pages[name].resolve().as_uri()]
    assert page.value(DRAWN) == page.value("document.querySelectorAll('svg').length") == PLOTS[name]
    page.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.value(BEYOND) <= width
    assert page.value(OVERLAPPING) == []
    assert page.value(FAINT) == []
    assert page.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)"
    )
    page.close()


def test_a_wide_table_scrolls_in_its_own_box(browser: Chromium, pages: dict[str, Path]) -> None:
    page = browser.open(pages["comparison"], PHONE)
    wide = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
    assert page.value(wide) > 0
    assert page.value(BEYOND) <= PHONE
    page.close()


def test_an_error_opens_to_its_texts_which_obey_nobody(browser: Chromium, pages: dict[str, Path]) -> None:
    page = browser.open(pages["run"], PHONE)
    page.value("document.querySelector('details.card summary').click()")
    assert page.value("document.querySelector('details.card pre').getBoundingClientRect().height") > 20
    assert "<script>alert" in page.value("document.querySelector('details.card pre').textContent")
    assert page.value("document.querySelectorAll('script, img').length") == 0
    page.close()


def test_each_check_fails_on_a_page_that_is_wrong(browser: Chromium, tmp_path: Path) -> None:
    (tmp_path / "wrong.html").write_text(
        """<!DOCTYPE html><meta name="viewport" content="width=device-width, initial-scale=1">
        <body style="background: #fff"><p style="color: #ccc; width: 500px">faint</p>
        <img src="missing.png"><script>console.log("heard"); missing()</script>
        <svg viewBox="0 0 100 100" width="300"><text x="10" y="50">one</text><text x="15" y="52">two</text>
        <text x="95" y="20">cut off</text></svg></body>"""
    )
    page = browser.open(tmp_path / "wrong.html", PHONE)
    assert any("heard" in text for text in page.said)
    assert any("missing is not defined" in text for text in page.said)
    assert any(address.endswith("missing.png") for address in page.requests)
    assert page.value(DRAWN) == 0
    assert page.value(BEYOND) > PHONE
    assert page.value(OVERLAPPING) == ["one / two", "cut: cut off"]
    assert page.value(FAINT) == ["faint"]
    page.close()
