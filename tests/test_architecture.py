"""The import rules and sizes of the design, read from the source: each rule holds, and each rule can fail.

A rule is a function from modules to violations, so that it is tried on the package and on synthetic source.
Imports inside functions count for the layers; imports under `TYPE_CHECKING` are exempt everywhere.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rayrm"

COMMANDS = {
    "table",
    "doctor",
    "inspect_command",
    "evaluate_command",
    "serve_commands",
    "score_command",
    "rl_commands",
    "sweep_command",
    "report_command",
    "cli",
}
LAYERS: list[set[str]] = [
    {
        "errors",
        "logs",
        "settings",
        "unsupported",
        "deepspeed_keys",
        "deepspeed_rules",
        "objective",
        "deepspeed_sections",
        "rules",
        "config",
        "data_settings",
        "model_settings",
        "serve_settings",
        "sweep_settings",
        "runfile",
        "own_ray",
        "urls",
        "hashed_file",
    },
    {"data"},
    {"model", "metrics"},
    {"train", "serve"},
    {"evaluation"},
    {"rl"},
    {"report"},
    {"demo"},
    COMMANDS,
]
"""Bottom first. A part imports what stands below it; parts of one row do not know each other."""

TOGETHER = [
    LAYERS[0],
    COMMANDS,
]
"""Rows whose modules form one part and may import each other."""

ABOVE = {"jobs", "examples", "tests"}
"""They import the package, and the package imports none of them."""

RAY_FILES = {
    "own_ray.py",
    "data/dispatcher.py",
    "data/stream_steps.py",
    "data/ingest.py",
    "data/streaming.py",
    "data/tokenized_set.py",
    "train/launch.py",
    "evaluation/bulk_score.py",
    "evaluation/evaluate.py",
    "evaluation/gate.py",
    "evaluation/scoring.py",
    "train/workers.py",
    "train/sweep.py",
    "train/sweep_population.py",
    "train/sweep_search.py",
    "train/sweep_trial.py",
    "serve/connect.py",
    "serve/deployment.py",
    "serve/gateway.py",
    "serve/metrics.py",
    "serve/pointer.py",
    "serve/replica.py",
    "serve/roll.py",
    "serve/caller.py",
    "serve/client.py",
    "rl/launch.py",
    "rl/nemo_rl.py",
}
"""They may import ray anywhere, and their docstrings say "[RAY]"."""

RAY_INSIDE_FUNCTIONS = re.compile(r"cli\.py|demo/\w+\.py")
DEEPSPEED_FILE = "train/zero.py"

NO_TORCH_ON_IMPORT = [
    "__init__",
    "config",
    "runfile",
    "errors",
    "data.packing",
    "data.loads",
    "data.planning",
    "data.prefix_keys",
    "data.order",
    "data.preference",
    "data.inspect",
    "data.inspect_text",
    "data.quarantine",
    "data.selection",
    "data.tokenize",
    "rl.moments",
    "rl.shaping",
    "serve.client",
    "serve.drift",
    "serve.ensemble",
    "serve.idle",
    "serve.http",
    "serve.scheduler",
]
"""Importing these, with all that they import, must not load torch."""

FILE_CEILING = 400
FUNCTION_CEILING = 80
BAD_CLASS_WORDS = ("Manager", "Helper", "Wrapper", "Handler", "Base", "Impl", "Util", "Utils")
BAD_MODULE_NAMES = {"utils", "util", "common", "helpers", "misc"}


@dataclass(frozen=True)
class Import:
    """One imported module: `from a.b import c` gives both `a.b` and `a.b.c`, since c may be a module."""

    name: str
    line: int
    in_function: bool


@dataclass(frozen=True)
class Module:
    path: str  # relative to the package, with forward slashes
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def dotted(self) -> str:
        """`data/order.py` -> `data.order`; a package's `__init__` is the package."""
        name = self.path.removesuffix(".py").replace("/", ".")
        return name.removesuffix(".__init__") if name != "__init__" else ""

    @property
    def part(self) -> str:
        return self.dotted.split(".")[0]


Rule = Callable[[list[Module]], list[str]]


@cache
def imports_of(module: Module) -> list[Import]:
    """Every import outside `TYPE_CHECKING`, with relative ones resolved."""
    package = [PACKAGE, *module.path.split("/")[:-1]]

    def names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        parent = package[: len(package) - node.level + 1] if node.level else []
        stem = ".".join([*parent, *([node.module] if node.module else [])])
        yield stem
        yield from (f"{stem}.{alias.name}" for alias in node.names)

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from (Import(name, child.lineno, in_function) for name in names(child))
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                for other in child.orelse:
                    yield from visit(ast.Module(body=[other], type_ignores=[]), in_function)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, in_function or inside)

    return list(visit(module.tree, False))


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def height(part: str) -> int | None:
    return next((level for level, parts in enumerate(LAYERS) if part in parts), None)


