"""Metrics of ratings by attribute: what the heads foretell against what rows say, in float64. Numpy only.

Shapes: N completions of R rows, A attributes. A row's rated entries share its weight evenly, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayrm.data.row_index import RowIndex

Floats = npt.NDArray[np.float64]


def rewards_of(outputs: Floats) -> Floats:
    """Of what a scorer gives for each completion the reward alone, `[N]`."""
    return outputs if outputs.ndim == 1 else outputs[:, 0]


def rated_weight(index: RowIndex) -> Floats:
    """The weight of each entry, `[N, A]`: 1 over its row's rated ones, 0 where nothing is rated."""
    rated = ~np.isnan(index.attributes)
    counts = np.bincount(index.row_of, weights=rated.sum(axis=1), minlength=index.num_rows)
    return rated / np.maximum(counts, 1)[index.row_of, None]


def attribute_loss(foretold: Floats, index: RowIndex) -> float:
    """The sum over rows of the mean squared error of their rated entries; `foretold` `[N, A]`."""
    if not index.attributes.shape[1]:
        return 0.0
    return float((rated_weight(index) * _errors(foretold, index)).sum())


def attribute_metrics(foretold: Floats, index: RowIndex, names: Sequence[str]) -> dict[str, float]:
    """For each attribute by which a completion is rated: `attribute_mse_<name>`, in which a row weighs 1, and
    `attribute_pearson_<name>`, the correlation of ratings given and foretold where both vary."""
    found: dict[str, float] = {}
    if not index.attributes.shape[1]:
        return found
    errors = _errors(foretold, index)
    for column, name in enumerate(names):
        rated = ~np.isnan(index.attributes[:, column])
        if not rated.any():
            continue
        counts = np.bincount(index.row_of, weights=rated, minlength=index.num_rows)
        weight = rated / np.maximum(counts, 1)[index.row_of]
        found[f"attribute_mse_{name}"] = float(weight @ errors[:, column] / weight.sum())
        given = index.attributes[rated, column].astype(np.float64)
        if (pearson := correlation(given, foretold[rated, column])) is not None:
            found[f"attribute_pearson_{name}"] = pearson
    return found


def correlation(first: Floats, second: Floats) -> float | None:
    """Pearson's; None where one of them does not vary. (The deviation of equal numbers may be some 1e-17.)"""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _errors(foretold: Floats, index: RowIndex) -> Floats:
    """Squared, and 0 where nothing is rated, `[N, A]`."""
    return np.nan_to_num((foretold - index.attributes.astype(np.float64)) ** 2, nan=0.0)
