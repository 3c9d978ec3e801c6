"""Serve a reward model on the job's cluster until the job is stopped: `rayrm serve`.

    ray job submit --working-dir . --no-wait -- python jobs/serve.py /shared/registry/helpful num_replicas=2

The words after the model are fields of `ServeConfig`. `ray job stop` removes the service, which answers what
is in flight first: it has RAY_JOB_STOP_WAIT_TIME_S of `ray start` for that, 3 seconds by default.

Exit status: 0 stopped; 2 what you can mend (the model, a setting); 1 what failed.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
