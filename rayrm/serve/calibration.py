"""Calibration of a published model: mean and spread of its scores on data sets, stored at publication.

A reward model's scores have no zero and no unit of their own, and both differ from data set to data set. Who
adds up rewards, or trains on several kinds of prompts, takes each score by those of its own kind
(`rl/shaping.py`). They belong to the version: every answer brings those of the version that gave it, through
any roll. The texts are not kept, only their hash, by which the same calibration is told from another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrm.errors import ConfigError, PublishError, RayrmError, ScoreError
from rayrm.serve.drift import Distribution
from rayrm.serve.probe import (
    ProbeTexts,
    as_rows,
    check_same_probe,
    opened_to_score,
    probe_record,
    probe_scores,
    read_probe,
    read_texts,
)

if TYPE_CHECKING:
    from rayrm.serve.scorer import RewardModel

MOST_CALIBRATION_TEXTS = 1024
"""Of each file: the error of the mean is then 1/32 of a standard deviation."""


_NO_SPREAD = 1e-6
"""Times max(1, |mean|): a spread of float32 scores below that is rounding, and dividing by it makes noise."""


@dataclass(frozen=True, slots=True)
class PublicationTexts:
    """What a user gives to be scored at publication: a probe, and the texts of each calibration by name."""

    probe: ProbeTexts | None
    calibrate: Mapping[str, ProbeTexts]


def read_publication_texts(
    probe: str | Path | None, calibrate: Mapping[str, str | Path] | None
) -> PublicationTexts:
    """Read the files. Raises DataError, ScoreError, PublishError: what is wrong with which of them."""
    found = {}
    for name, source in (calibrate or {}).items():
        if not name.strip():
            raise PublishError(
                f"`calibrate` ({str(source)!r}) has no name, by which rewards could ask for it. Type "
                "--calibrate NAME=FILE."
            )
        argument = f"`calibrate` {name}"
        texts = read_texts(source, argument, MOST_CALIBRATION_TEXTS)
        if len(texts.inputs) < 2:
            raise PublishError(
                f"{argument} ({texts.source!r}) has one text, and a spread needs two. Give a few hundred, of "
                "the kind that a policy will be rewarded for."
            )
        found[name] = texts
    return PublicationTexts(None if probe is None else read_probe(probe), found)


def publication_record(directory: Path, given: PublicationTexts, *, is_adapter: bool) -> dict[str, Any]:
    """What the manifest says of the scores of the saved model in `directory`: `probe`, `distribution` and
    `calibration`. Raises PublishError as `opened_to_score`, `probe_record` and `calibration_record` do."""
    may_lack_base = is_adapter and given.probe is None and not given.calibrate
    with opened_to_score(directory, may_lack_base=may_lack_base) as model:
        if model is None:
            return {}
        return probe_record(model, given.probe) | calibration_record(model, given.calibrate)


def calibration_record(model: RewardModel, calibrate: Mapping[str, ProbeTexts]) -> dict[str, Any]:
    """`{"calibration": {name: {mean, std, count, source, sha256}}}`; empty where none is given.

    Raises PublishError for a text that cannot be scored, or scores that are all the same.
    """
    found: dict[str, Any] = {}
    for name, texts in calibrate.items():
        argument = f"`calibrate` {name} ({texts.source!r})"
        try:
            scores = Distribution.of(probe_scores(model, texts.inputs), texts.source)
        except ScoreError as error:
            raise PublishError(f"the model is not published, it cannot score {argument}: {error}") from error
        if scores.std <= _NO_SPREAD * max(1.0, abs(scores.mean)):
            raise PublishError(
                f"{argument}: all {scores.count} texts score {scores.mean:.6g}, and no reward can be divided "
                "by that spread. Give various texts, a few hundred."
            )
        found[name] = {**asdict(scores), "sha256": _digest(texts)}
    return {"calibration": found} if found else {}


def check_same_texts(manifest: Mapping[str, Any], given: PublicationTexts) -> None:
    """Raise PublishError if a version that is published already holds another probe, or another calibration,
    than those that are given."""
    check_same_probe(manifest, given.probe)
    if not given.calibrate:
        return
    stored = {name: one["sha256"] for name, one in (manifest.get("calibration") or {}).items()}
    wanted = {name: _digest(texts) for name, texts in given.calibrate.items()}
    if stored == wanted:
        return
    name, version = manifest["name"], manifest["version"]
    files = ", ".join(f"{key}={texts.source}" for key, texts in given.calibrate.items())
    raise PublishError(
        f"{name} {version} is published already, with "
        f"{'the calibrations ' + ', '.join(stored) if stored else 'no calibration'}, and not by the texts of "
        f"`calibrate` ({files}); a published version does not change. Leave `calibrate` out, or publish the "
        "checkpoint under another name."
    )


def stored_calibration(manifest: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(mean, std) by name, of a published model's manifest; empty where none was stored."""
    stored = manifest.get("calibration") or {}
    return {name: (float(one["mean"]), float(one["std"])) for name, one in stored.items()}


def calibration_files(manifest: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """The files by which a successor of a published version is calibrated alike: those of `manifest`, by
    name, as absolute paths; `given` names others in their place, or further ones.

    Raises ConfigError for a file that is gone, cannot be read, or (unless it is `given`) holds other texts.
    """
    stored = manifest.get("calibration") or {}
    found: dict[str, str] = {}
    for name in {**stored, **given}:
        file = given.get(name) or stored[name]["source"]
        whose = (
            f"calibration {name!r} of {manifest['name']} {manifest['version']} is of the texts of {file!r}"
        )
        fix = f"Put them back, or name a file of texts: refresh.calibrate.{name}=FILE."
        try:
            texts = read_publication_texts(None, {name: file}).calibrate[name]
        except (OSError, RayrmError) as error:
            raise ConfigError(f"{whose}, which cannot be read: {error} {fix}") from error
        if name not in given and _digest(texts) != stored[name]["sha256"]:
            raise ConfigError(
                f"{whose}, and these are others now: the next version would have another zero and unit. {fix}"
            )
        found[name] = str(Path(file).absolute())
    return found


def _digest(texts: ProbeTexts) -> str:
    rows = json.dumps(as_rows(texts.inputs), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(rows.encode()).hexdigest()
