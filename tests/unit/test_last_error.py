"""What a rank leaves for the driver comes back as an error of its kind, or with its message."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrm.errors import DataError, RayrmError, RowError, ScoreError, VersionError
from rayrm.train.last_error import forget_error, leave_error, left_error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ScoreError("too long"), ScoreError),
        (RowError("empty", "no text"), DataError),
        (VersionError("gone", served="v2"), RayrmError),  # which holds more than its message
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_comes_back_with_its_message(
    tmp_path: Path, error: RayrmError, kind: type[RayrmError]
) -> None:
    assert left_error(tmp_path) is None
    leave_error(tmp_path, error)
    leave_error(tmp_path, ScoreError("a later one"))
    told = left_error(tmp_path)
    assert type(told) is kind
    assert str(told) == str(error)
    forget_error(tmp_path)
    assert list(tmp_path.iterdir()) == []
