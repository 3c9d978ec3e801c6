"""Where an idle model's weights are, and when they go: the state machine beside `RewardModel.offload`.

    on_device -> offloading -> on_cpu -> restoring -> on_device

A replica that shares its device with a policy gives the memory back after `idle_s` without work and takes it
again for the next batch, at the price of one copy of the weights each way. This holds no clock, thread or
device: the replica's loop asks what is due, moves the weights, and says what became of it. One move at a
time; work that comes while the weights leave waits until they are gone and back.
"""

from __future__ import annotations

from typing import Literal

WeightsState = Literal["on_device", "offloading", "on_cpu", "restoring"]


class IdleOffload:
    """`idle_s`: seconds without work after which the weights leave; None: they stay. Times are monotonic.

    The loop: `if is_due(now, waiting): begin_offload()`, move, `offloaded()`; before a batch
    `if must_restore: begin_restore()`, move, `restored(now)`; after a batch `worked(now)`; asleep no longer
    than `due_in_s(now)`.
    """

    def __init__(self, idle_s: float | None) -> None:
        assert idle_s is None or idle_s > 0
        self.idle_s = idle_s
        self.state: WeightsState = "on_device"
        self._idle_since: float | None = None

    def worked(self, now: float) -> None:
        """A batch has been computed, or the model was loaded: from here on it is idle."""
        self._idle_since = now

    def swapped(self, now: float) -> None:
        """Another version came in: on the device, whatever became of those that were idle."""
        if self.state == "on_cpu":
            self.state = "on_device"
        self.worked(now)

    def due_in_s(self, now: float) -> float | None:
        """Seconds until the weights leave if no work comes, 0 when they are to; None: nothing will be due."""
        if self.idle_s is None or self.state != "on_device" or self._idle_since is None:
            return None
        return max(self._idle_since + self.idle_s - now, 0.0)

    def is_due(self, now: float, waiting: bool) -> bool:
        """Whether the weights are to leave now; never while texts are `waiting`."""
        return not waiting and self.due_in_s(now) == 0.0

    @property
    def must_restore(self) -> bool:
        """Whether the weights have to come back before a batch can be computed."""
        return self.state == "on_cpu"

    def begin_offload(self) -> None:
        self._go("on_device", "offloading")

    def offloaded(self) -> None:
        self._go("offloading", "on_cpu")

    def begin_restore(self) -> None:
        self._go("on_cpu", "restoring")

    def restored(self, now: float) -> None:
        self._go("restoring", "on_device")
        self.worked(now)

    def failed(self) -> None:
        """The move that was begun ended in an error (no memory there), with weights on both sides perhaps.

        They count as on the CPU, so that restoring is tried again before the next batch.
        """
        assert self.state in ("offloading", "restoring"), self.state
        self.state = "on_cpu"

    def _go(self, before: WeightsState, after: WeightsState) -> None:
        assert self.state == before, f"{self.state} -> {after}"
        self.state = after
