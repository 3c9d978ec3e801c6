"""Show rayrm's own log lines: decisions it takes (layout, precision, resume) must not be silent."""

from __future__ import annotations

import logging
import sys


def show_logs(level: int = logging.INFO) -> None:
    """Print rayrm's log lines on stderr, unless the program has set up logging itself."""
    logger = logging.getLogger("rayrm")
    if logger.level in (logging.NOTSET, logging.INFO):
        logger.setLevel(level)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("rayrm: %(message)s"))
        logger.addHandler(handler)
