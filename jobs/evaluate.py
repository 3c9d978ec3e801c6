"""Evaluate a model as a Ray job: `rayrm evaluate` on the job's cluster.

    ray job submit --working-dir . -- python jobs/evaluate.py /shared/runs/first /shared/data/heldout.jsonl \\
        --output /shared/runs/first/heldout --num-workers 8

The same job goes on where it was cut off. `rayrm report /shared/runs/first/heldout` makes a page of it.

Exit status: 0 done; 2 what you can mend (a model, a file, its rows); 1 what failed.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
