"""Running mean and standard deviation of scores, the same on every rank. No torch where there is no group.

Every call counts its values in before the moments are given out. Where `torch.distributed` is initialised
with more than one rank, a call is a collective: the ranks exchange the moments of their own values (72 bytes
each) and merge them in the order of ranks, so that all hold the same bits: one stream's, up to rounding.

Several of these in one process, called by threads or coroutines in whatever order, neither take each other's
messages nor wait for each other:
- each has a gloo group of its own, and a lock, so that its n-th call meets its counterparts' n-th call;
- groups are told apart by the order in which `torch.distributed` makes them. So whoever comes first makes the
  groups of all that live and were constructed before itself too, in that order: it is the same on every rank,
  and a rank that waits in the making of a group waits for a call that comes there too, whatever came first;
- an async call waits in a thread of its own, not in a pool that others could fill.
What remains is the caller's: construct them in the same order on every rank, and call each equally often.
What breaks that is found in what the ranks exchange, or ends by the group's time limit; both are errors.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np

from rayrm.errors import ConfigError, PeerFailedError, RewardUnavailableError, ScoreError

logger = logging.getLogger(__name__)

WAIT_S = 1800.0
"""How long a rank waits for the others' values, as long as torch waits by default. A rank that raises calls
`give_up`; one that dies closes its connections. Both end the waiting at once: this is for one that hangs."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Moments:
    """`count` values with their `mean`, and `squares`, the sum of squared deviations from it. In float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Moments:
        """Of finite numbers, also of none. Raises ScoreError naming the place of one that is not finite."""
        array = np.asarray(values, np.float64)
        if not np.isfinite(array).all():
            place = int(np.flatnonzero(~np.isfinite(array))[0])
            raise ScoreError(f"score {place} of {len(array)} is {array[place]}, and must be a finite number.")
        if not len(array):
            return cls()
        mean = float(array.mean())
        return cls(len(array), mean, float(np.square(array - mean).sum()))

    def merge(self, other: Moments) -> Moments:
        """Of both, without the values: n = a + b, d = mean_b - mean_a,

            mean = mean_a + d b / n,   squares = squares_a + squares_b + d^2 a b / n

        (Chan, Golub, LeVeque, "Algorithms for computing the sample variance: analysis and recommendations",
        The American Statistician 37 (1983) 242-247, https://doi.org/10.2307/2683386).
        """
        if not self.count or not other.count:
            return other if not self.count else self
        count, apart = self.count + other.count, other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * other.count / count,
            self.squares + other.squares + apart * apart * self.count * other.count / count,
        )

    @property
    def std(self) -> float:
        """The standard deviation, divided by `count`; 0 of no value."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


class RunningMoments:
    """`current`, the moments of all values of all ranks so far. Pickles with what it has counted."""

    def __init__(self) -> None:
        self.current = Moments()
        self._num_exchanged = 0
        self._one_call = threading.Lock()
        self._number = _groups.next_number(self)

    def update(self, values: Sequence[float]) -> Moments:
        """Count in the `values` of this rank's call, and those of the others' calls; all of them so far.

        Every rank must call it equally often, with values or none. Waits for the slowest rank.

        Raises:
            ScoreError: a value that is not finite (told to the other ranks as well).
            RewardUnavailableError: another rank gave up, left, or did not come within 1800 s. Nothing was
                counted, on any rank that had an answer.
            ConfigError: the ranks don't hold the same state.
        """
        try:
            own = Moments.of(values)
        except ScoreError:
            self.give_up()
            raise
        return self._counted(own)

    async def update_async(self, values: Sequence[float]) -> Moments:
        """`update` for asyncio: the event loop stays free. Cancelling it does not take the values back."""
        if num_ranks() == 1:
            return self.update(values)
        return await _in_own_thread(lambda: self.update(values))

    def give_up(self) -> None:
        """Take this rank's part in the call without values: the other ranks raise instead of waiting.

        For a rank whose scores failed. It returns when the others have come, or can't; nothing is counted.
        """
        if num_ranks() == 1:
            return
        logger.warning("the scores of this rank failed: the other ranks are told, then the error is raised")
        try:
            self._counted(None)
        except (RewardUnavailableError, ConfigError):
            return  # this rank raises what it failed of

    async def give_up_async(self) -> None:
        """`give_up` for asyncio."""
        if num_ranks() > 1:
            await _in_own_thread(self.give_up)

    def state_dict(self) -> dict[str, float]:
        """`count`, `mean`, `squares`: as JSON they keep every bit. The same on every rank."""
        return asdict(self.current)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a `state_dict`; every rank must load the same. ConfigError for what is none."""
        try:
            loaded = Moments(int(state["count"]), float(state["mean"]), float(state["squares"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"normalization state ({state!r}) must be what `state_dict()` gave: count, mean, squares. "
                "Load that of a checkpoint of the same run."
            ) from error
        with self._one_call:
            self.current = loaded

    def __getstate__(self) -> dict[str, float]:
        return self.state_dict()

    def __setstate__(self, state: Mapping[str, float]) -> None:
        RunningMoments.__init__(self)
        self.load_state_dict(state)

    def _counted(self, own: Moments | None) -> Moments:
        """`own` None: this rank gives up."""
        with self._one_call:
            batch = own
            if num_ranks() > 1:
                batch = self._exchanged(own)
            assert batch is not None
            self.current = self.current.merge(batch)
            return self.current

    def _exchanged(self, own: Moments | None) -> Moments:
        """The moments of all ranks' values, merged in the order of ranks."""
        before, batch = self.current, own or Moments()
        state = [self._num_exchanged, before.count, before.mean, before.squares]
        row = [*state, float(own is None), batch.count, batch.mean, batch.squares]
        self._num_exchanged += 1
        try:
            rows = _groups.gathered(self._number, row)
        except RuntimeError as error:
            raise PeerFailedError(
                "the ranks could not exchange the moments of their scores: one of them left, hangs, or made "
                f"fewer calls. See what it says; every rank must call each reward equally often. ({error})"
            ) from error
        for rank, told in enumerate(rows):
            if told[:5] != rows[0][:5]:
                names = "reward, calls, scores counted, their mean and squares"
                raise ConfigError(
                    f"rank {rank} normalizes by other statistics than rank 0: {told[:5]} and {rows[0][:5]} "
                    f"({names}). Construct the rewards in the same order on every rank, and load the same "
                    "state on all of them."
                )
        gone = [rank for rank, told in enumerate(rows) if told[5]]
        if gone:
            raise PeerFailedError(
                f"the scores of rank {', '.join(map(str, gone))} failed, and no rank normalizes without "
                "them. That rank's error says what to do."
            )
        merged = Moments()
        for told in rows:
            merged = merged.merge(Moments(int(told[6]), told[7], told[8]))
        return merged


def num_ranks() -> int:
    """Of this process's `torch.distributed` group; 1 where there is none."""
    # Without an import: a process that has not imported it is in no group.
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return 1
    return int(dist.get_world_size())


class _Groups:
    """The gloo groups of this process's `RunningMoments`; made again for another world.

    A group's place among them is that of its `RunningMoments` among those that live, by construction. Not
    by number alone: a process may have served something else before it became a rank.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._living: weakref.WeakValueDictionary[int, RunningMoments] = weakref.WeakValueDictionary()
        self._world: Any = None
        self._places: dict[int, int] = {}
        self._groups: list[Any] = []

    def next_number(self, one: RunningMoments) -> int:
        """Of one that was just constructed."""
        with self._lock:
            number = next(self._numbers)
            self._living[number] = one
            return number

    def gathered(self, number: int, row: Sequence[float]) -> list[list[float]]:
        """Of every rank, in their order: the place of the group and the `row`, float64 bit by bit."""
        import torch
        import torch.distributed as dist

        place, group = self._group_of(number)
        sent = torch.tensor([place, *row], dtype=torch.float64)
        received = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(received, sent, group=group)
        return [told.tolist() for told in received]

    def _group_of(self, number: int) -> tuple[int, Any]:
        """A group of its own, since the default one may be NCCL's, and others may use it meanwhile."""
        import torch.distributed as dist

        with self._lock:
            if self._world is not dist.group.WORLD:
                self._world, self._places, self._groups = dist.group.WORLD, {}, []
            if number not in self._places:
                for other in sorted(self._living):
                    if other <= number:
                        self._places.setdefault(other, len(self._places))
            place = self._places[number]
            while len(self._groups) <= place:
                self._groups.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_S)))
            return place, self._groups[place]


_groups = _Groups()


async def _in_own_thread(work: Callable[[], _T]) -> _T:
    """The result of `work`, done in a daemon thread: one that waits in vain must not hold up the exit."""
    answer: Future[_T] = Future()

    def run() -> None:
        answer.set_running_or_notify_cancel()
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="rayrm-moments").start()
    return await asyncio.wrap_future(answer)
