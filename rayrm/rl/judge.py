"""The user's judge, which ranks the completions of a prompt: found by its name, held to its contract.

    judge(prompt, completions) -> one finite number for each completion, higher is better, equal ones allowed

It may be async; prompts and completions are strings or message lists, as the samples have them. What it
raises, and any other answer, is an error that names the prompt: a preference is never made up.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from rayrm.data.messages import Text, shown
from rayrm.errors import ConfigError, ScoreError

Verdict = Callable[[int, list[float]], None]
"""Told the place of a question, and the scores of its completions."""
Question = tuple[int, Text, Sequence[Text]]
"""A place to tell it by, the prompt, its completions."""


class Judge:
    """A judge that is asked about several prompts, `concurrency` at a time where it is async.

    All its calls are made by one event loop, which ends with the `with` block.
    """

    def __init__(self, function: Callable[..., Any], name: str = "judge", *, concurrency: int = 8) -> None:
        self.name = name
        self._function = function
        self._concurrency = concurrency
        self._runner = asyncio.Runner()

    def ask(self, questions: Iterable[Question], verdict: Verdict) -> None:
        """Ask each question and tell `verdict` each answer as soon as it is there.

        Raises ScoreError naming the prompt; the answers before it were told.
        """
        called = getattr(self._function, "__call__", None)  # noqa: B004 - objects with an async __call__
        if inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(called):
            self._runner.run(self._ask_together(list(questions), verdict))
            return
        # In no event loop: a judge may have one of its own, or ask a reward service.
        for place, prompt, completions in questions:
            answer = self._called(prompt, completions)
            if inspect.isawaitable(answer):
                answer = self._runner.run(self._awaited(answer, prompt))
            verdict(place, self._checked(answer, prompt, completions))

    async def _ask_together(self, questions: list[Question], verdict: Verdict) -> None:
        waiting = iter(questions)

        async def ask_on() -> None:
            for place, prompt, completions in waiting:
                answer = await self._awaited(self._called(prompt, completions), prompt)
                verdict(place, self._checked(answer, prompt, completions))

        # The first that fails ends the others.
        asking = [asyncio.ensure_future(ask_on()) for _ in range(self._concurrency)]
        try:
            await asyncio.gather(*asking)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    def _called(self, prompt: Text, completions: Sequence[Text]) -> Any:
        try:
            return self._function(prompt, list(completions))
        except Exception as error:  # the user's code: whatever it raises is told with its prompt
            raise self._failed(prompt, error) from error

    async def _awaited(self, answer: Awaitable[Any], prompt: Text) -> Any:
        try:
            return await answer
        except Exception as error:  # as above
            raise self._failed(prompt, error) from error

    def _failed(self, prompt: Text, error: Exception) -> ScoreError:
        return ScoreError(
            f"the judge `{self.name}` failed on the prompt {shown(prompt)}: {type(error).__name__}: {error}. "
            "Mend it, then start the same command again: what it has judged is kept."
        )

    def _checked(self, answer: Any, prompt: Text, completions: Sequence[Text]) -> list[float]:
        asked = f"the judge `{self.name}`, asked about the prompt {shown(prompt)},"
        if isinstance(answer, str | bytes) or not hasattr(answer, "__iter__"):
            raise ScoreError(
                f"{asked} returned {shown(answer)}; it must return a list of numbers, one for each of "
                f"{len(completions)} completions."
            )
        scores = [item.item() if hasattr(item, "item") else item for item in answer]  # numpy's, torch's
        if len(scores) != len(completions):
            raise ScoreError(
                f"{asked} returned {len(scores)} numbers for {len(completions)} completions; it must return "
                "one for each, in their order."
            )
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
                raise ScoreError(
                    f"{asked} returned {shown(score)}; a verdict is a finite number, higher is better."
                )
        return [float(score) for score in scores]

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close()


def load_judge(name: str, *, concurrency: int = 8) -> Judge:
    """The judge of "path/to/file.py:function" or "package.module:function".

    Raises ConfigError: no such file, module or function, or an error in it while it is imported.
    """
    place, _, function = name.rpartition(":")
    file = Path(place) if place.endswith(".py") else None
    # What lies beside the judge, or where the command is typed, can be imported; it goes before nothing.
    beside = str(Path.cwd() if file is None else file.absolute().parent)
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        module = importlib.import_module(place) if file is None else _module_of_file(file)
    except Exception as error:  # the user's module: whatever its import raises is told
        raise ConfigError(
            f"`judge` ({name!r}): {place} cannot be imported: {type(error).__name__}: {error}. Give the "
            "path of a Python file, or a module that `python -c 'import ...'` finds."
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"`judge` ({name!r}): {place} has no function `{function}`. "
            f"It has {', '.join(known) or 'none'}; type one of them after the colon."
        )
    return Judge(found, name, concurrency=concurrency)


def _module_of_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r} in {Path.cwd()}")
    # Under a name of its own, by which its classes pickle, and never another module's.
    name = f"rayrm_judge_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Ranks from 1 for the best, equal scores alike and no gaps: [0.1, 0.9, 0.1] -> [2, 1, 2]."""
    places = {score: place for place, score in enumerate(sorted(set(scores), reverse=True), start=1)}
    return [places[score] for score in scores]
