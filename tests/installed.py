"""An RL framework's own calling code, from its installed package, without what else the package imports.

These packages are installed without their dependencies (vLLM, CUDA builds, ...). `only` lets their modules be
imported without the `__init__` files that pull those in; names that a module imports but the tested call does
not reach are stood in for. Nothing of it stays in the process afterwards.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@contextmanager
def only(
    package: str, *, bare: tuple[str, ...] = (), stand_ins: dict[str, dict[str, Any]] | None = None
) -> Iterator[None]:
    """Within it: `bare` packages of `package` without their `__init__`, `stand_ins` in place of modules.

    Skips the test where `package` is not installed. Its modules are forgotten at the end.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed (`make env` installs it where this Python may have it)")
    root = Path(next(iter(spec.submodule_search_locations))).parent
    before = dict(sys.modules)
    try:
        for name in bare:
            module = ModuleType(name)
            module.__path__ = [str(root.joinpath(*name.split(".")))]
            sys.modules[name] = module
        for name, values in (stand_ins or {}).items():
            module = ModuleType(name)
            module.__dict__.update(values)
            sys.modules[name] = module
        yield
    finally:
        for name in list(sys.modules):
            ours = name == package or name.startswith(f"{package}.") or name in (stand_ins or {})
            if ours and name not in before:
                del sys.modules[name]
        for name in (*bare, *(stand_ins or {})):
            if name in before:
                sys.modules[name] = before[name]
