"""Train a reward model as a Ray job: `rayrm train` on the job's cluster.

    ray job submit --working-dir . -- python jobs/train.py jobs/first.toml cluster.num_workers=8

The words after the run file are settings over it. Submitted again, a run that was cut off goes on; for that,
`output_dir` must be an absolute path on storage that all nodes share: a job's working directory is a copy.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
