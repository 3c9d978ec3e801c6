"""Population based training by Ray Tune on a tiny model, killed in its middle; exchanged models are exact."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm import cli
from rayrm.runfile import read_run
from rayrm.train.checkpoint import checkpoints
from rayrm.train.launch import train_run
from rayrm.train.records import read_records
from tests.integration.test_resume import weights
from tests.integration.test_sweep import until
from tests.integration.test_sweep_cut_off import RUN, start_sweep

pytestmark = pytest.mark.ray

SWEEP = (
    RUN
    + """
max_steps = 40
save_steps = 5
save_total_limit = 1
eval_steps = 10
[sweep]
metric = "eval_loss"
mode = "min"
scheduler = "pbt"
search = "random"
num_trials = 2
perturb_every = 50
publish = "best"
seed = 1
[sweep.space]
learning_rate = { log = [1e-4, 1e-2] }
adam_beta1 = { uniform = [0.5, 0.95] }
"""
)


def by_hand(checkpoint: Path, copy: Path, values: dict[str, Any]) -> Path:
    """The checkpoint as a run with these values would have written it: its own say so, and nothing else."""
    shutil.copytree(checkpoint, copy)
    for name, change in (("run.json", as_of_run), ("engine/engine.json", as_of_optimizer)):
        told = json.loads((copy / name).read_text())
        change(told, values)
        (copy / name).write_text(json.dumps(told))
    listed = json.loads((copy / "checkpoint.json").read_text())
    for name in ("run.json", "engine/engine.json"):
        listed["files"].pop(name)
    (copy / "checkpoint.json").write_text(json.dumps(listed))
    return copy


def as_of_run(told: dict[str, Any], values: dict[str, Any]) -> None:
    told["identity"].update(values)


def as_of_optimizer(told: dict[str, Any], values: dict[str, Any]) -> None:
    rate, share = values["learning_rate"], 1 - told["scheduler"]["last_epoch"] / 40
    told["scheduler"] |= {"base_lrs": [rate, rate], "_last_lr": [rate * share] * 2}
    for group in told["groups"]:
        group |= {"lr": rate * share, "initial_lr": rate, "betas": [values["adam_beta1"], 0.999]}


@pytest.mark.timeout(2000)
def test_a_killed_population_goes_on_and_what_was_exchanged_is_a_plain_run_from_there(
    sweep_words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.toml").write_text(SWEEP)
    home = tmp_path / "sweep"

    def legs() -> list[Path]:
        return sorted(home.glob("trial-0?.2"))

    with start_sweep(tmp_path) as first:
        until(lambda: legs() and (legs()[0] / "identity.json").exists(), "nothing was exchanged", first)
        first.send_signal(signal.SIGKILL)
        first.communicate()
    (leg,) = legs()
    taken = json.loads((home / "sweep.json").read_text())
    (exchange,) = [one for trial in taken["trials"] for one in trial["exchanges"]]
    assert exchange["at"] == 50.0
    assert exchange["donor_metric"] < exchange["metric"]
    kept = shutil.copytree(home / ".donors" / leg.name / "checkpoint-20", tmp_path / "kept")
    assert cli.main(["sweep", "sweep.toml"]) == 0
    out = capfd.readouterr().out
    trials = json.loads((home / "sweep.json").read_text())["trials"]
    went_on, donor = sorted(trials, key=lambda one: len(one["exchanges"]), reverse=True)
    assert (went_on["exchanges"], donor["exchanges"]) == ([exchange], [])
    assert (went_on["directory"], donor["directory"]) == (leg.name, exchange["donor"])
    # Together a trial's legs have each step once, and what was killed did none twice.
    for part, steps in (
        (home / exchange["directory"], range(1, 21)),
        (leg, range(21, 41)),
        (home / donor["directory"], range(1, 41)),
    ):
        assert [one["step"] for one in read_records(part) if "loss" in one] == list(steps)
    # The donor's own has rotated away, and what was pinned is gone when nothing needs it.
    assert [path.name for path in checkpoints(home / donor["directory"])] == ["checkpoint-40"]
    assert not (home / ".donors").exists()
    values = {key: float(value) for key, _, value in (word.partition("=") for word in went_on["words"])}
    run = read_run(leg / "run.toml")
    of_donor = dict(word.split("=") for word in donor["words"])
    assert run.reward.learning_rate == values["learning_rate"] != float(of_donor["learning_rate"])
    reward = dataclasses.replace(
        run.reward,
        output_dir=str(tmp_path / "plain"),
        resume_from_checkpoint=str(by_hand(kept, tmp_path / "hand" / "checkpoint-20", values)),
    )
    train_run(dataclasses.replace(run, reward=reward))
    one, two = weights(leg), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], two[name]) for name in one)
    best = min(trials, key=lambda one: one["metric"])
    version = json.loads((tmp_path / "registry/best/current.json").read_text())["version"]
    published, own = weights(tmp_path / "registry/best" / version), weights(home / best["directory"])
    assert all(torch.equal(published[name], own[name]) for name in own)
    told = f"50% {exchange['directory']} ({exchange['metric']:.4f}) {exchange['donor']} "
    assert f"{told}({exchange['donor_metric']:.4f}) {leg.name}" in " ".join(out.split())
    assert leg.name in (home / "sweep.html").read_text()
