"""Score a file of completions as a Ray job, by a model or by the running service.

    ray job submit --working-dir . -- python jobs/score.py /shared/registry/reward \\
        /shared/data/answers.jsonl --output /shared/data/scored.jsonl
    ray job submit --working-dir . -- python jobs/score.py /shared/data/answers.jsonl \\
        --served reward --output /shared/data/scored.jsonl
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
