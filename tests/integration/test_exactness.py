"""A run under fire is the run that nobody killed: `jobs/soak.py` on one configuration, with real SIGKILLs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "jobs" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_five_killed_workers_and_a_killed_driver_change_no_bit_and_one_worker_can_go_on(
    tmp_path: Path,
) -> None:
    found = tmp_path / "soak.json"
    words = ["--configurations", "zero2-indexed", "--worker-kills", "5", "--driver-kills", "1"]
    ran = subprocess.run(
        [sys.executable, str(SOAK), *words, "--other-workers", "1", "--json", str(found)],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    (outcome,) = json.loads(found.read_text())["soak"].values()
    assert outcome["worker_kills"] == 5
    assert outcome["driver_kills"] == 2
    assert outcome["problems"] == []
    assert outcome["other_workers_delta"] <= 1e-5
