"""A served model under load: rolls, overload and callers that die, each for some seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
def test_no_answer_is_lost_or_wrong_whatever_happens_to_the_service() -> None:
    """`jobs/soak_serve.py --seconds 60` is the same for a minute each."""
    words = ["--seconds", "6", "--scenarios", "rolls,overload,deaths"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "soak_serve.py"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert result["good"]
    scenarios = result["soak_serve"]
    assert [scenarios[name]["events"] for name in ("rolls", "deaths")] == [10, 10]
    assert all(scenario["texts"] > 0 for scenario in scenarios.values())
    assert scenarios["overload"]["refused"] > 0