def layers_point_one_way(modules: list[Module]) -> list[str]:
    problems = []
    for module in modules:
        mine = height(module.part)
        if mine is None and module.part:
            problems.append(f"{module.path}: `{module.part}` stands in no layer: give it a place in LAYERS")
        for used in imports_of(module):
            if used.name.split(".")[0] in ABOVE:
                problems.append(f"{module.path}:{used.line}: imports {used.name}")
            if not used.name.startswith(PACKAGE + "."):
                continue
            part = used.name.split(".")[1]
            theirs = height(part)
            if mine is None or theirs is None or part == module.part:
                continue
            together = any({part, module.part} <= parts for parts in TOGETHER)
            if theirs > mine or (theirs == mine and not together):
                problems.append(f"{module.path}:{used.line}: {module.part} imports {used.name}")
    return problems


def ray_stays_in_its_files(modules: list[Module]) -> list[str]:
    problems = []
    for module in modules:
        marked = "[RAY]" in (ast.get_docstring(module.tree) or "")
        if marked != (module.path in RAY_FILES):
            problems.append(f"{module.path}: the docstring's [RAY] and the list RAY_FILES disagree")
        for used in imports_of(module):
            lazy = used.in_function and RAY_INSIDE_FUNCTIONS.fullmatch(module.path)
            if is_in(used.name, "ray") and not lazy and module.path not in RAY_FILES:
                problems.append(f"{module.path}:{used.line}: imports {used.name}")
    return problems


def deepspeed_stays_in_its_file(modules: list[Module]) -> list[str]:
    return [
        f"{module.path}:{used.line}: imports {used.name}"
        for module in modules
        for used in imports_of(module)
        if is_in(used.name, "deepspeed") and module.path != DEEPSPEED_FILE
    ]


def torch_is_not_loaded_by_the_light_modules(modules: list[Module]) -> list[str]:
    """Follows imports at module level through the package, parents' `__init__` included."""
    known = {module.dotted: module for module in modules}

    def loaded(dotted: str, seen: set[str]) -> Iterator[str]:
        if dotted in seen:
            return
        seen.add(dotted)
        if dotted:
            yield from loaded(dotted.rpartition(".")[0], seen)
        for used in imports_of(known[dotted]) if dotted in known else ():
            if used.in_function:
                continue
            if is_in(used.name, "torch"):
                yield f"{known[dotted].path}:{used.line}"
            if is_in(used.name, PACKAGE):
                yield from loaded(used.name.removeprefix(PACKAGE).lstrip("."), seen)

    return [
        f"{light}: loads torch in {place}"
        for light in NO_TORCH_ON_IMPORT
        for place in loaded("" if light == "__init__" else light, set())
    ]


