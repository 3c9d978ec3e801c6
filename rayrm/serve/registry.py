"""Published models: `registry/<name>/<version>/`, immutable, checked by content, opened by name.

A version is the first 12 hex digits of the SHA-256 over the model's content (weights, config, tokenizer, text
form): publishing the same content again finds the same version and changes nothing. A version appears whole
or not at all (written beside, synced, renamed), its files are read-only, and `current.json` names the
version that `open_published` gives when none is asked for. Opening reads every byte once to compare
checksums (about 1 GB/s); `RewardModel.from_pretrained(path)` loads without that. Torch is needed to publish,
for the scores of the probe (`probe.py`) and to merge a LoRA adapter, and not to open.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rayrm.errors import PublishError
from rayrm.hashed_file import write_hashed
from rayrm.model.card import CARD
from rayrm.serve.calibration import (
    PublicationTexts,
    check_same_texts,
    publication_record,
    read_publication_texts,
)
from rayrm.serve.published_card import published_card
from rayrm.serve.saved import SavedFiles, file_sha256, read_json, saved_files, training_records
from rayrm.settings import readable

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CURRENT = "current.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COPY_BYTES = 1 << 20
_Read = TypeVar("_Read", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One immutable version of a model: `path` is a directory that stock transformers loads as well.

    `is_new` says whether this call to `publish` wrote it (False: the same content was there already).
    """

    name: str
    version: str
    path: Path
    is_new: bool = field(default=False, compare=False)


class _File(BaseModel):
    sha256: str
    bytes: int


class _Probe(BaseModel):
    inputs: list[dict[str, Any]]
    scores: list[float]


class _Calibration(BaseModel):
    mean: float
    std: float
    count: int
    source: str
    sha256: str


class Current(BaseModel):
    """What is read of current.json."""

    version: str


class Manifest(Current):
    """What is read of a manifest; it says more."""

    name: str
    created: str
    source: str
    files: dict[str, _File]
    probe: _Probe | None = None
    calibration: dict[str, _Calibration] | None = None


def publish(
    checkpoint: str | Path,
    registry: str | Path,
    name: str,
    *,
    merge_lora: bool = True,
    make_current: bool = True,
    probe: str | Path | None = None,
    calibrate: Mapping[str, str | Path] | None = None,
) -> PublishedModel:
    """Copy the saved model `checkpoint` into `registry/<name>/<version>/` and make it the current version.

    A PEFT adapter directory is merged into its base (the trained head is kept); with `merge_lora=False` the
    adapter itself is published and still needs its base model to load. Publishing the same content twice
    returns the same version with `is_new=False`.

    The manifest keeps the model's scores of a few texts, by which a replica checks what it loaded: built-in
    ones, or the first 256 of the file `probe` (rows as `rayrm score` takes). Give texts like those that will
    be served: the mean and spread of their scores are then kept as well, and drift is measured against them.
    For these scores the model is loaded on the CPU in float32: 4 bytes a parameter.

    `calibrate` names files of texts, as `{"chat": "chat.jsonl"}`: mean and standard deviation of the scores
    of the first 1024 of each are kept, and come with every answer of this version, for rewards that are to
    have them as zero and unit (`rayrm.rl.shaping`). Texts of the policy before its training do well.

    Raises:
        PublishError: not a saved reward model (no safetensors, not one label, a shard missing or corrupt), a
            `name` that cannot be a directory's name, a score that is not finite, a calibration of one text
            or without spread, or content that is published already with another probe or calibration.
        DataError, ScoreError: what is wrong with the files `probe` and `calibrate`, by its line.
    """
    check_published_name(name)
    given = read_publication_texts(probe, calibrate)
    home = Path(registry) / name
    saved = saved_files(checkpoint)
    if saved.is_adapter and merge_lora:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".merge-") as merged:
            _merge_adapter(saved, Path(merged))
            published = _publish_files(saved_files(merged), saved.directory, home, name, given)
    else:
        published = _publish_files(saved, saved.directory, home, name, given)
    if make_current:
        set_current(registry, name, published.version)
    return published


