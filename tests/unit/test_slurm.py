"""The Slurm script, run by bash with stand-ins for Slurm's commands, Ray and `rayrm` on PATH."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "slurm" / "train.sbatch"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
# Each writes what it was called with; `rayrm` ends as $ENDS says, or with 75 a while after SIGTERM.
STANDINS = {
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        if [ "$1" = show ]; then printf 'node1\\nnode2\\nnode3\\n'; fi
    """,
    "srun": """
        echo "srun $*" >> "$CALLS"
        while [ "${1#--}" != "$1" ]; do shift; done
        exec "$@"
    """,
    "ray": """
        [ "$1" = start ] || exit 0
        [ -z "${RAY_ADDRESS:-}" ] || echo "RAY_ADDRESS is set for $*" >> "$CALLS"
        echo node >> "$NODES"
        exec sleep 300
    """,
    "rayrm": """
        echo "rayrm $* at $RAY_ADDRESS" >> "$CALLS"
        trap 'sleep 0.3; exit 75' TERM
        [ -z "$ENDS" ] || exit "$ENDS"
        for _ in {1..2000}; do sleep 0.05; done
    """,
}
# A cluster has as many nodes as were started, and refuses at first.
RAY_MODULE = """
    import os
    asked = 0
    def init(**given):
        global asked
        asked += 1
        if asked == 1:
            raise ConnectionError("not yet")
    def nodes():
        started = len(open(os.environ["NODES"]).readlines()) if os.path.exists(os.environ["NODES"]) else 0
        return [{"Alive": True}] * started + [{"Alive": False}]
"""


def submit(
    home: Path, *words: str, ends: str = "", timeout_s: str = "60", nodes: str = ""
) -> subprocess.Popen[str]:
    """The script as Slurm runs it, in a process group of its own; `nodes`: where its Ray counts them."""
    commands, modules = home / "bin", home / "modules"
    commands.mkdir()
    modules.mkdir()
    for name, body in STANDINS.items():
        (commands / name).write_text("#!/bin/bash\n" + textwrap.dedent(body))
        (commands / name).chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    (modules / "ray.py").write_text(textwrap.dedent(RAY_MODULE))
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(home),
        "PYTHONPATH": str(modules),
        "CALLS": str(home / "calls"),
        "NODES": nodes or str(home / "nodes"),
        "ENDS": ends,
        "HEAD_IP": "10.0.0.1",
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "8",
        "RAY_START_TIMEOUT_S": timeout_s,
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def calls(home: Path, of: str) -> list[str]:
    return [line for line in (home / "calls").read_text().splitlines() if line.startswith(of)]


def assert_nothing_is_left(group: int) -> None:
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("processes of the job go on after it")


def test_bash_takes_it() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    directives = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@120", "#SBATCH --ntasks-per-node=1"} <= set(
        directives
    )
    # sbatch reads none that stands behind the first command.
    assert max(SCRIPT.read_text().index(line) for line in directives) < SCRIPT.read_text().index("set -u")


@pytest.mark.parametrize("status", [0, 2, 1])
def test_ray_on_every_node_and_the_run_on_the_first(tmp_path: Path, status: int) -> None:
    words = ["/shared/first.toml", "output_dir=/shared/runs/with space", "cluster.num_workers=24"]
    with submit(tmp_path, *words, ends=str(status)) as job:
        assert job.wait(90) == status
    assert_nothing_is_left(job.pid)
    head, *others = sorted(calls(tmp_path, "srun"))
    each = "--num-cpus=16 --num-gpus=8 --disable-usage-stats --block"
    assert (
        "--nodelist=node1 env -u RAY_ADDRESS ray start --head --node-ip-address=10.0.0.1 --port=21234" in head
    )
    assert head.endswith(each)
    assert others == [
        f"srun --nodes=1 --ntasks=1 --nodelist={node} env -u RAY_ADDRESS ray start --address=10.0.0.1:21234 "
        f"{each}"
        for node in ("node2", "node3")
    ]
    assert calls(tmp_path, "rayrm") == [f"rayrm train {' '.join(words)} at 10.0.0.1:21234"]
    assert calls(tmp_path, "RAY_ADDRESS") == []
    assert calls(tmp_path, "scontrol requeue") == []


def test_a_run_that_was_told_to_leave_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    with submit(tmp_path, "/shared/first.toml") as job:
        for _ in range(900):
            if (tmp_path / "calls").exists() and calls(tmp_path, "rayrm"):
                break
            assert job.poll() is None
            time.sleep(0.1)
        time.sleep(0.2)  # the stand-in's trap is set
        os.kill(job.pid, signal.SIGTERM)  # to the batch shell alone, as `--signal=B:TERM@120` has it
        assert job.wait(90) == 75
        said = job.stdout.read() if job.stdout else ""
    assert_nothing_is_left(job.pid)
    assert calls(tmp_path, "scontrol requeue") == ["scontrol requeue 41234"]
    assert "back into the queue" in said


def test_nodes_that_do_not_come_end_the_job(tmp_path: Path) -> None:
    with submit(
        tmp_path, "/shared/first.toml", timeout_s="2", nodes=str(tmp_path / "absent" / "nodes")
    ) as job:
        assert job.wait(90) == 1
    assert_nothing_is_left(job.pid)
    assert calls(tmp_path, "rayrm") == []
