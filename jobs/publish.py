"""Publish a trained model into a registry as a Ray job: `rayrm publish`.

    ray job submit --working-dir . -- python jobs/publish.py /shared/runs/first \\
        --registry /shared/registry --name helpful

Exit status: 0 done; 2 what you can mend (a model, a name); 1 what failed.
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
