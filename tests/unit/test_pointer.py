"""What a roll makes of the record of versions."""

from __future__ import annotations

from rayrm.serve.pointer import Pointer
from rayrm.serve.request import ModelPlace


def test_two_rolls_to_one_version_leave_the_way_back() -> None:
    old, new, other = (ModelPlace(f"/{version}", version) for version in ("old", "new", "other"))
    pointer = Pointer({"reward": old, "safe": other})
    once = pointer.rolled("reward", new, 1.0)
    twice = once.rolled("reward", new, 2.0)
    assert once.current == twice.current == {"reward": new, "safe": other}
    assert once.before == twice.before == {"reward": old}
    assert twice.last_roll["reward"] == {"version": "new", "at": 2.0, "error": None}
    refused = twice.refused("reward", "bad", 3.0, "it is damaged")
    assert (refused.current, refused.before) == (twice.current, twice.before)
    assert refused.last_roll["reward"]["error"] == "it is damaged"
