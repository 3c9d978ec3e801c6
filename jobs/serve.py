"""Serve a reward model on the job's cluster until the job is stopped.

    ray job submit --working-dir . -- python jobs/serve.py registry/helpful num_replicas=2

The words after the model are fields of `ServeConfig`.
"""

from __future__ import annotations

import sys

from rayrm.config import ServeConfig
from rayrm.errors import RayrmError
from rayrm.serve.deployment import serve_forever

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    words = [word.removeprefix("serve.").partition("=") for word in sys.argv[2:]]
    try:
        serve_forever(sys.argv[1], ServeConfig(**{key: value for key, _, value in words}))
    except RayrmError as error:
        sys.exit(f"error: {error}")
