"""`rayrm doctor`: what this machine has, what rayrm needs, and what to type where the two differ.

`examine` only looks: it builds nothing, writes nothing and, unless asked, starts no Ray. It takes some ten
seconds, most of them imports. DeepSpeed and Ray are asked in processes of their own, so that a broken
installation of either is a line of the report and not a stack trace.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from rayrm.train.system_memory import available_memory

Status = Literal["ok", "warn", "fail"]
_SHOWN: Final = ("torch", "transformers", "ray", "deepspeed", "peft", "datasets", "trl")
_GIB: Final = 2**30
_MARKS: Final[dict[Status, str]] = {
    "ok": "[green]ok[/]",
    "warn": "[yellow]warn[/]",
    "fail": "[bold red]fail[/]",
}
_START_RAY: Final = """
import os, ray
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": 1, "object_store_memory": 100 * 2**20}
ray.init(include_dashboard=False, log_to_driver=False, **local)
print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()), ray.available_resources().get("CPU", 0))
ray.shutdown()
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    """What was looked at."""
    status: Status
    """ok; warn: works with less; fail: something rayrm does will not work."""
    found: str
    """What there is."""
    fix: str = ""
    """What to type; empty when ok."""


def examine(*, start_ray: bool = False) -> list[Check]:
    """Look at this machine; `start_ray` also starts (or, with RAY_ADDRESS, joins) a cluster and ends it."""
    python = platform.python_version_tuple()
    checks = [check_python((int(python[0]), int(python[1])))]
    checks += check_packages(_requirements())
    checks += [check_device(), check_bf16(), check_deepspeed(_ask_deepspeed)]
    checks += [
        check_room(
            "disk here",
            shutil.disk_usage(Path.cwd()).free,
            1 * _GIB,
            10 * _GIB,
            "Free some, or run elsewhere.",
        ),
        check_room(
            "memory",
            available_memory(),
            2 * _GIB,
            6 * _GIB,
            "End other programs, or set `max_tokens_per_microbatch`.",
        ),
        check_shared_memory(Path("/dev/shm")),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]
    if start_ray:
        checks.append(check_ray(_ask_ray))
    return checks


def print_doctor(*, start_ray: bool = False, console: Console | None = None) -> int:
    """Print the report; the exit status: 1 if any check fails, else 0."""
    console = console or Console()
    with console.status("looking at this machine"):
        checks = examine(start_ray=start_ray)
    return print_checks(checks, console)


def print_checks(checks: Sequence[Check], console: Console) -> int:
    """Print the checks as a table; the exit status: 1 if any fails, else 0."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "check", "found", "to do"):
        table.add_column(title, overflow="fold")
    for check in checks:
        table.add_row(_MARKS[check.status], check.name, check.found, check.fix)
    console.print(table)
    counts = {status: sum(check.status == status for check in checks) for status in _MARKS}
    console.print(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    return 1 if counts["fail"] else 0


def check_python(version: tuple[int, int]) -> Check:
    """The Python versions rayrm supports: 3.11 to 3.13."""
    found = ".".join(map(str, version))
    if (3, 11) <= version < (3, 14):
        return Check("python", "ok", found)
    return Check("python", "fail", found, "Make the environment with Python 3.11, 3.12 or 3.13.")


def _requirements() -> list[str]:
    """rayrm's own requirements, as pip knows them."""
    try:
        return importlib.metadata.requires("rayrm") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def check_packages(requirements: Iterable[str]) -> list[Check]:
    """The installed versions against pyproject.toml's ranges; in range, only the main ones are listed."""
    checks = []
    for text in requirements:
        wanted = Requirement(text)
        optional = wanted.marker is not None
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                fix = f"pip install '{wanted.name}{wanted.specifier}'"
                checks.append(Check(wanted.name, "fail", "not installed", fix))
            elif wanted.name in _SHOWN:
                checks.append(Check(wanted.name, "ok", f"not installed (optional: rayrm[{wanted.name}])"))
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            fix = f"pip install '{wanted.name}{wanted.specifier}'"
            checks.append(
                Check(wanted.name, "warn" if optional else "fail", f"{found}, not {wanted.specifier}", fix)
            )
        elif wanted.name in _SHOWN:
            checks.append(Check(wanted.name, "ok", found))
    if not checks:
        checks.append(
            Check("rayrm", "fail", "not installed", "pip install rayrm (or `pip install -e .` in a clone)")
        )
    return checks


def check_device() -> Check:
    """What torch computes on; a GPU that torch cannot see is worth a warning."""
    try:
        import torch
    except ImportError as problem:
        return Check(
            "device", "fail", f"torch cannot be imported: {problem}", "pip install --force-reinstall torch"
        )
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Check(
            "device", "ok", ", ".join(f"{gpu.name} {gpu.total_memory / _GIB:.0f} GiB" for gpu in gpus)
        )
    found = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {platform.machine()}"
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        fix = "Install a CUDA build of torch that fits the driver (see `nvidia-smi`)."
        return Check("device", "warn", f"{found}; torch {torch.__version__} does not see the GPU", fix)
    return Check("device", "ok", found)


