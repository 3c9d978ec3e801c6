"""Best-of-N curves: how good, by a gold score, the answer is that a model picks of n.

The estimate is exact over all subsets of n of a prompt's N answers, drawn without replacement (Nakano et al.
2021, https://arxiv.org/abs/2112.09332); no subset is sampled. Beside n stands the divergence from the policy
that answered, KL = log n - (n - 1)/n (Gao et al. 2022, https://arxiv.org/abs/2210.10760). Rows: {prompt,
completions, gold}, or those of PPE's sets of correctness {prompt, response_1, ..., scores} (Frick et al.
2024, https://arxiv.org/abs/2410.14872), whose pairs are compared too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrm.data.messages import is_list
from rayrm.data.row_index import Floats
from rayrm.errors import DataError
from rayrm.evaluation.benchmark_result import BenchmarkResult, Table
from rayrm.evaluation.entries import BenchmarkRow, Entry
from rayrm.evaluation.labelled_pairs import accuracy_of

NAME = "best_of_n"
SOURCE = "https://arxiv.org/abs/2210.10760"
GOLD_COLUMNS = ("gold", "gold_score", "gold_scores", "scores")
PPE_NAME = "ppe_correctness"
PPE_SOURCE = "https://huggingface.co/datasets/lmarena-ai/PPE-MMLU-Pro-Best-of-K"


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row has completions and gold scores; `scores` alone may as well be labels to learn from."""
    return {"prompt", "completions"} <= set(row) and any(name in row for name in GOLD_COLUMNS[:-1])


def recognises_ppe(row: Mapping[str, Any]) -> bool:
    """Whether a row has the columns of PPE's sets of correctness."""
    return {"prompt", "response_1", "response_2", "scores"} <= set(row)


def parse(row: BenchmarkRow) -> Entry:
    """A row {prompt, completions: list, and one of `GOLD_COLUMNS`: as many numbers}."""
    completions = row.texts("completions")
    column = next((name for name in GOLD_COLUMNS if row.has(name)), GOLD_COLUMNS[0])
    return _entry(row, completions, row.numbers(column, len(completions)))


def parse_ppe(row: BenchmarkRow) -> Entry:
    """A row {prompt, response_1, response_2, ..., scores}, with `sampled_conflict_pairs`: places from 0."""
    number = 1
    while row.has(f"response_{number}"):
        number += 1
    completions = [row.text(f"response_{place}") for place in range(1, max(number, 2))]
    gold = row.numbers("scores", len(completions))
    column = "sampled_conflict_pairs"
    pairs = row.content.get(column)
    if pairs is None:
        places = range(len(gold))
        return _entry(row, completions, gold, [(i, j) for i in places for j in places[i + 1 :]])
    if not is_list(pairs):
        row.refuse(column, "must be a list of pairs of places")
    for pair in pairs:
        known = is_list(pair) and len(pair) == 2 and all(0 <= place < len(gold) for place in pair)
        if not known or gold[pair[0]] == gold[pair[1]]:
            row.refuse(column, f"must hold pairs of places, from 0 to {len(gold) - 1}, of different `scores`")
    return _entry(row, completions, gold, pairs)


def measure(entries: Sequence[Entry], scores: Sequence[Floats]) -> BenchmarkResult:
    """The curve of R entries, from the scores of each one's completions, R arrays `[K]`."""
    metrics, table = curve([entry.gold for entry in entries], scores)
    metrics["score"] = metrics[f"best_of_{int(metrics['num_completions'])}"]
    return BenchmarkResult(NAME, SOURCE, metrics, {"curve": table}, _uneven(entries, metrics))


def measure_ppe(entries: Sequence[Entry], scores: Sequence[Floats]) -> BenchmarkResult:
    """Accuracy over the pairs of all entries, each of one weight (`score`), and the curve."""
    metrics, table = curve([entry.gold for entry in entries], scores)
    tables = {"curve": table}
    chosen = [(own[i], own[j]) for entry, own in zip(entries, scores, strict=True) for i, j in entry.pairs]
    if chosen:
        both = np.asarray(chosen, np.float64)
        names = [entry.subsets for entry in entries for _ in entry.pairs]
        compared, tables["subsets"] = accuracy_of(names, both[:, 0], both[:, 1])
        metrics |= compared
    return BenchmarkResult(PPE_NAME, PPE_SOURCE, metrics, tables, _uneven(entries, metrics))


