"""Steps whose loss or gradient norm is infinite or NaN: which rows made it so, and what follows.

"stop" costs nothing inside a step: a flag for each term of the loss stays on the device until the loop reads
it anyway, at a log, or before weights are evaluated or saved. The first unsound step is the cause; later ones
are its consequences. "skip" reads the gradient norm, and so waits for the device, in each step: an engine
made to skip leaves out an update whose norm is not finite, and a loss that is not makes all gradients NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from rayrm.data.packing import PackedBatch
from rayrm.errors import RayrmError
from rayrm.model.forward import to_device
from rayrm.train.engine import Engine
from rayrm.train.rank import Hosts
from rayrm.train.step import StepTotals

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class SeenStep:
    """A step whose numbers were not read yet; `names`: the row of each flag, "" where it is a dummy."""

    number: int
    nonfinite: torch.Tensor
    names: Sequence[str]
    num_rows: int


class Soundness:
    """Watches the steps of one rank; every rank calls the same of it at the same steps."""

    def __init__(
        self,
        engine: Engine,
        *,
        skips: bool = False,
        hosts: Hosts | None = None,
        on_skip: Callable[[int, list[str]], None] = lambda step, names: None,
        before_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_skip` is told a step that was left out, and the rows of all ranks that are at fault.

        `before_stop` is called on every rank before any of them raises, since the first ends the others.
        """
        self.skips = skips
        self._engine = engine
        self._hosts = hosts or Hosts()
        self._on_skip = on_skip
        self._before_stop = before_stop
        self._unread: list[SeenStep] = []

    def was_skipped(self, step: SeenStep, totals: StepTotals, alone: Callable[[int], PackedBatch]) -> bool:
        """Whether the engine left the step out; if not, it is read with the interval's.

        `alone`: the row of this rank's i-th term, packed by itself.
        """
        if self.skips and not math.isfinite(float(totals.grad_norm)):
            rows = self._at_fault(_flagged(step), alone)
            # With loss scaling (fp16) an update that overflows is left out, and the scale lowered, as a rule.
            if rows or not self._engine.scales_loss:
                self._on_skip(step.number, rows)
                return True
        self._unread.append(step)
        return False

    def check(self, reduced: Sequence[Sequence[float]], last_step: int) -> None:
        """Raise RayrmError where a step is unsound; `reduced`: each one's numbers, up to the last."""
        unread, self._unread = self._unread, []
        for step in unread:
            _tokens, loss, *_, norm = reduced[step.number - last_step - 1]
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._engine.scales_loss):
                rows = self._named_once(_flagged(step))
                self._before_stop()
                raise RayrmError(_unsound(step, loss, norm, rows))

    def _at_fault(self, flagged: dict[str, int], alone: Callable[[int], PackedBatch]) -> list[str]:
        """Of the flagged rows of all ranks those that are unsound alone too; all, where none is.

        What masks hide from a row is multiplied by zero, and zero times NaN is NaN: one row can spoil others.
        """
        rows = self._named_once(flagged)
        if len(rows) < 2:
            return rows
        places = list(flagged.values())
        unsound = []
        self._engine.train(False)
        # Equally many on every rank: ZeRO-3 gathers weights in each.
        for number in range(self._hosts.most(len(places))):
            batch = alone(places[number] if number < len(places) else 0)
            with torch.no_grad():
                module = self._engine.module
                scores = self._engine.scores(to_device(batch, self._engine.device, module.path, module.part))
            unsound.append(not bool(torch.isfinite(scores).all()))
        self._engine.train(True)
        return self._named_once([name for name, bad in zip(flagged, unsound, strict=False) if bad]) or rows

    def _named_once(self, rows: Iterable[str]) -> list[str]:
        """The rows of all ranks; those that compute a micro-batch together name the same."""
        return list(dict.fromkeys(self._hosts.joined(list(rows))))


def _flagged(step: SeenStep) -> dict[str, int]:
    """This rank's rows whose loss is not finite, each with the first term in which it is not."""
    found: dict[str, int] = {}
    for place, (name, bad) in enumerate(zip(step.names, step.nonfinite.tolist(), strict=True)):
        if bad and name:
            found.setdefault(name, place)
    return found


def _unsound(step: SeenStep, loss: float, norm: float, rows: Sequence[str]) -> str:
    if rows:
        these, many = "this row", ""
        if len(rows) > 1:
            these = "these rows"
            many = (
                "One such row can spoil those computed beside it: the setting scores each alone, and keeps "
                "those at fault in `quarantine.jsonl`. Where many are, lower `learning_rate`, or train in "
                "fp32 (`bf16=false`). "
            )
        return (
            f"the loss ({loss}) is not finite at step {step.number}, in {len(rows)} of its {step.num_rows} "
            f"rows: {shown(rows)}. Look at {these}; `nonfinite_loss=skip` leaves such steps out. {many}"
            "The last checkpoint is intact."
        )
    what = f"loss ({loss})" if not math.isfinite(loss) else f"gradient norm ({norm})"
    return (
        f"the {what} is not finite at step {step.number}, though the loss of each of its {step.num_rows} "
        "rows is. Lower `learning_rate`, or train in fp32 (`bf16=false fp16=false`); "
        "`nonfinite_loss=skip` leaves such steps out. The last checkpoint is intact."
    )


def shown(rows: Sequence[str]) -> str:
    """The first rows by name, and how many more there are."""
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return ", ".join(rows[:_SHOWN]) + more
