"""What a held-out accuracy must beat: preferring the longer answer, and preferring certain words.

Both see only the two answers. A bag of words is linear in the words, so the question, the same for both
answers, cannot change its choice: what it gets right was readable off the wording. A tie counts one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrm.demo.preferences import Row, answer_text
from rayrm.errors import MissingExtraError

# Words and single punctuation marks, in their own case: "- a", "A!" and "a." all differ.
_WORD = r"(?u)\w+|[^\w\s]"


def length_accuracy(rows: Sequence[Row]) -> float:
    """The share of `rows` whose preferred answer has more characters."""
    return _share([len(answer_text(row["chosen"])) - len(answer_text(row["rejected"])) for row in rows])


def bag_of_words_accuracy(train: Sequence[Row], heldout: Sequence[Row]) -> tuple[float, dict[str, float]]:
    """Held-out accuracy, overall and by kind, of logistic regression on the difference of word counts.

    Trained on `train`. Raises `MissingExtraError` without scikit-learn.
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError(
            "the bag-of-words baseline needs scikit-learn. Run `pip install 'rayrm[demo]'`."
        ) from error
    counter = CountVectorizer(token_pattern=_WORD, lowercase=False)
    counter.fit([answer_text(row[side]) for row in train for side in ("chosen", "rejected")])
    seen = _differences(counter, train)
    # Each pair both ways round: the two classes are then equal, and no intercept is needed.
    features = np.concatenate([seen, -seen])
    labels = np.repeat([1, 0], len(seen))
    weights = LogisticRegression(fit_intercept=False, max_iter=1000).fit(features, labels).coef_[0]
    preferences = _differences(counter, heldout) @ weights
    by_kind = {
        kind: _share([value for value, row in zip(preferences, heldout, strict=True) if row["kind"] == kind])
        for kind in sorted({row["kind"] for row in heldout})
    }
    return _share(preferences), by_kind


def _differences(counter: Any, rows: Sequence[Row]) -> npt.NDArray[np.float64]:
    """Word counts of the preferred answer less those of the other: [rows, words]."""
    chosen, rejected = (
        counter.transform([answer_text(row[side]) for row in rows]) for side in ("chosen", "rejected")
    )
    return np.asarray((chosen - rejected).toarray(), dtype=np.float64)


def _share(preferences: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """The share of positive numbers; a zero counts one half."""
    return float(np.mean((np.sign(np.asarray(preferences, dtype=np.float64)) + 1) / 2))
