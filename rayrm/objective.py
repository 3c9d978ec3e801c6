"""What a run minimizes: how comparisons, ties, rankings and scored completions become one loss.

`Objective` holds the settings of `RewardConfig` that say so, resolved; the formulas are in
`model/objectives.py`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from rayrm.config import RewardConfig

TieModel = Literal["none", "rao-kupper", "davidson"]
RankingLoss = Literal["pairwise", "plackett-luce"]
PointwiseLoss = Literal["none", "mse", "bce"]
OBJECTIVE_SETTINGS: Final[tuple[str, ...]] = (
    "center_rewards_coefficient",
    "label_smoothing",
    "tie_model",
    "tie_parameter",
    "ranking_loss",
    "pointwise_loss",
    "attributes",
    "attribute_weight",
)
"""The fields of `RewardConfig` that say what is minimized."""
ATTRIBUTE_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
"""What an attribute may be called: metrics are called by it."""
_TIE_PARAMETER: Final[dict[str, float]] = {"none": 0.0, "rao-kupper": 3.0, "davidson": 2.0}
"""With either, two completions of equal reward tie one time in two. With 2 and 1 or less (one in three) no
rewards would make a tie likelier than the likelier winner."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The default is TRL's: Bradley-Terry over comparisons, equal ranks not compared."""

    center: float | None = None
    label_smoothing: float = 0.0
    tie_model: TieModel = "none"
    tie_parameter: float = 0.0
    ranking_loss: RankingLoss = "pairwise"
    pointwise_loss: PointwiseLoss = "none"
    attributes: tuple[str, ...] = ()
    attribute_weight: float = 1.0

    @classmethod
    def of(cls, config: RewardConfig) -> Objective:
        parameter = config.tie_parameter
        return cls(
            config.center_rewards_coefficient,
            config.label_smoothing,
            config.tie_model,
            _TIE_PARAMETER[config.tie_model] if parameter is None else parameter,
            config.ranking_loss,
            config.pointwise_loss,
            tuple(config.attributes),
            config.attribute_weight,
        )

    @property
    def settings(self) -> dict[str, float | str | list[str]]:
        """What differs from TRL's, by `RewardConfig`'s names: `Objective.of` that gives this one again."""
        mine, usual = dataclasses.astuple(self), dataclasses.astuple(Objective())
        triples = zip(OBJECTIVE_SETTINGS, mine, usual, strict=True)
        found = {name: value for name, value, other in triples if value != other}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @property
    def ties(self) -> bool:
        """Whether completions of equal rank are compared."""
        return self.tie_model != "none"

    @property
    def listwise(self) -> bool:
        """Whether a ranking of three or more is one choice after another, and not all its comparisons."""
        return self.ranking_loss == "plackett-luce"


def check_objective(config: RewardConfig) -> list[str]:
    """One line for each rule between these settings that `config` breaks."""
    problems = []
    model, parameter = config.tie_model, config.tie_parameter
    if model == "none" and parameter is not None:
        problems.append(
            f'`tie_parameter` ({parameter:g}) is of a `tie_model`, which is "none". Type '
            "`tie_model=davidson` or `tie_model=rao-kupper`, or delete it."
        )
    if model == "rao-kupper" and parameter is not None and parameter <= 1:
        problems.append(
            f'`tie_parameter` ({parameter:g}) must be above 1 with `tie_model` ("rao-kupper"): at 1 nothing '
            "ties. Type `tie_parameter=3`."
        )
    if config.ranking_loss == "plackett-luce" and model != "none":
        problems.append(
            f'`tie_model` ("{model}") and `ranking_loss` ("plackett-luce"): Plackett-Luce has no ties. Type '
            "`ranking_loss=pairwise` or `tie_model=none`."
        )
    if config.ranking_loss == "plackett-luce" and config.label_smoothing:
        problems.append(
            f"`label_smoothing` ({config.label_smoothing:g}) is of comparisons, and `ranking_loss` "
            '("plackett-luce") makes none of a ranking. Type `ranking_loss=pairwise` or `label_smoothing=0`.'
        )
    return problems + _about_attributes(config)


def _about_attributes(config: RewardConfig) -> list[str]:
    problems = []
    bad = [name for name in config.attributes if not ATTRIBUTE_NAME.fullmatch(name)]
    if bad:
        problems.append(
            f"`attributes` names {bad[0]!r}, and metrics are called by these names. Type names of letters, "
            "digits, _ and -."
        )
    if len(set(config.attributes)) < len(config.attributes):
        problems.append(
            f"`attributes` ({', '.join(config.attributes)}) names one of them twice. Delete it once."
        )
    if not config.attributes and config.attribute_weight != 1:
        problems.append(
            f"`attribute_weight` ({config.attribute_weight:g}) is of `attributes`, and there are none. Type "
            '`attributes=["helpfulness"]`, or delete it.'
        )
    return problems
