"""The loss scale goes as torch's own does, and says when it is no longer what makes gradients overflow."""

from __future__ import annotations

import pytest
import torch

from rayrm.train import loss_scale
from rayrm.train.loss_scale import LossScale


def test_it_goes_as_torch_s_own_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_INTERVAL", 3)
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    overflows = [False] * 4 + [True, False, True, True] + [False] * 7
    for number, overflow in enumerate(overflows):
        theirs.scale(torch.ones(()))  # makes its first scale
        weight.grad = torch.full((2,), torch.inf if overflow else 1.0)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        assert ours.update(float(weight.grad.norm())) is not overflow
        assert ours.state_dict() == theirs.state_dict(), number
        if number == 5:
            ours = LossScale()
            ours.load_state_dict(theirs.state_dict())  # of a checkpoint
    assert ours.scale > 2.0**14


def test_gradients_that_overflow_without_it_are_no_matter_of_the_scale() -> None:
    scale = LossScale()
    for _ in range(16):
        assert not scale.update(float("nan"))
        assert not scale.is_spent
    assert scale.scale == 1.0
    for _ in range(2000):
        scale.update(float("inf"))
        assert scale.is_spent
        assert scale.scale > 0  # gradients are divided by it
    assert scale.update(1.0)