def curve(gold: Sequence[npt.ArrayLike], scores: Sequence[npt.ArrayLike]) -> tuple[dict[str, float], Table]:
    """The curve of R prompts, for n from 1 to the fewest completions of one, each prompt of one weight.

    Args:
        gold: how good each completion is, R arrays `[K]`.
        scores: the model's, likewise.

    Returns:
        Metrics: `random` (the mean gold score), `best_of_<n>` for the powers of two and the largest n,
        `oracle` (the best by gold of that n), `recovered` (how much of the way from random to oracle the
        model goes there; absent where there is none), `peak` and `peak_n` (where the curve is highest: below
        the largest n the model is optimized too far), num_completions, num_rows. Table: n, kl, model, oracle,
        random.
    """
    golds = [np.asarray(own, np.float64) for own in gold]
    most = min(len(own) for own in golds)
    model = np.mean([best_of(own, theirs)[:most] for own, theirs in zip(golds, scores, strict=True)], axis=0)
    oracle = np.mean([best_of(own, own)[:most] for own in golds], axis=0)
    chance = float(np.mean([own.mean() for own in golds]))
    shown = sorted({n for n in (2**power for power in range(most.bit_length())) if n <= most} | {most})
    metrics = {
        "random": chance,
        **{f"best_of_{n}": float(model[n - 1]) for n in shown},
        "oracle": float(oracle[-1]),
        "peak": float(model.max()),
        "peak_n": float(model.argmax() + 1),
        "num_completions": float(most),
        "num_rows": float(len(golds)),
    }
    if oracle[-1] > chance:
        metrics["recovered"] = float((model[-1] - chance) / (oracle[-1] - chance))
    table: Table = [
        {
            "n": n,
            "kl": kl_of_best(n),
            "model": float(model[n - 1]),
            "oracle": float(oracle[n - 1]),
            "random": chance,
        }
        for n in range(1, most + 1)
    ]
    return metrics, table


def best_of(gold: npt.ArrayLike, scores: npt.ArrayLike) -> Floats:
    """The expected gold score of the best by score of n, for n = 1..N, `[N]`; equal scores are drawn from.

    In ascending order of score, the i-th of N is the best of n drawn without replacement with probability
    C(i - 1, n - 1) / C(N, n). Among equal scores each is as likely to be the one, so that each counts as
    their mean gold score.
    """
    gold_N, scores_N = np.asarray(gold, np.float64), np.asarray(scores, np.float64)
    _, group, size = np.unique(scores_N, return_inverse=True, return_counts=True)
    mean = np.bincount(group, weights=gold_N) / size
    picked: Floats = _chances(len(gold_N)) @ np.repeat(mean, size)
    return picked


def kl_of_best(n: int) -> float:
    """How far the best of n is from the policy that it is drawn from, in nats: log n - (n - 1)/n."""
    return math.log(n) - (n - 1) / n


@functools.lru_cache(maxsize=8)
def _chances(count: int) -> Floats:
    """C(i - 1, n - 1) / C(N, n) for n (rows) and i (columns) from 1 to N, `[N, N]`."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    n, i = np.ogrid[1 : count + 1, 1 : count + 1]
    rest = np.maximum(i - n, 0)
    log_chance = (
        log_factorial[i - 1]
        - log_factorial[n - 1]
        - log_factorial[rest]
        - (log_factorial[count] - log_factorial[n] - log_factorial[count - n])
    )
    return np.where(i >= n, np.exp(log_chance), 0.0)


def _entry(
    row: BenchmarkRow,
    completions: Sequence[Any],
    gold: tuple[float, ...],
    pairs: Sequence[Sequence[int]] = (),
) -> Entry:
    if len(completions) < 2:
        raise DataError(
            f"{row.where}: {len(completions)} completion in a row of {row.benchmark}; the best of one is no "
            "choice; give at least two, or leave the row out"
        )
    ordered = tuple((i, j) if gold[i] > gold[j] else (j, i) for i, j in pairs if gold[i] != gold[j])
    subset = next((row.word(name) for name in ("subset", "category", "domain") if row.has(name)), "")
    names = ("question_id", "id")
    identity = next((row.word(name) for name in names if row.has(name)), "")
    subsets = (subset,) if subset else ()
    return Entry(row.where, row.text("prompt"), tuple(completions), 0, subsets, identity, gold, ordered)


def _uneven(entries: Sequence[Entry], metrics: Mapping[str, float]) -> tuple[str, ...]:
    most = max(len(entry.completions) for entry in entries)
    fewest = int(metrics["num_completions"])
    if most == fewest:
        return ()
    return (f"rows have from {fewest} to {most} completions: the curve ends at {fewest}",)
