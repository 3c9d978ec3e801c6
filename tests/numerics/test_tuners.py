"""Law 1 for each of PEFT's methods that change layers, and law 2 for what it saves.

Shared prefixes, recomputed layers, shards and a resumed run give the padded run's losses and weights. The
saved adapter has the trained model's scores, here and by PEFT's `AutoPeftModelForSequenceClassification`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification

from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.model.reward_model import load_saved
from rayrm.train.build import ModelSource
from rayrm.train.evaluation import score_model
from rayrm.train.worker import train_rank
from tests.cells import cells_of
from tests.numerics.ranks import ADAPTERS, GATHERED, Variant, job_of, outcome_of, run_variants, tokenized
from tests.numerics.test_same_gradients import OPTIMIZERS, TOLERANCE, differences
from tests.tiny import save_tiny

# What PEFT says of RMSNorm, which its LayerNorm tuning takes all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")

TUNERS = [name for name in ADAPTERS if name != "lora"]  # LoRA's own: test_lora.py
# SGD without clipping: AdamW would hide a gradient that is wrong by a factor.
FEW = {**OPTIMIZERS["sgd"], "max_steps": 4}
RECOMPUTED = {"gradient_checkpointing": True}
ALL: list[Variant] = [
    Variant("reference", padded=True),
    Variant("shared", RECOMPUTED),
    Variant("gathered", GATHERED),
]
# What reads the weights of frozen layers, or has weights of its own beside the layers.
ON_TWO = cells_of(["dora", "ia3", "vera"], ["dora"])


def named(tuner: str, form: Variant) -> Variant:
    settings = {**FEW, **form.settings}
    return replace(form, name=f"{tuner}-{form.name}", settings=settings, lora=True, tuner=tuner)


def assert_same(runs: Path, tuner: str, form: str) -> None:
    outcome, reference = outcome_of(runs / f"{tuner}-{form}"), outcome_of(runs / f"{tuner}-reference")
    assert len(outcome.losses) == FEW["max_steps"]
    assert differences(outcome, reference) == []
    assert outcome.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        off = float((outcome.weights[name] - weight).norm() / (weight.norm() + 1e-9))
        assert off <= TOLERANCE, f"{name} differs by {off:.2e} of itself"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def on_two(root: Path) -> Path:
    forms = [
        Variant("two_ranks_gathered", {**GATHERED, **RECOMPUTED}, num_ranks=2),
        Variant("two_ranks_zero2", {"zero_stage": 2}, num_ranks=2),
    ]
    run_variants([named(tuner, form) for tuner in ON_TWO for form in forms], root)
    return root


@pytest.mark.parametrize("tuner", cells_of(TUNERS, ["dora", "ia3", "vera", "pissa"]))
def test_every_form_of_a_step_has_the_padded_trajectory(root: Path, tuner: str) -> None:
    run_variants([named(tuner, form) for form in ALL], root)
    for form in ALL[1:]:
        assert_same(root, tuner, form.name)


@pytest.mark.parametrize("tuner", ON_TWO)
def test_two_ranks_have_the_padded_trajectory_of_one(on_two: Path, tuner: str) -> None:
    if not (on_two / f"{tuner}-reference").exists():
        run_variants([named(tuner, ALL[0])], on_two)
    for form in ("two_ranks_gathered", "two_ranks_zero2"):
        assert_same(on_two, tuner, form)


@pytest.mark.parametrize("tuner", ["dora", "ia3"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(root: Path, tuner: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = named(tuner, Variant("whole", saving))
    cut = named(tuner, Variant("cut", saving, stop_in=4))
    run_variants([whole, cut], root)
    before, after = outcome_of(root / whole.name), outcome_of(root / cut.name)
    assert {n: w.tolist() for n, w in after.weights.items()} == {
        n: w.tolist() for n, w in before.weights.items()
    }


def trained(tuner: str, tmp_path: Path, **settings: Any) -> tuple[Path, TokenizedSet, Any]:
    """A run's directory, rows, and the trained model's scores of them."""
    base = save_tiny(tmp_path / "base", seed=1)
    rows = TokenizedSet.from_rows(tokenized(12))
    variant = Variant("run", {"learning_rate": 1e-2, "max_steps": 4, **settings})
    job = job_of(variant, tmp_path / "run", tokenized())
    model = train_rank(replace(job, source=ModelSource(str(base), ADAPTERS[tuner]())), lambda _: None)
    return tmp_path / "run", rows, score_model(model, rows, job.config)


def completions(row: TokenizedRow) -> list[torch.Tensor]:
    """The ids of each text of a row, prefix and all."""
    ids = torch.tensor(row.ids, dtype=torch.long)
    prefix, tails = ids[: row.prefix_length], ids[row.prefix_length :]
    parts = tails.split([length - row.prefix_length for length in row.lengths])
    return [torch.cat([prefix, part]) for part in parts]


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_saved_adapter_has_the_trained_scores_here_and_by_peft(tuner: str, tmp_path: Path) -> None:
    directory, rows, scores = trained(tuner, tmp_path)
    assert (directory / "adapter_model.safetensors").exists()
    ours = load_saved(directory, device="cpu")
    config = job_of(Variant("run"), directory, tokenized(1)).config
    assert score_model(ours.model, rows, config) == pytest.approx(scores, abs=TOLERANCE)
    stock = AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval()
    stock.config.pad_token_id = 0
    with torch.no_grad():
        found = [float(stock(input_ids=ids[None]).logits) for ids in completions(rows.fetch([0])[0])]
    assert found == pytest.approx(list(scores[: len(found)]), abs=TOLERANCE)
    assert scores.std() > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("zero_stage", "tuner"),
    cells_of(
        itertools.product((None, 3), ("lora", "dora", "ia3", "vera", "pissa")),
        [(None, "lora"), (None, "dora"), (None, "pissa"), (3, "ia3"), (3, "vera")],
    ),
)
def test_the_merged_model_has_the_trained_scores(tuner: str, zero_stage: int | None, tmp_path: Path) -> None:
    directory, rows, scores = trained(tuner, tmp_path, merge_on_save=True, zero_stage=zero_stage)
    assert (directory / "model.safetensors").exists()
    assert not (directory / "adapter_config.json").exists()
    ours = load_saved(directory, device="cpu")
    config = job_of(Variant("run"), directory, tokenized(1)).config
    assert score_model(ours.model, rows, config) == pytest.approx(scores, abs=TOLERANCE)
