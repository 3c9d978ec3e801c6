"""How much memory this machine, or this container, has left for a new program. Reads files; no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Of cgroup versions 2 and 1: the limit, what is used, and which part of that the system would give up.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes a new program can have: the machine's, or less where a container's limit is lower.

    `root` is where `proc` and `sys` lie. None on a system without them.
    """
    meminfo = root / "proc/meminfo"
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(meminfo), flags=re.MULTILINE)
    if found is None:
        return None
    available = int(found[1]) * 1024
    for group in _cgroups(root):
        for limit_file, used_file, reclaimable in _CGROUP_FILES:
            limit, used = _read(group / limit_file).strip(), _read(group / used_file).strip()
            if not (limit.isdigit() and used.isdigit()):
                continue
            cached = re.search(rf"^{reclaimable} (\d+)", _read(group / "memory.stat"), flags=re.MULTILINE)
            available = min(available, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return max(0, available)


def resident_memory(root: Path = Path("/")) -> int | None:
    """Bytes of this process that lie in memory. None on a system that does not tell."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", _read(root / "proc/self/status"), flags=re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _cgroups(root: Path) -> Iterator[Path]:
    """This process's control groups that may limit memory, and those above them."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = top / own.lstrip("/")
        yield group
        yield from (above for above in group.parents if above.is_relative_to(top))


def _read(file: Path) -> str:
    """The file's text; empty where there is none."""
    return file.read_text() if file.is_file() else ""
