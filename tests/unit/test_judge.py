"""The user's judge: asked in every form it may have, and held to its contract."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrm.errors import ConfigError, ScoreError
from rayrm.rl.judge import Judge, load_judge, ranks_of


def by_length(prompt: str, completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


async def by_length_async(prompt: str, completions: Sequence[str]) -> list[float]:
    await asyncio.sleep(0.01 * (prompt == "a"))
    return [float(len(text)) for text in completions]


def asked(function: Callable[..., Any], *questions: tuple[str, list[str]]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    with Judge(function, "rule", concurrency=2) as judge:
        judge.ask([(place, *question) for place, question in enumerate(questions)], found.__setitem__)
    return found


class Called:
    async def __call__(self, prompt: str, completions: list[str]) -> Any:
        return torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    "function",
    [
        by_length,
        by_length_async,
        lambda prompt, completions: by_length_async(prompt, completions),
        lambda prompt, completions: np.array([len(text) for text in completions]),
        Called(),
    ],
)
def test_judges_of_every_kind_are_asked(function: Callable[..., Any]) -> None:
    assert asked(function, ("a", ["x", "xx"]), ("b", ["y", "yy"])) == {0: [1.0, 2.0], 1: [1.0, 2.0]}


def test_an_async_judge_is_asked_about_so_many_prompts_at_a_time() -> None:
    running, most = 0, 0

    async def judge(prompt: str, completions: list[str]) -> list[float]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return [1.0]

    assert len(asked(judge, *[("a", ["x"])] * 6)) == 6
    assert most == 2


def raises(prompt: str, completions: list[str]) -> list[float]:
    raise RuntimeError("no quota")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raises, r"`rule` failed on the prompt 'the sky': RuntimeError: no quota"),
        (lambda p, c: [1.0], r"'the sky', returned 1 numbers for 2 completions"),
        (lambda p, c: [1.0, float("nan")], r"'the sky', returned nan; a verdict is a finite number"),
        (lambda p, c: [1.0, None], r"'the sky', returned None"),
        (lambda p, c: [True, 2], r"'the sky', returned True"),
        (lambda p, c: 1.0, r"'the sky', returned 1.0; it must return a list of numbers"),
        (lambda p, c: "12", r"'the sky', returned '12'"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_judge_that_breaks_its_contract_is_told_with_the_prompt(
    function: Callable[..., Any], says: str, is_async: bool
) -> None:
    async def awaited(prompt: str, completions: list[str]) -> Any:
        return function(prompt, completions)

    with pytest.raises(ScoreError, match=says):
        asked(awaited if is_async else function, ("the sky", ["x", "y"]))


def test_a_judge_is_found_by_file_or_module_or_the_error_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "mine.py"
    (tmp_path / "rayrm_test_beside.py").write_text("ONE = 1.0\n")
    file.write_text(
        "from rayrm_test_beside import ONE\n"
        "def judge(prompt, completions):\n    return [ONE for _ in completions]\nother = 3\n"
    )
    found: dict[int, list[float]] = {}
    for name in (f"{file}:judge", f"{__name__}:by_length"):
        with load_judge(name) as judge:
            judge.ask([(0, "a", ["x"])], found.__setitem__)
            assert found.popitem() == (0, [1.0])
    for name, says in [
        (f"{file}:juge", r"has no function `juge`. It has judge"),
        (f"{file}:other", r"has no function `other`"),
        (f"{tmp_path}/absent.py:judge", r"cannot be imported: FileNotFoundError: there is no file"),
        ("absent.module:judge", r"cannot be imported: ModuleNotFoundError"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load_judge(name)
    file.write_text("def judge(:\n")
    with pytest.raises(ConfigError, match="cannot be imported: SyntaxError"):
        load_judge(f"{file}:judge")


def test_higher_scores_rank_first_and_equal_ones_alike() -> None:
    assert ranks_of([0.1, 0.9, 0.1, -2.0]) == [2, 1, 2, 3]
