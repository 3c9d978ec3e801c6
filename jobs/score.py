"""Score files of completions as a Ray job: by a model, on any number of workers, or by the running service.

    ray job submit --working-dir . -- python jobs/score.py /shared/registry/helpful \\
        /shared/data/answers.jsonl --output /shared/data/pairs.parquet --pairs --num-workers 8
    ray job submit --working-dir . -- python jobs/score.py /shared/data/answers.jsonl \\
        --served reward --output /shared/data/scored.jsonl

Model, inputs and output lie where every node sees them. A job of workers that was lost goes on where it was
when it is submitted again.

Exit status: 0 done; 2 what you can mend (a model, a file, its rows); 1 what failed, or no answer of the
service.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