def check_bf16() -> Check:
    """Whether `bf16 = true`, the default, is what training will use."""
    try:
        from rayrm.model.precision import bf16_usable
    except ImportError as problem:
        return Check(
            "bf16", "fail", f"torch cannot be imported: {problem}", "pip install --force-reinstall torch"
        )
    usable, why = bf16_usable()
    if usable:
        return Check("bf16", "ok", why)
    return Check("bf16", "warn", f"{why}: training uses fp32", "Nothing, or `bf16=false` to say so yourself.")


def check_deepspeed(ask: Callable[[], str]) -> Check:
    """Whether `zero_stage` works, from DeepSpeed's own report. Its ops are optional; none is built here."""
    try:
        report = re.sub(r"\x1b\[[0-9;]*m", "", ask())
    except (OSError, subprocess.SubprocessError) as problem:
        return Check(
            "deepspeed ops",
            "fail",
            f"DeepSpeed cannot be imported: {_last_words(problem)}",
            "DS_BUILD_OPS=0 pip install deepspeed",
        )
    ops = re.findall(r"^(\w+) \.* ?\[(YES|NO)\] \.+ \[(OKAY|NO)\]", report, flags=re.MULTILINE)
    ops = [op for op in ops if op[0] != "deepspeed_not_implemented"]  # a placeholder in DeepSpeed's list
    built = [name for name, installed, _ in ops if installed == "YES"]
    buildable = [name for name, installed, compatible in ops if installed == "NO" and compatible == "OKAY"]
    found = f"built: {', '.join(built) or 'none'}; can be built when needed: {', '.join(buildable) or 'none'}"
    if "cpu_adam" not in built + buildable:
        fix = "Needed only to offload the optimizer: install a C++ compiler and `pip install ninja`."
        return Check("deepspeed ops", "warn", found, fix)
    return Check("deepspeed ops", "ok", found)


def _ask_deepspeed() -> str:
    command = [sys.executable, "-m", "deepspeed.env_report"]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def _last_words(problem: Exception) -> str:
    """The last line a failed program wrote to stderr, else what the failure is."""
    said = getattr(problem, "stderr", None)
    text = said.decode(errors="replace") if isinstance(said, bytes) else said or ""
    return (text.strip() or str(problem)).splitlines()[-1]


def check_room(name: str, free: int | None, needed: int, enough: int, fix: str) -> Check:
    """Free bytes against what the smallest run needs and what an ordinary one does; None: unknown."""
    if free is None:
        return Check(name, "ok", "unknown on this system")
    status: Status = "fail" if free < needed else "warn" if free < enough else "ok"
    return Check(name, status, f"{free / _GIB:.1f} GiB free", "" if status == "ok" else fix)


def check_shared_memory(folder: Path) -> Check:
    """Ray keeps objects in /dev/shm; where it is small they go to disk, which is several times slower."""
    if not folder.is_dir():
        return Check("shared memory", "ok", f"no {folder} on this system")
    return check_room(
        "shared memory",
        shutil.disk_usage(folder).free,
        64 * 2**20,
        1 * _GIB,
        "In Docker: `docker run --shm-size=4g`; in Kubernetes: an emptyDir with medium Memory on /dev/shm.",
    )


def check_open_files(limit: int) -> Check:
    """Ray opens several files for each worker and connection."""
    if limit == resource.RLIM_INFINITY or limit >= 8192:
        return Check("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else f"limit {limit}")
    return Check("open files", "warn", f"limit {limit}", "ulimit -n 65536")


def check_ray(ask: Callable[[], str]) -> Check:
    """Whether Ray starts here and runs a task."""
    where = os.environ.get("RAY_ADDRESS", "")
    try:
        answer = re.search(r"^answer 42 ([\d.]+)", ask(), flags=re.MULTILINE)
    except (OSError, subprocess.SubprocessError) as problem:
        fix = (
            f"Is the cluster at RAY_ADDRESS={where} up?"
            if where
            else "See the newest files in /tmp/ray/session_latest/logs."
        )
        return Check("ray starts", "fail", _last_words(problem), fix)
    if answer is None:
        return Check(
            "ray starts",
            "fail",
            "a task gave no answer",
            "See the newest files in /tmp/ray/session_latest/logs.",
        )
    return Check(
        "ray starts", "ok", f"joined {where}" if where else "started a local cluster, ran a task, ended it"
    )


def _ask_ray() -> str:
    command = [sys.executable, "-c", _START_RAY]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
