"""Publish a trained model into a registry as a Ray job: `rayrm publish`.

    ray job submit --working-dir . -- python jobs/publish.py /shared/runs/first \\
        --registry /shared/registry --name reward
"""

from __future__ import annotations

import sys

from rayrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
