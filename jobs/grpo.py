"""Train a policy by GRPO or RLOO beside the reward service that scores it: `rayrm rl` on the job's cluster.

    ray job submit --working-dir . -- python jobs/grpo.py jobs/grpo.toml output_dir=/shared/runs/grpo \\
        policy.name=/shared/models/policy reward.model=/shared/registry/helpful cluster.num_workers=2

The words after the run file are settings over it; `reward.service=NAME` instead of `reward.model` trains
against a service that runs already.

Exit status: 0 done; 2 what you can mend (settings, files, rows); 1 what failed; 143 told to leave (SIGTERM).
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["rl", *sys.argv[1:]]))
