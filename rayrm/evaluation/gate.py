"""[RAY] Whether a model may be published: measured on the sets of a gate file, and each rule's outcome.

A model passes where every rule of every set holds. A rule whose figure a set does not have (no comparison
with a winner, scores or lengths that do not vary) is broken: what is not measured is not known to be good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayrm.evaluation.evaluate import evaluate
from rayrm.evaluation.gate_settings import GateSet
from rayrm.evaluation.scoring import Progress
from rayrm.metrics.comparison import compare
from rayrm.train.evaluation_record import SetEvaluation


@dataclass(frozen=True, slots=True)
class Check:
    """One rule on one set: whether it holds, and a sentence with the figure and the limit."""

    set: str
    rule: str
    holds: bool
    said: str


def check_gate(
    model: str | Path,
    gate: Mapping[str, GateSet],
    current: str | Path | None = None,
    *,
    on_progress: Progress | None = None,
) -> list[Check]:
    """Measure the model on every set of the gate, and what each rule makes of it.

    `current`: the version that serves, for `no_worse`, which holds where there is none. Raises DataError,
    ModelError as `evaluate`.
    """
    checks: list[Check] = []
    for name, asked in gate.items():
        sources = {name: asked.data}
        found = evaluate(model, sources, max_pairs=asked.max_pairs, on_progress=on_progress).sets[name]
        checks += _limits(name, asked, found)
        if not asked.no_worse:
            continue
        if current is None:
            checks.append(Check(name, "no_worse", True, f"{name}: no version is published to compare with"))
            continue
        before = evaluate(current, sources, max_pairs=asked.max_pairs, on_progress=on_progress).sets[name]
        checks.append(_no_worse(name, asked, found, before))
    return checks


def broken_rules(checks: Sequence[Check]) -> str | None:
    """What is broken, a line each; None where the model passes."""
    broken = [check.said for check in checks if not check.holds]
    return "\n".join([f"{len(broken)} of {len(checks)} rules are broken:", *broken]) if broken else None


def _limits(name: str, asked: GateSet, found: SetEvaluation) -> list[Check]:
    """What the figures of one set make of the limits that are asked of it."""
    return [
        _limit(name, rule, figure, limit, found.metrics)
        for rule, figure, limit in (
            ("min_accuracy", "accuracy", asked.min_accuracy),
            ("max_ece", "ece", asked.max_ece),
            ("max_length_correlation", "length_margin_correlation", asked.max_length_correlation),
        )
        if limit is not None
    ]


def _limit(name: str, rule: str, figure: str, limit: float, figures: Mapping[str, float]) -> Check:
    if figure not in figures:
        said = f"{name}: its {figures['num_rows']:.0f} rows have no {figure}, which `{rule}` asks of them"
        return Check(name, rule, False, said)
    value = figures[figure]
    is_least = rule.startswith("min_")
    beyond = limit - value if is_least else abs(value) - limit
    said = f"{name}: {figure} is {value:.3f}"
    if figure == "accuracy":
        said += f" [{figures['accuracy_low']:.3f}, {figures['accuracy_high']:.3f}]"
    said += f", and `{rule}` is {limit:g}"
    holds = beyond <= 1e-9  # 0.7 - 0.6 is a little more than 0.1
    if not holds:
        said += f": {beyond:.3f} too {'low' if is_least else 'high'}"
    return Check(name, rule, holds, said)


def _no_worse(name: str, asked: GateSet, found: SetEvaluation, before: SetEvaluation) -> Check:
    if not len(found.outcomes.row):
        return Check(name, "no_worse", False, f"{name}: no row says which completion is better")
    paired = compare(found.outcomes, before.outcomes)
    holds = paired.high >= -asked.allowed_drop - 1e-9
    said = (
        f"{name}: accuracy {paired.accuracy_a:.3f} against {paired.accuracy_b:.3f} of the current version, "
        f"difference {paired.difference:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}] on "
        f"{paired.num_rows} rows (p {paired.p_value:.3g})"
    )
    if not holds:
        said += f": worse by more than `allowed_drop` ({asked.allowed_drop:g})"
    return Check(name, "no_worse", holds, said)
