"""Benchmarks of two answers and a label that says which is better: JudgeBench, LLMBar, PPE's human votes.

A reward model scores each answer by itself, so that one order of the two is enough (JudgeBench's own
`--single_game`). Accuracy is the share of pairs whose better answer scores higher; equal scores are wrong.
- JudgeBench, Tan et al. 2024, https://arxiv.org/abs/2410.12784, https://github.com/ScalerLab/JudgeBench:
  label `A>B` or `B>A`; sources in four categories, all pairs together.
- LLMBar, Zeng et al. 2023, https://arxiv.org/abs/2310.07641, https://github.com/princeton-nlp/LLMBar: label 1
  or 2. Its files do not name their subset; a column `subset` may.
- PPE, Frick et al. 2024, https://arxiv.org/abs/2410.14872, rows as in
  https://huggingface.co/datasets/lmarena-ai/PPE-Human-Preference-V1: winner `model_a` or `model_b`; a tied
  vote has no winner and is left out, counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrm.data.row_index import Floats
from rayrm.evaluation.benchmark_result import BenchmarkResult, Table, accuracy_row, by_subset
from rayrm.evaluation.entries import BenchmarkRow, Entry

_JUDGEBENCH_CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
_PPE_FLAGS = {
    "is_code": "code",
    "hard_prompt": "hard",
    "easy_prompt": "easy",
    "if_prompt": "instruction following",
    "math_prompt": "math",
}
"""What of a prompt PPE's rows say beside its language, and what its reports call it."""


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """One benchmark of this kind: its columns, what its label says, and the subsets of a row."""

    name: str
    source: str
    prompt: str
    sides: tuple[str, str]
    label: str
    winners: Mapping[str, int]
    """The place of the better side, by label; -1: neither."""
    identity: str
    subsets: Callable[[BenchmarkRow], tuple[str, ...]]

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has its columns."""
        return {self.prompt, *self.sides, self.label} <= set(row)

    def parse(self, row: BenchmarkRow) -> Entry | None:
        """The pair, its better side first; None where the label says that neither is."""
        texts = [row.text(side) for side in self.sides]
        better = self.winners.get(row.word(self.label))
        if better is None:
            row.refuse(self.label, f"must be one of {', '.join(self.winners)}")
        if better < 0:
            return None
        identity = row.word(self.identity) if row.has(self.identity) else ""
        completions = (texts[better], texts[1 - better])
        return Entry(row.where, row.text(self.prompt), completions, 1, self.subsets(row), identity)

    def measure(self, entries: Sequence[Entry], scores: Sequence[Floats]) -> BenchmarkResult:
        """Its numbers, from the scores of each entry's (better, worse)."""
        both = np.asarray([np.asarray(own) for own in scores])
        metrics, table = accuracy_of([entry.subsets for entry in entries], both[:, 0], both[:, 1])
        return BenchmarkResult(self.name, self.source, metrics, {"subsets": table})


def accuracy_of(
    subsets: Sequence[Sequence[str]], better: npt.ArrayLike, worse: npt.ArrayLike
) -> tuple[dict[str, float], Table]:
    """Accuracy of P pairs together (`score`) and of each subset; `subsets`: those in which each pair counts.

    `mean_of_subsets` gives each subset one vote, whatever its size.
    """
    correct = (np.asarray(better, np.float64) > np.asarray(worse, np.float64)).astype(np.float64)
    outcomes = by_subset(correct, subsets)
    whole = accuracy_row(correct)
    metrics = {
        "score": float(correct.mean()),
        "accuracy": float(correct.mean()),
        "ties": float((np.asarray(better) == np.asarray(worse)).mean()),
        "num_pairs": float(len(correct)),
    }
    if outcomes:
        metrics["mean_of_subsets"] = float(np.mean([own.mean() for own in outcomes.values()]))
    rows: Table = [{"subset": name, **accuracy_row(outcomes[name])} for name in sorted(outcomes)]
    return metrics, [*rows, {"subset": "all", **whole}]


def _of_judgebench(row: BenchmarkRow) -> tuple[str, ...]:
    given = row.word("source")
    return (next((name for begin, name in _JUDGEBENCH_CATEGORIES.items() if given.startswith(begin)), given),)


def _of_llmbar(row: BenchmarkRow) -> tuple[str, ...]:
    return (row.word("subset"),) if row.has("subset") else ()


def _of_ppe(row: BenchmarkRow) -> tuple[str, ...]:
    said = [name for flag, name in _PPE_FLAGS.items() if row.content.get(flag)]
    return (*([row.word("language")] if row.has("language") else []), *said)


JUDGEBENCH = LabelledPairs(
    "judgebench",
    "https://github.com/ScalerLab/JudgeBench",
    "question",
    ("response_A", "response_B"),
    "label",
    {"A>B": 0, "B>A": 1},
    "pair_id",
    _of_judgebench,
)
LLMBAR = LabelledPairs(
    "llmbar",
    "https://github.com/princeton-nlp/LLMBar",
    "input",
    ("output_1", "output_2"),
    "label",
    {"1": 0, "2": 1},
    "id",
    _of_llmbar,
)
PPE_HUMAN = LabelledPairs(
    "ppe_human",
    "https://huggingface.co/datasets/lmarena-ai/PPE-Human-Preference-V1",
    "prompt",
    ("response_1", "response_2"),
    "winner",
    {"model_a": 0, "model_b": 1, "tie": -1, "tie (bothbad)": -1},
    "question_id",
    _of_ppe,
)