def open_published(
    registry_or_path: str | Path, name: str | None = None, version: str | None = None
) -> PublishedModel:
    """Open a version and compare every file with its checksum.

    Takes a version's directory, a model's directory (`registry/<name>`: its current version), or a registry
    with `name` and, optionally, `version`.

    Raises:
        PublishError: nothing is published there, or a file is missing or differs from its checksum (named).
    """
    root = Path(registry_or_path)
    home = root / name if name is not None else root
    if version is not None:
        directory = home / version
    elif (home / MANIFEST).is_file():
        directory = home
    else:
        directory = home / current_version(home)
    if not (directory / MANIFEST).is_file():
        raise PublishError(
            f"no published model at {str(directory)!r}: there is no {MANIFEST}. "
            f"{_versions_sentence(home)} "
            "Publish one with `rayrm publish CHECKPOINT --registry DIR --name NAME`."
        )
    manifest = _checked(Manifest, directory / MANIFEST)
    _verify(directory, manifest)
    return PublishedModel(manifest.name, manifest.version, directory)


def list_versions(registry: str | Path, name: str) -> list[str]:
    """The versions published under `name`, oldest first; empty when there are none."""
    home = Path(registry) / name
    paths = home.glob(f"*/{MANIFEST}")
    manifests = [_checked(Manifest, path) for path in paths if not path.parent.name.startswith(".")]
    return [m.version for m in sorted(manifests, key=lambda m: (m.created, m.version))]


def current_version(home: str | Path) -> str:
    """The version that `registry/<name>/current.json` points at."""
    pointer = Path(home) / CURRENT
    if not pointer.is_file():
        raise PublishError(
            f"no published model at {str(home)!r}: there is no {CURRENT}. {_versions_sentence(Path(home))} "
            "Publish one with `rayrm publish CHECKPOINT --registry DIR --name NAME`, or pass a version."
        )
    return _checked(Current, pointer).version


def set_current(registry: str | Path, name: str, version: str) -> None:
    """Point `current.json` of `name` at a published version; readers see the old one or the new one."""
    home = Path(registry) / name
    if not (home / version / MANIFEST).is_file():
        raise PublishError(f"version {version!r} of {name!r} is not published. {_versions_sentence(home)}")
    descriptor, temporary = tempfile.mkstemp(dir=home, prefix=f".{CURRENT}-")
    os.close(descriptor)
    os.chmod(temporary, 0o644)
    _write_synced(Path(temporary), json.dumps({"version": version, "set_at": _now()}) + "\n")
    os.replace(temporary, home / CURRENT)
    _sync_directory(home)


def content_version(directory: str | Path) -> str:
    """The version that `directory` (a saved model) has or would have once published."""
    return _version_of(saved_files(directory))[0]


def _version_of(saved: SavedFiles) -> tuple[str, dict[str, str]]:
    """The version, and the SHA-256 of each content file by name."""
    digests = {name: file_sha256(saved.directory / name) for name in saved.content}
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name} {digests[name]}\n".encode())
    # The text form decides what text the weights see, so it is content; the rest of rayrm.json is a record.
    whole.update(f"text_form {saved.text_form}\n".encode())
    return whole.hexdigest()[:12], digests


def _publish_files(
    saved: SavedFiles, source: Path, home: Path, name: str, given: PublicationTexts
) -> PublishedModel:
    """Write the version's directory beside, then rename it; `source` is where the training's records are."""
    version, digests = _version_of(saved)
    target = home / version
    if (target / MANIFEST).is_file():
        check_same_texts(_checked(Manifest, target / MANIFEST).model_dump(), given)
        logger.info("%s %s is already published at %s: nothing was written", name, version, target)
        return PublishedModel(name, version, target, is_new=False)
    home.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=home, prefix=f".{version}-"))
    try:
        manifest = _fill(partial, saved, source, digests, name, version)
        manifest |= publication_record(partial, given, is_adapter=saved.is_adapter)
        _close(partial, manifest)
        try:
            os.rename(partial, target)
        except OSError:
            # Another publisher of the same content was first: its directory is as good as ours.
            if not (target / MANIFEST).is_file():
                raise
            check_same_texts(_checked(Manifest, target / MANIFEST).model_dump(), given)
            return PublishedModel(name, version, target, is_new=False)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync_directory(home)
    logger.info("published %s %s at %s", name, version, target)
    return PublishedModel(name, version, target, is_new=True)


