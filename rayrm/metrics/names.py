"""The names under which a run logs: what a sweep may be decided by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

OF_OUTCOMES: Final = (
    "ece", "temperature", "length_margin_correlation", "accuracy_chosen_longer", "accuracy_chosen_shorter",
    "length_controlled_accuracy",
)  # fmt: skip
"""Of the comparisons of an evaluation set: calibration and bias, while a run trains; its record has more."""
EVALUATED: Final = (
    *OF_OUTCOMES,
    "loss", "accuracy", "accuracy_low", "accuracy_high", "ties", "margin", "length_baseline_accuracy",
    "brier", "num_ties", "tie_accuracy", "top_accuracy", "num_rated", "mse", "pearson",
    "mean_reward", "min_reward", "max_reward", "num_pairs", "num_rows",
    "runtime", "samples_per_second", "steps_per_second", "num_tokens",
)  # fmt: skip
"""Of an evaluation set, after `eval_` or `eval_<set>_`; some where its rows have what they measure."""
BY_ATTRIBUTE: Final = ("attribute_mse_", "attribute_pearson_")
"""How those of an evaluation set begin that end in an attribute's name."""
TRAINED: Final = (
    "loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "mse", "grad_norm",
    "skipped_steps", "learning_rate", "num_tokens", "num_tokens_computed", "epoch",
    "pairs_per_second", "tokens_per_second", "data_wait_s",
    "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second",
)  # fmt: skip
"""Of training, and of the whole run at its end."""


def logged_names(sets: Collection[str], attributes: Collection[str]) -> list[str]:
    """What a run with evaluation sets of these names ("" for one without) and these attributes may log."""
    of_a_set = [*EVALUATED, *(begin + name for name in attributes for begin in BY_ATTRIBUTE)]
    return [*(prefix_of(one) + name for one in sets for name in of_a_set), *TRAINED]


def logged_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of all that is measured of a set, what is logged of it while a run trains."""
    return {
        name: value for name, value in metrics.items() if name in EVALUATED or name.startswith(BY_ATTRIBUTE)
    }


def prefix_of(name: str) -> str:
    """What the metrics of an evaluation set are called by: `eval_`, or of one with a name `eval_<name>_`."""
    return f"eval_{name}_" if name else "eval_"
