"""The public names, and that looking at them costs neither torch nor ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rayrm

HEAVY = ("torch", "ray", "transformers", "deepspeed", "datasets")


@pytest.mark.parametrize(
    "module", ["rayrm", "rayrm.config", "rayrm.runfile", "rayrm.errors", "rayrm.metrics.evaluation"]
)
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, rayrm, {module}; dir(rayrm); print([name for name in {HEAVY} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_the_public_names_are_these() -> None:
    assert rayrm.__all__ == [
        "DataConfig",
        "PublishedModel",
        "RewardClient",
        "RewardConfig",
        "RewardModel",
        "RewardTrainer",
        "ScoreResult",
        "SourceConfig",
        "deploy",
        "publish",
    ]


@pytest.mark.parametrize("name", rayrm.__all__)
def test_every_public_name_exists_is_documented_and_is_listed(name: str) -> None:
    assert (getattr(rayrm, name).__doc__ or "").strip()
    assert name in dir(rayrm)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="RewardTrianer"):
        rayrm.RewardTrianer  # type: ignore[attr-defined]  # noqa: B018


def test_the_client_is_light() -> None:
    code = "import sys; from rayrm.serve.client import RewardClient; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "False"), ran.stderr