def _fill(
    partial: Path, saved: SavedFiles, source: Path, digests: Mapping[str, str], name: str, version: str
) -> dict[str, Any]:
    """Write all files but the manifest, which is returned."""
    for file in saved.content:
        if _copy_synced(saved.directory / file, partial / file) != digests[file]:
            raise PublishError(
                f"{str(saved.directory / file)!r} changed while it was being published. "
                "Publish again when nothing writes to the checkpoint."
            )
    facts = {**saved.facts, "text_form": saved.text_form}
    _write_synced(partial / "rayrm.json", json.dumps(facts, indent=2) + "\n")
    run_text, evaluation = training_records(source)
    if run_text is not None:
        _write_synced(partial / "run.toml", run_text)
    manifest: dict[str, Any] = {
        "name": name,
        "version": version,
        "created": _now(),
        "source": str(source.resolve()),
        "text_form": saved.text_form,
        "is_adapter": saved.is_adapter,
        "evaluation": evaluation,
    }
    _write_synced(partial / CARD, published_card(manifest, source, has_run=run_text is not None))
    for picture in sorted(source.glob("card-*.svg")):
        _copy_synced(picture, partial / picture.name)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest["files"] = {
        path.relative_to(partial).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in files
    }
    return manifest


def _close(partial: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest; nothing changes from here on."""
    _write_synced(partial / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    for file in [*manifest["files"], MANIFEST]:
        (partial / file).chmod(0o444)
    partial.chmod(0o755)
    _sync_directory(partial)


def _merge_adapter(saved: SavedFiles, into: Path) -> None:
    """Write the base model with the adapter folded in, and the trained head, as a plain saved model.

    Merged in float32, the dtype the adapter was trained in, so that the scores stay what they were.
    """
    from rayrm.model.reward_model import load_saved
    from rayrm.model.saving import save_model

    try:
        loaded = load_saved(saved.directory, device="cpu")
    except (OSError, ValueError) as error:
        raise PublishError(
            f"adapter {str(saved.directory)!r} cannot be merged into its base: {error}. Make the base's "
            "directory readable at the path in adapter_config.json, or publish with `merge_lora=False`."
        ) from error
    save_model(loaded.model, loaded.tokenizer, into, text_form=loaded.text_form, objective=loaded.objective)


def _checked(kind: type[_Read], path: Path) -> _Read:
    """The file as `publish` writes it; PublishError naming the file and the key that is not so."""
    try:
        return kind.model_validate(read_json(path), strict=True)
    except ValidationError as problems:
        said = (
            f"{str(path)!r} is not as `rayrm publish` wrote it: {' '.join(readable(problems, kind).split())}"
        )
        raise PublishError(f"{said} Publish the checkpoint again.") from problems


def _verify(directory: Path, manifest: Manifest) -> None:
    for file, expected in manifest.files.items():
        path = directory / file
        if not path.is_file():
            raise PublishError(f"{str(path)!r} is missing: the published model is damaged. Publish it again.")
        if path.stat().st_size != expected.bytes or file_sha256(path) != expected.sha256:
            raise PublishError(
                f"{str(path)!r} differs from its checksum in {MANIFEST}: the file is corrupt. "
                f"Remove {str(directory)!r} and publish the checkpoint again ({manifest.source!r})."
            )


def check_published_name(name: str) -> None:
    """Raise PublishError for a name that no published model can have."""
    if not _NAME.fullmatch(name):
        raise PublishError(
            f"name ({name!r}) must be letters, digits, '.', '_' or '-', beginning with a letter or digit. "
            "Pass for example 'reward'."
        )


def _versions_sentence(home: Path) -> str:
    known = list_versions(home.parent, home.name)
    return f"Published versions there: {', '.join(known)}." if known else "No version is published there."


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def _copy_synced(source: Path, target: Path) -> str:
    """Copy, sync to disk, and return the SHA-256 of what was written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader:
        return str(write_hashed(target, iter(lambda: reader.read(_COPY_BYTES), b""))["sha256"])


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as writer:
        writer.write(text)
        writer.flush()
        os.fsync(writer.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
