"""An error of ours in a worker ends the run, whatever `max_failures` says: another attempt would meet it too.

Ray Train starts the workers anew after any exception. So the rank that raises leaves the error in the output
directory; the next attempt's ranks find it there and end at once, and the driver raises it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

from rayrm import errors
from rayrm.errors import RayrmError, RowError

_FILE = ".error.json"


def forget_error(output_dir: Path) -> None:
    """Before a run: what ended an earlier one is not this one's."""
    for file in output_dir.glob(f"{_FILE}*"):
        file.unlink(missing_ok=True)


def leave_error(output_dir: Path, error: RayrmError) -> None:
    """Keep an error for the ranks of the next attempt, and for the driver; the first one, if several come."""
    aside = output_dir / f"{_FILE}.{socket.gethostname()}.{os.getpid()}"  # ranks may raise together
    left = json.dumps({"kind": type(error).__name__, "message": str(error)})
    with contextlib.suppress(OSError):  # a full disk is what the error may be about
        aside.write_text(left, encoding="utf-8")
        try:
            os.link(aside, output_dir / _FILE)  # not over one that is there
        except FileExistsError:
            pass
        except OSError:  # a disk without links
            aside.replace(output_dir / _FILE)
        aside.unlink(missing_ok=True)


def left_error(output_dir: Path) -> RayrmError | None:
    """The error that an attempt of this run left, if one did."""
    file = output_dir / _FILE
    if not file.exists():
        return None
    left = json.loads(file.read_text(encoding="utf-8"))
    kind = getattr(errors, left["kind"], RayrmError)
    if kind is RowError:
        kind = errors.DataError
    try:
        error: RayrmError = kind(left["message"])
    except TypeError:  # it holds more than its message
        error = RayrmError(left["message"])
    return error
