"""Pictures for a trained model's card: how scores are spread, and whether margins mean what they say.

Files beside README.md, which go where the model goes: to the hub, and into the registry.
"""

from __future__ import annotations

from pathlib import Path

from rayrm.errors import DataError, writing
from rayrm.metrics.calibration import reliability
from rayrm.model.card import CARD
from rayrm.report.evaluation_figures import reliability_curve, rewards
from rayrm.report.figures import Picture
from rayrm.train.evaluation_record import read_evaluation

_PAPER = '<rect width="100%" height="100%" fill="#ffffff"/>'
"""Under a picture that stands alone: its ink is dark, and so may be the page."""
_AFTER = "\n## Serving\n"


def illustrate_card(directory: Path) -> list[Path]:
    """Draw the first set that a finished run was evaluated on, and show it on the model's card.

    Returns the files; none where nothing was evaluated. Raises RunDirectoryError where the disk takes none.
    """
    try:
        record = read_evaluation(directory / "evaluation")
    except DataError:
        return []
    name, one = next(((name, one) for name, one in record.sets.items() if len(one.outcomes.row)), ("", None))
    file = directory / CARD
    if one is None or not file.is_file():
        return []
    drawn = {
        "card-scores.svg": rewards(name, one.outcomes.won, one.outcomes.lost),
        "card-reliability.svg": reliability_curve(name, reliability(one.outcomes)),
    }
    written = []
    text = file.read_text(encoding="utf-8")
    with writing(file):
        for kept, picture in drawn.items():
            if picture is not None:
                (directory / kept).write_text(_alone(picture), encoding="utf-8")
                written.append(directory / kept)
                shown = f"![{picture.title}]({kept})"
                if shown not in text:
                    text = text.replace(_AFTER, f"\n{shown}\n{_AFTER}", 1)
        file.write_text(text, encoding="utf-8")
    return written


def _alone(picture: Picture) -> str:
    """The picture as a file of its own."""
    head, title, rest = picture.svg.partition("</title>")
    return head + title + _PAPER + rest
