"""What a machine or container has left, and the most that a computation holds at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayrm.train.peak_memory import peak_bytes
from rayrm.train.system_memory import available_memory

CPU = torch.device("cpu")


def test_peak_bytes_counts_what_lives_at_a_time() -> None:
    outside = torch.zeros(1000)

    def compute() -> None:
        held = outside + 1  # 4000 bytes, held to the end
        for _ in range(5):
            torch.zeros(500).add_(1)  # 2000 bytes, one after another
        outside.view(10, 100)  # no bytes of its own
        del held

    assert peak_bytes(compute, CPU) == 6000


def test_peak_bytes_counts_what_autograd_keeps_for_backward() -> None:
    weight = torch.ones(1000, requires_grad=True)

    def forward_only() -> None:
        weight.exp().exp().exp()

    def with_backward() -> None:
        torch.autograd.backward(weight.exp().exp().exp().sum())

    # Each exp keeps its result; the sum is one number, its gradient is expanded to no bytes.
    assert peak_bytes(forward_only, CPU) == 3 * 4000
    assert peak_bytes(with_backward, CPU) >= 4 * 4000


def test_a_sparse_gradient_counts_by_its_rows() -> None:
    table = torch.nn.Embedding(1000, 10, sparse=True)

    def compute() -> None:
        torch.autograd.backward(table(torch.tensor([1, 2])).sum())

    # Two rows of floats and their places, where a dense gradient has a thousand.
    assert 2 * 10 * 4 + 2 * 8 <= peak_bytes(compute, CPU) < 1000


def test_what_has_no_elements_counts_nothing() -> None:
    empty = torch.nn.Parameter(torch.empty(0))
    assert peak_bytes(lambda: torch.autograd.backward((empty * 2).sum()), CPU) < 100


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "kib"),
    [
        ({}, 8000),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 8000),
        (
            {
                "proc/self/cgroup": "0::/pods/mine\n",
                "sys/fs/cgroup/pods/memory.max": f"{5000 * 1024}\n",
                "sys/fs/cgroup/pods/memory.current": f"{2000 * 1024}\n",
                "sys/fs/cgroup/pods/memory.stat": f"anon 1\ninactive_file {500 * 1024}\n",
                "sys/fs/cgroup/pods/mine/memory.max": "max\n",
            },
            3500,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n4:hugetlb,memory:/docker/a\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3000 * 1024}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{1000 * 1024}\n",
            },
            2000,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "5000\n",
            },
            0,
        ),
    ],
    ids=["no container", "no limit", "version 2", "version 1", "over its limit"],
)
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, files: dict[str, str], kib: int) -> None:
    assert available_memory(machine(tmp_path, files)) == kib * 1024


def test_a_system_that_does_not_tell_is_no_error(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
