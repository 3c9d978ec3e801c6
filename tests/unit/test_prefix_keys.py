"""Keys of beginnings: equal where the beginnings are, different where any token is, 0 where there is none."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.prefix_keys import BOUNDARIES, prefix_keys, text_key

Ids = npt.NDArray[np.int32]
SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.one_of(
    st.integers(0, 5000),
    st.sampled_from([boundary + step for boundary in BOUNDARIES for step in (-1, 0, 1)]),
)


def drawn(seed: int, length: int) -> Ids:
    return np.random.default_rng(seed).integers(0, 200_000, length, dtype=np.int32)


@given(SEEDS, LENGTHS, st.integers(0, 100))
def test_a_key_is_zero_exactly_where_the_shared_beginning_is_shorter(
    seed: int, length: int, rest: int
) -> None:
    keys = prefix_keys(drawn(seed, length + rest), length)
    assert keys.dtype == np.uint32
    assert (keys != 0).tolist() == [boundary <= length for boundary in BOUNDARIES]


@given(SEEDS, LENGTHS, LENGTHS, st.sampled_from([np.int32, np.int64, np.uint32]))
def test_equal_beginnings_give_equal_keys_whatever_follows(
    seed: int, length: int, other_length: int, kind: type[np.integer]
) -> None:
    ids = drawn(seed, max(length, other_length) + 3)
    other = ids.astype(kind)
    other[other_length:] += 1
    keys, others = prefix_keys(ids, length), prefix_keys(other, other_length)
    both = [boundary <= min(length, other_length) for boundary in BOUNDARIES]
    assert ((keys == others) & (keys != 0)).tolist() == both


@given(SEEDS, st.integers(1, 2500), st.data())
def test_a_changed_token_changes_every_key_from_its_boundary_on(
    seed: int, length: int, data: st.DataObject
) -> None:
    ids = drawn(seed, length)
    place = data.draw(st.integers(0, length - 1))
    other = ids.copy()
    other[place] += data.draw(st.integers(1, 1000))
    same = prefix_keys(ids, length) == prefix_keys(other, length)
    # Without a shared beginning of that length both keys are 0. Bits that differ within 32 neighbouring ones
    # always change a CRC, so this does not fail by chance.
    expected = [boundary <= place or boundary > length for boundary in BOUNDARIES]
    assert same.tolist() == expected


def test_strided_ids_have_the_keys_of_their_copy() -> None:
    ids = drawn(7, 300)
    assert prefix_keys(ids[::2], 150).tolist() == prefix_keys(ids[::2].copy(), 150).tolist()


def test_a_hash_that_comes_out_as_zero_is_not_taken_for_a_short_beginning() -> None:
    head = np.arange(15, dtype="<i4")
    # CRC-32 of the four bytes 0x6DD90A9D is 0; after other bytes the same holds with their CRC added.
    last = zlib.crc32(head.tobytes()) ^ 0x6DD90A9D
    ids = np.append(head, np.array([last], dtype="<u4").view("<i4"))
    assert zlib.crc32(ids.tobytes()) == 0
    assert prefix_keys(ids, 16)[0] == 1


@given(SEEDS, st.integers(1, 300), st.sampled_from([np.int64, np.uint32]), st.data())
def test_a_text_has_the_key_of_its_ids_and_no_other_text_has_it(
    seed: int, length: int, kind: type[np.integer], data: st.DataObject
) -> None:
    ids = drawn(seed, length)
    assert text_key(ids) == text_key(ids.astype(kind)) == text_key(np.repeat(ids, 2)[::2])
    other = ids.copy()
    other[data.draw(st.integers(0, length - 1))] += 1
    # 64 bits: two of them are equal by chance once in 1e19 draws.
    assert text_key(ids) != text_key(other)
    assert text_key(ids) != text_key(ids[:-1])
