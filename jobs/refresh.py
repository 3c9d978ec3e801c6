"""Train the served reward model on while RL runs, on what a judge prefers among the policy's samples.

    ray job submit --working-dir . -- python jobs/refresh.py jobs/refresh.toml \\
        samples=/shared/runs/rl/samples.jsonl judge=judge.py:judge output_dir=/shared/runs/refresh

The service must run. The words after the file change it: a bare key is one of [refresh]. Goes on until it is
stopped, or `max_rounds` are done; the same command goes on where it was cut off. Exits as `rayrm train` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rayrm.errors import PreemptedError, RayrmError
from rayrm.rl.refresh_settings import read_refresh


def main(words: Sequence[str]) -> int:
    """Run the rounds; returns the exit status."""
    if not words or words[0].startswith("-"):
        print(__doc__)
        return 0 if words in (["-h"], ["--help"]) else 2
    path = None if "=" in words[0] else words[0]
    try:
        settings = read_refresh(path, words if path is None else words[1:])
        # After the file was read: torch and ray take seconds to import.
        from rayrm.rl.refresh import refresh

        for outcome in refresh(settings):
            ended = f"serves {outcome.version}" if outcome.accepted else f"refused: {outcome.reason}"
            print(f"round {outcome.round}: {outcome.num_rows} rows on {outcome.base}, {ended}")
    except KeyboardInterrupt:
        print("\nrefresh: interrupted", file=sys.stderr)
        return 130
    except PreemptedError as left:
        print(f"refresh: {left}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except (RayrmError, OSError) as error:
        print(f"refresh: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
