"""Every `ray job submit` that the jobs' docstrings and the README show is one that Ray and rayrm take."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.packaging import _get_excludes
from ray.dashboard.modules.job.cli import submit

from rayrm import cli
from rayrm.config import ServeConfig
from rayrm.rl.refresh_settings import read_refresh
from rayrm.rl.runfile import read_rl_run
from rayrm.runfile import read_run, split_words
from rayrm.sweep_settings import read_sweep

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(
    path for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith(("soak", "prepare_model"))
)
READERS: dict[str, Any] = {
    "train": read_run,
    "sweep": lambda path, words: read_sweep(path, words).read(),
    "rl": read_rl_run,
    "refresh": read_refresh,
}


def documented(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def commands(text: str) -> Iterator[list[str]]:
    """The words after `ray job submit` of each command of a text, as a shell would split them."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if not line.lstrip().startswith("ray job submit"):
            continue
        command = line.partition("#")[0].strip()
        for more in lines[start + 1 :]:
            if not command.endswith("\\") and command.count("'") % 2 == 0:
                break
            command = command.removesuffix("\\") + " " + more.strip()
        yield shlex.split(command)[3:]


SHOWN = [
    pytest.param(path.name, words, id=f"{path.name}-{place}")
    for path in (*JOBS, ROOT / "README.md")
    for place, words in enumerate(commands(documented(path) if path.suffix == ".py" else path.read_text()))
    if "--" in words
]


def test_each_job_shows_its_command_and_its_exit_status() -> None:
    assert {"train.py", "evaluate.py", "score.py", "publish.py", "serve.py", "grpo.py"} <= {
        path.name for path in JOBS
    }
    for path in JOBS:
        found = [words[words.index("--") + 1 :] for words in commands(documented(path))]
        assert found, path.name
        assert all(words[:2] == ["python", f"jobs/{path.name}"] for words in found), path.name
        assert re.search(r"^Exit status:", documented(path), re.MULTILINE), path.name


@pytest.mark.parametrize(("where", "words"), SHOWN)
def test_ray_and_the_job_take_the_command(
    where: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Ray makes of its options; a wrong one, or JSON that is none, raises.
    given = submit.make_context("submit", list(words)).params
    python, script, *arguments = given["entrypoint"]
    assert python == "python"
    told: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda words: told.append(words) or 0)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    monkeypatch.chdir(ROOT)  # the directory that is submitted
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    [[verb, *rest]] = told
    options, settings = cli._parser().parse_known_args([verb, *rest])
    settings = [*settings, *getattr(options, "settings", [])]
    assert all(re.match(r"[a-z_.]+=", word) for word in settings), settings
    if verb in READERS:
        path, overrides = split_words([*options.run, *settings])
        READERS[verb](path, overrides)
    elif verb == "serve":
        ServeConfig(**dict(word.split("=", 1) for word in settings))
    else:
        assert not settings
    if given["runtime_env_json"]:
        environment = json.loads(given["runtime_env_json"])
        assert "env_vars" in environment
        # By Ray's own reading of them: what is left out is no part of the package.
        leaves_out = _get_excludes(ROOT, environment["excludes"])
        assert leaves_out(ROOT / "data" / "pairs.jsonl")
        assert not any(leaves_out(path) for path in (ROOT / "rayrm").rglob("*.py"))
