"""Train a reward model as a Ray job: `rayrm train` on the job's cluster.

    ray job submit --working-dir . -- python jobs/train.py jobs/first.toml output_dir=/shared/runs/first \\
        model.name=/shared/models/base data.train=/shared/data/pairs.jsonl \\
        data.eval=/shared/data/heldout.jsonl cluster.num_workers=8

With an environment of its own, here for a tracker and without a model hub (README, "On a cluster"):

    ray job submit --working-dir . --runtime-env-json '{"excludes": ["/models", "/data", "/runs"],
        "env_vars": {"WANDB_PROJECT": "rewards", "HF_HUB_OFFLINE": "1"}}' -- \\
        python jobs/train.py jobs/first.toml output_dir=/shared/runs/first report_to=wandb

The words after the run file are settings over it. Submitted again, a run that was cut off goes on; for that,
`output_dir` must be an absolute path on storage that all nodes share: a job's working directory is a copy.

Exit status: 0 done; 2 what you can mend (settings, files, rows); 1 what failed; 75 told to leave (SIGTERM):
the run is saved, submit it again. `ray job submit` itself ends with 1 for each of the last three and shows
which it was.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
