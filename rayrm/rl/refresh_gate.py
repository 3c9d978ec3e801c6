"""Whether a model that was trained anew may take over: what is measured of both, and the rule.

Measured are the accuracy on the same held-out pairs, by the code of `rayrm evaluate`, and in which order both
models put the texts of the probe that the served version was published with. Publication and the replicas
check more: that every score is finite, and that a replica scores as the publisher did.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rayrm.data.labels import ANY_LABELS
from rayrm.data.preference import parse_row
from rayrm.data.sources import plan_sources, read_work
from rayrm.data.tokenize import TextInput
from rayrm.errors import DataError, RayrmError, RowError, ScoreError
from rayrm.evaluation.evaluate import evaluate_model
from rayrm.serve.probe import built_in_inputs, probe_scores
from rayrm.serve.registry import MANIFEST, PublishedModel
from rayrm.serve.saved import read_json
from rayrm.serve.scorer import RewardModel

logger = logging.getLogger("rayrm.rl")
ALIKE: Final = {
    "tie_model": "davidson",
    "ranking_loss": "pairwise",
    "label_smoothing": 0.0,
    "pointwise_loss": "mse",
}
"""Both models are measured on the same rows and comparisons, whatever each was trained on: as the objective
that takes all of them. What has no better completion counts in no accuracy."""


@dataclass(frozen=True, slots=True)
class Share:
    """A held-out accuracy with its 95% interval, of `num_rows` rows."""

    accuracy: float
    low: float
    high: float
    num_rows: int

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Measured:
    """Of the served version (`before`) and of the new model; `broken`: why the new one has no numbers."""

    before: Share
    after: Share | None = None
    probe_agreement: float | None = None
    broken: str | None = None


def measure(base: PublishedModel, new: Path, sources: Sequence[Any], max_pairs: int | None) -> Measured:
    """Both models on the same held-out rows, and on the probe of `base`.

    Raises DataError, ModelError: as `evaluate_model`; what is wrong with the new model's scores is returned.
    """
    before = accuracy_of(base.path, sources, max_pairs)
    try:
        agreement = probe_agreement(base, new)
        after = accuracy_of(new, sources, max_pairs)
    except ScoreError as error:
        return Measured(before, broken=str(error))
    except ValueError as error:
        if isinstance(error, RayrmError):
            raise
        return Measured(before, broken=str(error))  # a score that is not finite, named
    return Measured(before, after, agreement)


def check_compares(sources: Sequence[Any], max_pairs: int | None = None) -> None:
    """Raise DataError where no held-out row says which completion is better: no accuracy would be measured.

    Reads up to the first that does.
    """
    names: list[str] = []
    for source in sources:
        plan = plan_sources(source, max_rows=max_pairs, name="eval")
        if any(_has_winner(row.content) for piece in plan.work for row in read_work(piece)):
            return
        names += plan.names
    raise _no_winner(names)


def _has_winner(content: Any) -> bool:
    try:
        row = None if isinstance(content, RowError) else parse_row(content, ANY_LABELS)
    except RowError:
        return False
    return row is not None and len(set(row.ranks)) > 1 and row.target != 0.5


def _no_winner(names: Sequence[str]) -> DataError:
    return DataError(
        f"`data.eval` ({', '.join(names[:3])}): no row says which completion is better, and a new model "
        "takes over by its accuracy. Add pairs (`chosen`, `rejected`), or rankings (`completions`, `ranks`)."
    )


def accuracy_of(model: Path, sources: Sequence[Any], max_pairs: int | None = None) -> Share:
    """The accuracy of a saved model over all the sources' rows that have a better completion.

    Raises DataError where the model's limits leave none of them; else as `evaluate_model`.
    """
    found = evaluate_model(model, sources, max_pairs=max_pairs, objective=ALIKE)
    figures = found.get("all") or next(iter(found.values()))
    if "accuracy" not in figures:
        raise _no_winner([name for name in found if name != "all"])
    return Share(
        figures["accuracy"], figures["accuracy_low"], figures["accuracy_high"], int(figures["num_rows"])
    )


def probe_agreement(base: PublishedModel, new: Path) -> float:
    """The share of pairs of probe texts that the new model orders as `base` does; see `order_agreement`.

    Raises ScoreError for a score of the new model that is not finite.
    """
    scorer = RewardModel.from_pretrained(new)
    probe = read_json(base.path / MANIFEST).get("probe")
    if probe is not None:
        inputs, before = [TextInput(**row) for row in probe["inputs"]], probe["scores"]
    else:  # an adapter that was published where its base could not be read
        inputs = built_in_inputs(scorer)
        before = probe_scores(RewardModel.from_pretrained(base.path), inputs)
    return order_agreement(before, probe_scores(scorer, inputs))


def order_agreement(before: Sequence[float], after: Sequence[float]) -> float:
    """Of the pairs that `before` orders, the share that `after` orders alike; a tie there counts half.

    1 is every pair, 0.5 chance, 0 the order turned round: (tau + 1) / 2 of M. G. Kendall, "A new measure of
    rank correlation", Biometrika 30 (1938), where there are no ties. 1 where `before` orders no pair.
    """
    alike = [
        0.5 if later == 0 else float((earlier > 0) == (later > 0))
        for earlier, later in (
            (before[a] - before[b], after[a] - after[b])
            for a, b in itertools.combinations(range(len(before)), 2)
        )
        if earlier != 0
    ]
    return sum(alike) / len(alike) if alike else 1.0


def refusal(
    found: Measured, base: str, *, allowed_drop: float, min_probe_agreement: float, best: Share | None = None
) -> str | None:
    """Why the new model may not take over from version `base`; None: it may.

    `best`: the highest held-out accuracy of a version that served in rounds before. Against `base` alone each
    of many rounds might lose what one may.
    """
    if found.broken is not None or found.after is None or found.probe_agreement is None:
        return f"its scores are broken: {found.broken}"
    drop = found.before.accuracy - found.after.accuracy
    if drop > allowed_drop + 1e-9:  # 0.7 - 0.6 is a little more than 0.1
        return (
            f"its held-out accuracy {found.after} is {drop:.3f} below that of {base}, {found.before}, on "
            f"{found.before.num_rows} rows, and `allowed_drop` is {allowed_drop:g}"
        )
    if best is not None and best.accuracy - found.after.accuracy > allowed_drop + 1e-9:
        return (
            f"its held-out accuracy {found.after} is {best.accuracy - found.after.accuracy:.3f} below "
            f"{best}, the best of a version that served in this refresh, and `allowed_drop` is "
            f"{allowed_drop:g}"
        )
    if found.probe_agreement < min_probe_agreement:
        return (
            f"it orders {found.probe_agreement:.2f} of the pairs of probe texts as {base} does, and "
            f"`min_probe_agreement` is {min_probe_agreement:g}"
        )
    return None


def probe_file(base: PublishedModel, file: Path) -> Path | None:
    """The texts that `base` was published with, written to `file` for the next one; None: built-in ones."""
    manifest = read_json(base.path / MANIFEST)
    if "distribution" not in manifest:
        return None
    file.write_text("".join(json.dumps(row) + "\n" for row in manifest["probe"]["inputs"]), encoding="utf-8")
    return file
