"""The weights of an idle model: when they leave, and that a batch never meets them elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rayrm.serve.idle import IdleOffload


def test_weights_leave_after_the_time_without_work_and_come_back_for_it() -> None:
    idle = IdleOffload(10.0)
    idle.worked(100.0)
    assert (idle.due_in_s(103.0), idle.is_due(109.9, waiting=False)) == (7.0, False)
    assert idle.is_due(110.0, waiting=False)
    assert not idle.is_due(110.0, waiting=True)
    idle.begin_offload()
    assert (idle.state, idle.must_restore, idle.is_due(200.0, waiting=False)) == ("offloading", False, False)
    idle.offloaded()
    assert (idle.state, idle.must_restore, idle.due_in_s(200.0)) == ("on_cpu", True, None)
    idle.begin_restore()
    assert (idle.state, idle.must_restore) == ("restoring", False)
    idle.restored(200.0)
    assert (idle.state, idle.due_in_s(200.0), idle.is_due(209.0, waiting=False)) == ("on_device", 10.0, False)


def test_weights_stay_where_no_time_is_set_or_the_model_is_not_loaded() -> None:
    for idle in (IdleOffload(None), IdleOffload(1.0)):
        assert not idle.is_due(1e9, waiting=False)
    never = IdleOffload(None)
    never.worked(0.0)
    assert not never.is_due(1e9, waiting=False)
    assert never.due_in_s(1e9) is None


def test_after_a_failed_move_restoring_is_tried_before_the_next_batch() -> None:
    idle = IdleOffload(1.0)
    idle.worked(0.0)
    idle.begin_offload()
    idle.failed()
    assert idle.must_restore
    idle.begin_restore()
    idle.failed()
    assert idle.must_restore
    idle.begin_restore()
    idle.restored(5.0)
    assert idle.state == "on_device"


def test_a_move_out_of_turn_is_our_own_mistake() -> None:
    idle = IdleOffload(1.0)
    for move in (idle.offloaded, idle.begin_restore, lambda: idle.restored(0.0), idle.failed):
        with pytest.raises(AssertionError):
            move()
    idle.begin_offload()
    with pytest.raises(AssertionError):
        idle.begin_offload()


class Replica(RuleBasedStateMachine):
    """A replica's loop over a model whose weights really are somewhere, in any order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = IdleOffload(5.0)
        self.now = 0.0
        self.last_work = 0.0
        self.waiting = 0
        self.on_device = True
        self.idle.worked(self.now)

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def work_comes(self) -> None:
        self.waiting += 1

    @precondition(lambda self: self.idle.state in ("on_device", "on_cpu"))
    @rule()
    def the_loop_turns(self) -> None:
        if self.idle.is_due(self.now, self.waiting > 0):
            assert self.waiting == 0
            assert self.now - self.last_work >= 5.0 - 1e-6
            self.idle.begin_offload()
        elif self.waiting and self.idle.must_restore:
            self.idle.begin_restore()
        elif self.waiting:
            assert self.on_device
            self.waiting = 0
            self.idle.worked(self.now)
            self.last_work = self.now

    @precondition(lambda self: self.idle.state in ("offloading", "restoring"))
    @rule(works=st.booleans())
    def the_move_ends(self, works: bool) -> None:
        leaving = self.idle.state == "offloading"
        if not works:
            self.idle.failed()
            self.on_device = False
        elif leaving:
            self.idle.offloaded()
            self.on_device = False
        else:
            self.idle.restored(self.now)
            self.last_work = self.now
            self.on_device = True

    @invariant()
    def the_state_says_where_they_are(self) -> None:
        if self.idle.state in ("on_device", "on_cpu"):
            assert self.on_device == (self.idle.state == "on_device")
            assert self.idle.must_restore != self.on_device


TestReplica = Replica.TestCase
