"""Outcomes of models whose quality is known, since it was drawn: for tests of what is said of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rayrm.metrics.outcomes import Outcomes

Floats = npt.NDArray[np.float64]


def outcomes_with(margin: npt.ArrayLike, **given: npt.ArrayLike | tuple[str, ...]) -> Outcomes:
    """Comparisons of these margins (the loser scores 0), a row and a prompt each; other arrays as given."""
    won = np.asarray(margin, np.float64)
    num = len(won)
    arrays: dict[str, object] = {
        "won": won,
        "lost": np.zeros(num),
        "won_length": np.full(num, 10),
        "lost_length": np.full(num, 10),
        "weight": np.ones(num),
        "row": np.arange(num),
        "prompt": np.arange(num).astype(np.uint64),
        "group": np.zeros(num, np.int64),
        **given,
    }
    return Outcomes(**arrays)  # type: ignore[arg-type]


def calibrated_margins(rng: np.random.Generator, num: int, spread: float = 2.0) -> Floats:
    """Margins m of which sigmoid(m) win: of one side over the other N(0, spread^2), then by who wins."""
    of_one_side = rng.normal(0, spread, num)
    wins = rng.random(num) < 1 / (1 + np.exp(-of_one_side))
    return np.where(wins, of_one_side, -of_one_side)


def clustered_rights(
    rng: np.random.Generator, num_prompts: int, share: float, correlation: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Right or wrong of prompts with 1 or 6 comparisons, and the prompt of each.

    Right with a probability that a prompt's comparisons share, of a beta distribution: so correlated.
    """
    sizes = rng.choice([1, 6], p=[0.6, 0.4], size=num_prompts)
    of_prompt = np.full(num_prompts, share)
    if correlation:
        rest = (1 - correlation) / correlation
        of_prompt = rng.beta(share * rest, (1 - share) * rest, size=num_prompts)
    prompt = np.repeat(np.arange(num_prompts), sizes)
    return rng.random(len(prompt)) < of_prompt[prompt], prompt
