"""A gate file: what it may say, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrm.errors import ConfigError
from rayrm.evaluation.gate_settings import read_gate


def gate(tmp_path: Path, text: str) -> Path:
    (tmp_path / "gate.toml").write_text(text)
    return tmp_path / "gate.toml"


def test_what_stands_at_the_head_is_of_every_set_that_does_not_say_otherwise(tmp_path: Path) -> None:
    found = read_gate(
        gate(
            tmp_path,
            "min_accuracy = 0.6\nno_worse = true\n"
            '[sets.chat]\ndata = "chat.jsonl"\nmin_accuracy = 0.8\nmax_ece = 0.1\n'
            '[sets.math]\ndata = ["one.jsonl", "two.jsonl"]\nno_worse = false\nmax_pairs = 100\n',
        )
    )
    assert found["chat"].data == "chat.jsonl"
    assert (found["chat"].min_accuracy, found["chat"].max_ece, found["chat"].no_worse) == (0.8, 0.1, True)
    assert (found["math"].min_accuracy, found["math"].max_ece, found["math"].no_worse) == (0.6, None, False)
    assert (found["math"].data, found["math"].max_pairs) == (["one.jsonl", "two.jsonl"], 100)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("min_accuracy = 0.6\n", r"names no set. Type `\[sets.NAME\]`"),
        ('min_acuracy = 0.6\n[sets.a]\ndata = "a"\n', "`min_acuracy` is no key of a gate"),
        ("[sets.a]\nmin_accuracy = 0.6\n", r"\[sets.a\] `data` is missing"),
        ('[sets.a]\ndata = "a"\n', r"\[sets.a\] asks nothing of a model"),
        ('[sets.a]\ndata = "a"\nallowed_drop = 0.1\n', r"\[sets.a\] asks nothing of a model"),
        ('[sets.a]\ndata = "a"\nmin_accuracy = 60\n', r"\[sets.a\] `min_accuracy` \(60\)"),
        ('[sets.a]\ndata = "a"\nmin_accurac = 0.6\n', r"Did you mean `min_accuracy`\?"),
        ("[sets]\na = 3\n", r"`sets.a` \(3\) must be a table"),
        ("min_accuracy = \n", "is no TOML"),
    ],
)
def test_a_wrong_file_is_told_what_to_type(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_gate(gate(tmp_path, text))
