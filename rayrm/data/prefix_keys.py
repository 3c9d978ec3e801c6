"""Keys of texts: which rows of a step begin alike or have a text in common, without reading their ids.

Key j of a row is a hash of the first `BOUNDARIES[j]` tokens that all its sequences share, and 0 where they
share fewer. Two rows with equal, non-zero keys at j have at least `BOUNDARIES[j]` tokens in common: a lower
bound, within a factor of two of the truth between the first boundary and the last. A text's own key is a hash
of all of it, by which a completion that stands in several pairs is known.

Invariants, each a test: equal beginnings give equal keys, whatever follows and whatever the ids' type; a
change of any token changes every key from its boundary on; a key is 0 exactly where the shared beginning is
shorter; equal texts have equal keys, and texts that differ in any token do not.

A hash of 32 bits may, rarely, call two beginnings equal that differ (once in about 500 steps of 4096 rows).
Keys only guide the plan: what is computed once is decided later, by comparing ids.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import numpy.typing as npt

BOUNDARIES = tuple(16 << level for level in range(8))
"""16, 32, ... 2048 tokens: the lengths of beginnings that are hashed."""


def prefix_keys(ids: npt.NDArray[np.integer], length: int) -> npt.NDArray[np.uint32]:
    """uint32 `[8]`: the keys of a row whose sequences share `ids[:length]`."""
    # One byte order and width, so that keys made on different machines compare.
    shared = np.ascontiguousarray(ids[: min(length, BOUNDARIES[-1])], dtype="<i4")
    keys = np.zeros(len(BOUNDARIES), dtype=np.uint32)
    key, done = 0, 0
    for level, boundary in enumerate(BOUNDARIES):
        if boundary > len(shared):
            break
        key = zlib.crc32(shared[done:boundary].data, key)
        # 0 means "shorter", so a hash that comes out as 0 takes the value 1.
        keys[level] = key or 1
        done = boundary
    return keys


def text_key(ids: npt.NDArray[np.integer]) -> int:
    """64 bits: the key of a whole text."""
    content = np.ascontiguousarray(ids, dtype="<i4")
    return int.from_bytes(hashlib.blake2b(content.data, digest_size=8).digest(), "little")
