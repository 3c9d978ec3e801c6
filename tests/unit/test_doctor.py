"""The doctor tells what is wrong and what to type, and fails by its exit status."""

from __future__ import annotations

import importlib.metadata
import io
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rayrm import doctor
from rayrm.doctor import Check

GIB = 2**30
REPORT = """
ninja .................. \x1b[92m[OKAY]\x1b[0m
op name ................ installed .. compatible
\x1b[93m [WARNING] \x1b[0m async_io requires the dev libaio
async_io ............... \x1b[93m[NO]\x1b[0m ....... \x1b[93m[NO]\x1b[0m
deepspeed_not_implemented  \x1b[93m[NO]\x1b[0m ....... \x1b[92m[OKAY]\x1b[0m
cpu_adam ............... \x1b[93m[NO]\x1b[0m ....... \x1b[92m[OKAY]\x1b[0m
fused_adam ............. \x1b[92m[YES]\x1b[0m ...... \x1b[92m[OKAY]\x1b[0m
"""


def printed(checks: list[Check]) -> tuple[str, int]:
    console = Console(file=io.StringIO(), width=200)
    status = doctor.print_checks(checks, console)
    return console.file.getvalue(), status  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fail")]
)
def test_python_is_checked_against_the_supported_versions(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


def test_a_package_out_of_range_or_missing_fails_with_the_pip_line() -> None:
    numpy = importlib.metadata.version("numpy")
    old, missing = doctor.check_packages(["numpy>=99", "no-such-package-here>=1"])
    assert (old.status, old.fix) == ("fail", "pip install 'numpy>=99'")
    assert numpy in old.found
    assert (missing.status, missing.fix) == ("fail", "pip install 'no-such-package-here>=1'")


def test_an_optional_package_never_fails() -> None:
    checks = doctor.check_packages(['numpy>=99; extra == "dev"', 'trl>=99; extra == "trl"', "numpy>=1"])
    assert {check.status for check in checks} == {"warn"}


def test_a_package_without_metadata_of_ours_is_a_failure_that_says_so() -> None:
    (check,) = doctor.check_packages([])
    assert (check.name, check.status) == ("rayrm", "fail")


def test_deepspeeds_report_is_read_op_by_op() -> None:
    check = doctor.check_deepspeed(lambda: REPORT)
    assert check.status == "ok"
    assert check.found == "built: fused_adam; can be built when needed: cpu_adam"


def test_without_a_compiler_the_optimizer_cannot_be_offloaded_and_that_is_a_warning() -> None:
    check = doctor.check_deepspeed(lambda: "cpu_adam ............... [NO] ....... [NO]")
    assert (check.status, "ninja" in check.fix) == ("warn", True)


@pytest.mark.parametrize("check", [doctor.check_deepspeed, doctor.check_ray])
def test_a_program_that_crashes_is_a_line_with_its_last_words(check: object) -> None:
    def ask() -> str:
        command = [sys.executable, "-c", "raise ImportError('libcuda is gone')"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    line = check(ask)  # type: ignore[operator]
    assert line.status == "fail"
    assert "ImportError: libcuda is gone" in line.found
    assert line.fix


def test_ray_must_answer_a_task_not_only_start() -> None:
    assert doctor.check_ray(lambda: "log line\nanswer 42 4.0\n").status == "ok"
    assert doctor.check_ray(lambda: "").status == "fail"


@pytest.mark.parametrize(("free", "status"), [(0, "fail"), (2 * GIB, "warn"), (9 * GIB, "ok"), (None, "ok")])
def test_little_room_warns_too_little_fails_and_both_say_what_to_do(free: int | None, status: str) -> None:
    check = doctor.check_room("disk", free, GIB, 8 * GIB, "Free some.")
    assert check.status == status
    assert check.fix == ("" if status == "ok" else "Free some.")


def test_a_low_limit_of_open_files_warns() -> None:
    assert doctor.check_open_files(1024).fix == "ulimit -n 65536"
    assert doctor.check_open_files(65536).status == "ok"
    assert doctor.check_open_files(resource.RLIM_INFINITY).found == "no limit"


def test_a_system_without_shared_memory_is_no_failure(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "none").status == "ok"


def test_the_exit_status_is_one_only_when_a_check_fails() -> None:
    fine, poor, broken = (
        Check("a", "ok", "x"),
        Check("b", "warn", "y", "do b"),
        Check("c", "fail", "z", "do c"),
    )
    assert printed([fine, poor])[1] == 0
    text, status = printed([fine, poor, broken])
    assert status == 1
    assert "1 ok, 1 to look at, 1 failed" in text
    assert "do b" in text
    assert "do c" in text


def test_this_machine_can_be_examined_and_every_complaint_says_what_to_do() -> None:
    checks = doctor.examine()
    assert {"python", "torch", "ray", "device", "bf16", "deepspeed ops", "memory"} <= {
        check.name for check in checks
    }
    assert all(check.fix for check in checks if check.status != "ok")
    text, _ = printed(checks)
    assert all(check.name in text for check in checks)


def test_bf16_is_the_same_answer_every_time_with_its_reason() -> None:
    from rayrm.model.precision import bf16_usable

    usable, why = bf16_usable(use_cpu=True)
    assert (usable, why) == bf16_usable(use_cpu=True)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if flags and "avx512_bf16" not in flags and "amx_bf16" not in flags:
        assert not usable
    assert "bf16" in why


def test_bf16_is_not_used_where_onednn_may_not_use_the_instructions() -> None:
    code = "from rayrm.model.precision import bf16_usable; print(bf16_usable(use_cpu=True)[0])"
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert ran.stdout.strip() == "False"
