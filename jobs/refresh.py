"""Train the served reward model on while RL runs: `rayrm refresh` on the job's cluster.

    ray job submit --working-dir . -- python jobs/refresh.py jobs/refresh.toml \\
        samples='/shared/runs/rl/samples-*.jsonl' judge=judge.py:judge output_dir=/shared/runs/refresh \\
        registry=/shared/registry data.eval=/shared/data/heldout.jsonl data.replay=/shared/data/pairs.jsonl

The service must run. The words after the file change it: a bare key is one of [refresh]. Goes on until it is
stopped, or `max_rounds` are done; the same command goes on where it was cut off.

Exit status: 0 done, or stopped; 2 what you can mend (settings, files, the judge); 1 what failed.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["refresh", *sys.argv[1:]]))
