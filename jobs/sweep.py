"""Sweep over a run file's settings by Ray Tune, as a Ray job: `rayrm sweep` on the job's cluster.

    ray job submit --working-dir . -- python jobs/sweep.py jobs/first.toml output_dir=/shared/runs/sweep \\
        --param learning_rate=1e-5,3e-5,1e-4 --param warmup_steps=0,0.1
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
