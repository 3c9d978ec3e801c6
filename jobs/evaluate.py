"""Evaluate a model as a Ray job: `rayrm evaluate` on the job's cluster.

    ray job submit --working-dir . -- python jobs/evaluate.py /shared/runs/first /shared/data/heldout.jsonl \\
        --json /shared/runs/first/heldout.json

Exit status: 0 done; 2 what you can mend (a model, a file, its rows); 1 what failed.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
