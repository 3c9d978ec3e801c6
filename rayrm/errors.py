"""The exceptions a user can meet; each message names the thing, the rule it broke and what to type.

RayrmError
├── ConfigError            (ValueError)    a setting of a run
├── DataError              (ValueError)    a source, a file
│   ├── NoRowLeftError                     every row of a reading was refused
│   └── RowError                           one row of a source, with a machine-readable reason
├── ModelError             (ValueError)    a model, a tokenizer
├── RunDirectoryError      (ValueError)    an output directory that holds something else
├── CheckpointError        (ValueError)    a checkpoint that cannot be read or does not fit
├── PublishError           (ValueError)    a model that cannot be published or opened
├── ScoreError             (ValueError)    an input that cannot be scored
│   └── UnknownModelError                  a request for a model that the service does not have
├── RewardUnavailableError (RuntimeError)  the reward service gave no answer before the deadline
│   ├── OverloadedError                    its queue is full; `retry_after_s` says when to come back
│   ├── VersionError                       the version that was asked for does not answer
│   └── PeerFailedError                    another rank failed, whose scores this one's statistics need
├── RollError              (RuntimeError)  a version that the service refused; the one before serves on
├── ClusterError           (RuntimeError)  what was asked is more than the cluster has
├── PreemptedError         (RuntimeError)  a run that was told to leave, saved and left
└── MissingExtraError      (ImportError)   an optional package is not installed
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike


class RayrmError(Exception):
    """Every error that rayrm raises on purpose."""


class ConfigError(RayrmError, ValueError):
    """A setting that is unknown, contradicts another, or cannot be honoured."""


class DataError(RayrmError, ValueError):
    """A data source that is missing, unreadable or empty, or a share of bad rows above the limit."""


class NoRowLeftError(DataError):
    """Every row of a reading was refused."""


class RowError(DataError):
    """One row that cannot be trained on.

    `reason` is a short kebab-case name under which refusals are counted (`missing-chosen`, `too-long`).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class ModelError(RayrmError, ValueError):
    """A model or tokenizer that cannot serve as a reward model."""


class RunDirectoryError(RayrmError, ValueError):
    """An output directory that holds another run or a finished one, that another process writes in, or whose
    disk takes no more."""


class CheckpointError(RayrmError, ValueError):
    """A checkpoint that is missing, corrupt, or of another run."""


class PublishError(RayrmError, ValueError):
    """A model that cannot be published, or a registry that cannot be read."""


class ScoreError(RayrmError, ValueError):
    """An input that cannot be scored: wrong shape, too long, or of the other text form."""


class UnknownModelError(ScoreError):
    """A request names a model or an ensemble that the service does not have."""


class RewardUnavailableError(RayrmError, RuntimeError):
    """The reward service gave no answer before the deadline; no reward was made up in its place."""


class OverloadedError(RewardUnavailableError):
    """The service has as many requests as it may queue; `retry_after_s`: when it may have room."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)


class VersionError(RewardUnavailableError):
    """The version that the caller pinned is not the one that answers; `served` is."""

    def __init__(self, message: str, served: str) -> None:
        super().__init__(message)
        self.served = served

    def __reduce__(self) -> tuple[type[VersionError], tuple[str, str]]:
        return type(self), (str(self), self.served)


class PeerFailedError(RewardUnavailableError):
    """Another rank failed, so that this one has no statistics; what that rank raised says why."""


class RollError(RayrmError, RuntimeError):
    """A version that could not take over: the message holds why, and the version before serves on."""


class ClusterError(RayrmError, RuntimeError):
    """More workers or resources than the cluster can give."""


class PreemptedError(RayrmError, RuntimeError):
    """Training was told to leave (SIGTERM): its checkpoint is complete, and the run can go on from there."""


class MissingExtraError(RayrmError, ImportError):
    """An optional package is needed; the message holds the pip line."""


@contextmanager
def writing(file: str | PathLike[str]) -> Iterator[None]:
    """What the disk refuses within the block ends the run, and says what to type."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"`{file}` cannot be written ({error.strerror or error}). Free space there, then start the same "
            "command again: the run goes on from its last checkpoint."
        ) from error
