"""The refused rows of a stream: each in the file once, and known by little memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrm.data.blocks import BlockIndex, Refusal, index_of, table_of_rows
from rayrm.data.quarantine import RefusalWatch
from rayrm.data.refusals import RefusalLog, RowNumbers
from rayrm.data.tokenize import TokenizedRow

NAMES = ["a.jsonl", "b.jsonl"]
NUMBERS = st.one_of(st.integers(0, 40), st.integers(2**16 - 20, 2**16 + 20), st.integers(0, 2**62))


def block(*places: tuple[int, int]) -> BlockIndex:
    """A block with one good row and the refused ones at these places."""
    row = TokenizedRow.pair(np.array([1, 2], np.int32), np.array([1, 3], np.int32))
    index = index_of(table_of_rows([row]))
    index.refusals[:] = [Refusal(source, row, "bad-json", f"row {row}", '{"\r é') for source, row in places]
    return index


def log(path: Path) -> RefusalLog:
    return RefusalLog(NAMES, path, RefusalWatch("train", NAMES, 1e9, path))


def written(path: Path) -> list[tuple[str, int]]:
    entries = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [(entry["source"], entry["row"]) for entry in entries]


def test_each_refused_row_is_written_once_whatever_is_read_again_or_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    first = log(path)
    for _ in range(2):
        first.add(block((0, 3), (1, 3), (0, 10**15)))
        first.add(block((0, 4)))
    again = log(path)
    again.add(block((0, 4), (0, 5)))
    again.add(block((0, 3), (1, 3), (0, 10**15)))
    expected = [("a.jsonl", 3), ("b.jsonl", 3), ("a.jsonl", 10**15), ("a.jsonl", 4), ("a.jsonl", 5)]
    assert written(path) == expected


def test_a_line_that_a_kill_cut_off_is_written_again_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    log(path).add(block((0, 3), (0, 4)))
    path.write_bytes(path.read_bytes()[:-9])
    again = log(path)
    again.add(block((0, 3), (0, 4)))
    again.add(block((0, 5)))
    assert written(path) == [("a.jsonl", 3), ("a.jsonl", 4), ("a.jsonl", 5)]


@settings(max_examples=60, deadline=None)
@given(added=st.lists(NUMBERS), asked=st.lists(NUMBERS), dense=st.integers(0, 5000))
def test_row_numbers_are_the_set_of_what_was_added(added: list[int], asked: list[int], dense: int) -> None:
    numbers = RowNumbers()
    known = {*added, *range(0, 3 * dense, 3)}
    for number in [*added, *reversed(range(0, 3 * dense, 3)), *added]:
        numbers.add(number)
    for number in [*asked, *added, *range(0, 16000, 7)]:
        assert (number in numbers) == (number in known)


@pytest.mark.parametrize(("every", "most_bytes"), [(1, 150_000), (20, 2_500_000), (1000, 5_000_000)])
def test_a_million_refused_rows_are_known_by_a_bit_or_a_few_bytes_each(every: int, most_bytes: int) -> None:
    numbers = RowNumbers()
    for number in range(0, 1_000_000 * every, every):
        numbers.add(number)
    assert 999_999 * every in numbers
    assert 1_000_000 * every not in numbers
    held = sum(sys.getsizeof(each) for part in numbers._parts.items() for each in part)
    assert held + sys.getsizeof(numbers._parts) < most_bytes