def sizes_stay_under_their_ceilings(modules: list[Module]) -> list[str]:
    problems = []
    for module in modules:
        num_lines = len(module.source.splitlines())
        if num_lines > FILE_CEILING:
            problems.append(f"{module.path}: {num_lines} lines, ceiling {FILE_CEILING}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_CEILING:
                    problems.append(f"{module.path}:{node.lineno}: {node.name} has {length} lines")
    return problems


def names_say_what_a_thing_is(modules: list[Module]) -> list[str]:
    problems = []
    for module in modules:
        if BAD_MODULE_NAMES & set(module.dotted.split(".")):
            problems.append(f"{module.path}: a module's name says what it holds")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                words = re.findall(r"[A-Z][a-z0-9]*", node.name)
                if set(words) & set(BAD_CLASS_WORDS):
                    problems.append(f"{module.path}:{node.lineno}: class {node.name}")
    return problems


def modules_open_with_a_docstring(modules: list[Module]) -> list[str]:
    return [f"{module.path}: no docstring" for module in modules if not ast.get_docstring(module.tree)]


RULES: list[Rule] = [
    layers_point_one_way,
    ray_stays_in_its_files,
    deepspeed_stays_in_its_file,
    torch_is_not_loaded_by_the_light_modules,
    sizes_stay_under_their_ceilings,
    names_say_what_a_thing_is,
    modules_open_with_a_docstring,
]

PLANTED: list[tuple[Rule, str, str]] = [
    (layers_point_one_way, "data/order.py", "from rayrm.train import loop"),
    (layers_point_one_way, "data/order.py", "from ..train.loop import run_loop"),
    (layers_point_one_way, "data/order.py", "from .. import train"),
    (layers_point_one_way, "errors.py", "import rayrm.data.packing"),
    (layers_point_one_way, "serve/scorer.py", "def score():\n    from rayrm.train.step import train_step"),
    (layers_point_one_way, "train/loop.py", "from rayrm.serve.registry import publish"),
    (layers_point_one_way, "metrics/step.py", "from rayrm import model"),
    (layers_point_one_way, "demo/story.py", "from rayrm.cli import main"),
    (layers_point_one_way, "cli.py", "def main():\n    import jobs.train"),
    (layers_point_one_way, "extras/thing.py", "import json"),
    (ray_stays_in_its_files, "train/loop.py", "import ray"),
    (ray_stays_in_its_files, "train/loop.py", "def run():\n    from ray import train"),
    (ray_stays_in_its_files, "cli.py", "import ray.serve"),
    (ray_stays_in_its_files, "train/loop.py", '"""[RAY] A claim the list does not know."""'),
    (ray_stays_in_its_files, "train/workers.py", '"""A [RAY-less] docstring."""\nimport ray'),
    (deepspeed_stays_in_its_file, "train/engine.py", "def build():\n    import deepspeed.ops"),
    (torch_is_not_loaded_by_the_light_modules, "data/order.py", "from torch import Tensor"),
    (torch_is_not_loaded_by_the_light_modules, "data/__init__.py", "import torch"),
    (
        torch_is_not_loaded_by_the_light_modules,
        "config.py",
        "try:\n    import torch\nexcept ImportError:\n    pass",
    ),
    (sizes_stay_under_their_ceilings, "data/order.py", "x = 1\n" * 401),
    (sizes_stay_under_their_ceilings, "data/order.py", "def f():\n" + "    x = 1\n" * 80),
    (names_say_what_a_thing_is, "data/order.py", "class OrderManager: ..."),
    (names_say_what_a_thing_is, "data/utils.py", "x = 1"),
    (names_say_what_a_thing_is, "helpers/__init__.py", "x = 1"),
    (modules_open_with_a_docstring, "data/order.py", "x = 1"),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (layers_point_one_way, "data/order.py", "from rayrm.errors import DataError"),
    (layers_point_one_way, "rules.py", "from rayrm.config import RewardConfig"),
    (layers_point_one_way, "cli.py", "from rayrm.demo.story import tell\nfrom rayrm.doctor import examine"),
    (
        layers_point_one_way,
        "data/order.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rayrm.train import loop",
    ),
    (ray_stays_in_its_files, "train/workers.py", '"""[RAY] The trainer."""\nimport ray'),
    (ray_stays_in_its_files, "cli.py", "def main():\n    import ray"),
    (ray_stays_in_its_files, "data/order.py", "import rayrm"),
    (deepspeed_stays_in_its_file, "train/zero.py", "import deepspeed"),
    (torch_is_not_loaded_by_the_light_modules, "config.py", "def check():\n    import torch"),
    (sizes_stay_under_their_ceilings, "data/order.py", "x = 1\n" * 400),
    (names_say_what_a_thing_is, "data/order.py", "class Baseline: ...\nclass DataBasement: ..."),
]


@cache
def read_package(folder: Path) -> list[Module]:
    paths = sorted(folder.rglob("*.py"))
    return [Module(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def rule_names(cases: Iterable[tuple[Rule, str, str]]) -> list[str]:
    return [f"{rule.__name__}:{path}" for rule, path, _ in cases]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_each_rule(rule: Rule) -> None:
    assert rule(read_package(ROOT / PACKAGE)) == []


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED, ids=rule_names(PLANTED))
def test_each_rule_finds_a_planted_violation(rule: Rule, path: str, source: str) -> None:
    assert any(path in problem or "torch" in problem for problem in rule([Module(path, source)]))


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED, ids=rule_names(ALLOWED))
def test_no_rule_refuses_what_the_design_allows(rule: Rule, path: str, source: str) -> None:
    assert rule([Module(path, source)]) == []


def test_a_violation_planted_in_the_real_package_is_found(tmp_path: Path) -> None:
    modules = read_package(ROOT / PACKAGE)
    planted = [
        Module(module.path, module.source + "\nfrom rayrm.train import loop\nimport ray\n")
        if module.path == "data/packing.py"
        else module
        for module in modules
    ]
    line = len(next(module.source for module in modules if module.path == "data/packing.py").splitlines()) + 2
    assert layers_point_one_way(planted)[0].startswith(f"data/packing.py:{line}: data imports rayrm.train")
    assert ray_stays_in_its_files(planted) == [f"data/packing.py:{line + 1}: imports ray"]


def test_torch_is_found_through_the_modules_that_a_light_module_imports() -> None:
    chain = [
        Module("config.py", "from rayrm.rules import check"),
        Module("rules.py", "from rayrm.settings import settings"),
        Module("settings.py", "import torch.nn"),
    ]
    assert torch_is_not_loaded_by_the_light_modules(chain) == ["config: loads torch in settings.py:1"]


def test_the_document_names_every_file_and_no_file_that_is_gone() -> None:
    """Each file of the package has its line in ARCHITECTURE.md; add or delete it with the file."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text.split("## Files")[1].split("## Laws")[0]))
    modules = {module.path for module in read_package(ROOT / PACKAGE)}
    files = {path for path in modules if not path.endswith("__init__.py")}
    assert sorted(files - named) == [], "these files have no line"
    assert sorted(named - files) == [], "these lines have no file"
    tests = re.findall(r"`(tests/[\w/]*(?:\.py)?)`", text)
    assert [name for name in tests if not (ROOT / name).exists()] == []


def test_every_listed_light_module_exists() -> None:
    """A renamed module would otherwise leave the list checking nothing."""
    known = {module.dotted for module in read_package(ROOT / PACKAGE)}
    assert {name for name in NO_TORCH_ON_IMPORT if name != "__init__"} <= known


def test_importing_the_package_and_its_configuration_loads_neither_torch_nor_ray() -> None:
    code = "import sys, rayrm, rayrm.config, rayrm.runfile; print(*{'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
