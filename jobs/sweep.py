"""Sweep over a run file's settings by Ray Tune, as a Ray job: `rayrm sweep` on the job's cluster.

    ray job submit --working-dir . -- python jobs/sweep.py jobs/sweep.toml output_dir=/shared/runs/sweep \\
        model.name=/shared/models/smollm2-6 data.train=/shared/data/pairs.jsonl \\
        data.eval=/shared/data/heldout.jsonl sweep.publish=helpful sweep.registry=/shared/registry

The space is the file's [sweep.space]; of a run file without one it is typed:

    ray job submit --working-dir . -- python jobs/sweep.py jobs/first.toml output_dir=/shared/runs/rates \\
        --param learning_rate=1e-5,3e-5,1e-4 --param warmup_steps=0,0.1

The words after the file change it. Submitted again, a sweep that was cut off goes on; for that, `output_dir`
must be an absolute path on storage that all nodes share. Table and `sweep.html` come at the end.

Exit status: 0 done; 2 what you can mend (settings, files, rows); 1 what failed, or every trial; 75 told to
leave (SIGTERM): submit it again. `ray job submit` itself ends with 1 for each of the last three and shows
which it was.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
