"""What a kind of preference is: templates of a question with a better and a worse answer, and their fillings.

A template is a wording; its `{slots}` are filled from the tables of `rayrm.demo.tables`. The wording of both
answers belongs to the template, so holding out a template holds out all of its words except the fillings.
By convention templates number i and i + 6 differ in which answer is longer where the wording decides it: any
hold-out of every sixth template is then balanced in length.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Fill = Callable[[random.Random], dict[str, str]]


@dataclass(frozen=True, slots=True)
class Template:
    """One wording: what the user asks, an answer that a person prefers, and one that the same person rejects.

    `fill` draws the values of the slots.
    """

    fill: Fill
    ask: str
    good: str
    bad: str

    def write(self, rng: random.Random) -> tuple[str, str, str]:
        """One filling: (question, better answer, worse answer)."""
        slots = self.fill(rng)
        question, better, worse = (text.format(**slots) for text in (self.ask, self.good, self.bad))
        return _sentence(question), _sentence(better), _sentence(worse)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of preference and its templates (12 or more)."""

    name: str
    templates: tuple[Template, ...]


def wordings(fill: Fill, *texts: tuple[str, str, str]) -> tuple[Template, ...]:
    """Templates that draw from the same table: each text is (question, better answer, worse answer)."""
    return tuple(Template(fill, *text) for text in texts)


def _sentence(text: str) -> str:
    """The text with a capital first letter, unless its template keeps it as it is (a leading `~`)."""
    return text[1:] if text.startswith("~") else text[:1].upper() + text[1:]
