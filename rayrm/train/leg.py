"""A leg: the part of a run that population based training trains in one go, and what may change before it.

Jaderberg et al. 2017 (https://arxiv.org/abs/1711.09846): now and then the worse models of a population are
given up for the better ones', with other hyper-parameters. A leg ends after an evaluation, in a checkpoint.
The next one goes on from that, or from a better trial's: weights, moments, random states, place in the data
and in the schedule are the checkpoint's, the settings of `MAY_CHANGE` are the leg's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rayrm.train.engine import Engine
    from rayrm.train.loop import Schedule

MAY_CHANGE: Final = frozenset(
    {
        "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "label_smoothing", "center_rewards_coefficient", "tie_parameter",
    }
)  # fmt: skip
"""Each says what a step does with its rows and moments, and nothing that a checkpoint holds depends on it. Of
the others some decide which rows make which step and how many there are (batch size, seed, epochs, data, the
schedule's course), some what is trained (model, adapter, optimizer, precision)."""


@dataclass(frozen=True, slots=True)
class Leg:
    """`until`: the percentage of the steps from which on the first evaluation ends the leg; None: the run's
    end does."""

    until: float | None = None

    def last_step(self, schedule: Schedule) -> int | None:
        """The step after which the run saves and leaves; None: it trains to its end."""
        if self.until is None:
            return None
        steps = range(1, schedule.num_steps)
        after = (step for step in steps if 100.0 * step / schedule.num_steps >= self.until)
        return next((step for step in after if schedule.evaluates(step)), None)


@contextmanager
def keeping_settings(engine: Engine) -> Iterator[None]:
    """What is loaded within the block leaves the optimizer's settings as they were made: a checkpoint brings
    those of its own run, and the highest rate of its schedule."""
    optimizer = engine.optimizer
    scheduler: Any = engine.scheduler
    made = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    highest = list(scheduler.base_lrs)
    yield
    scheduler.base_lrs = highest
    # As `LambdaLR`, which all of transformers' schedules are, computes them.
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    rates = [rate * factor for rate, factor in zip(highest, factors, strict=True)]
    scheduler._last_lr = list(rates)
    for group, settings, rate in zip(optimizer.param_groups, made, rates, strict=True):
        group.update({**settings, "lr": rate})
