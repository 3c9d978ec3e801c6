"""A model that was lent to a run is its owner's again, also where the run raises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm.train.job import TrainJob
from rayrm.train.worker import train_rank
from tests.numerics.ranks import Stopped, StoppingSet, Variant, job_of, tokenized

ENGINES: list[dict[str, Any]] = [{}, *({"zero_stage": stage} for stage in range(4))]


def job(directory: Path, settings: dict[str, Any], *, padded: bool = False) -> TrainJob:
    return job_of(Variant("run", {"max_steps": 5, **settings}, padded=padded), directory, tokenized(40))


def traits(model: Any) -> dict[str, Any]:
    """What a run takes hold of: the embedding's gradient, forwards, attention, hooks."""
    return {
        "sparse": model.get_input_embeddings().sparse,
        "attention": model.config._attn_implementation,
        "forwards": sorted(name for name, part in model.named_modules() if "forward" in vars(part)),
        "hooks": sorted(
            name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks
        ),
    }


def assert_an_owner_can_train(model: Any) -> None:
    assert all(parameter.grad is None for parameter in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("padded", [False, True], ids=["shared", "padded"])
@pytest.mark.parametrize("settings", ENGINES, ids=str)
def test_a_run_that_raises_between_steps_leaves_the_model_as_it_was(
    tmp_path: Path, settings: dict[str, Any], padded: bool
) -> None:
    lent = job(tmp_path, settings, padded=padded)
    model = lent.source.model
    before = traits(model)
    with pytest.raises(Stopped):
        train_rank(replace(lent, train_set=StoppingSet(lent.train_set, 3)), lambda record: None)
    assert traits(model) == before
    assert_an_owner_can_train(model)


@pytest.mark.parametrize("settings", ENGINES, ids=str)
def test_a_run_that_raises_within_a_step_leaves_the_model_as_it_was(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    # Two micro-batches a step: the fourth backward is of step 2, which then has gradients of its first.
    lent = replace(job(tmp_path, settings), max_tokens=180)
    model: Any = lent.source.model
    before = traits(model)
    calls = 0

    def fail(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stopped
        return gradient

    hook = model.score.weight.register_hook(fail)
    with pytest.raises(Stopped):
        train_rank(lent, lambda record: None)
    hook.remove()
    assert traits(model) == before
    assert_an_owner_can_train(model)


def test_a_run_that_raises_before_its_first_step_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    lent = job(tmp_path, {"max_tokens_per_microbatch": 4})
    model = lent.source.model
    before = traits(model)
    with pytest.raises(ValueError, match="below the longest row"):
        train_rank(replace(lent, max_tokens=4), lambda record: None)
    assert traits(model) == before
