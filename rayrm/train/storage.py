"""A run's copy in an object store (`storage_path`): what a start on empty disks goes on from.

    <storage_path>/<name of output_dir>/
        checkpoint-<step>/ ...        its `checkpoint.json` is written last: with it the copy is whole
        identity.json, run.toml, metrics.jsonl, quarantine.jsonl, trackers.json, rows-<rank>.jsonl
        the saved model, progress.json    at the run's end

Rank 0's checkpoint thread copies each checkpoint when it is whole, beside the steps; the next one waits for
it. The ranks of one run still write into one `output_dir`, which they share: a disk of the node, or of all
nodes. A copy that fails in mid-run is a warning, since the run itself is whole; at its end it is an error.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from rayrm.config import RewardConfig
from rayrm.data.remote import connect, s3_environment
from rayrm.errors import CheckpointError, ConfigError, DataError
from rayrm.model.attribute_head import HEADS_FILE
from rayrm.train.checkpoint import IDENTITY, MANIFEST, STATE, step_of

logger = logging.getLogger("rayrm.train")
_CHUNK = 16 * 2**20
# What a run that goes on reads of the directory it began in, beside its checkpoints.
_KEPT = (IDENTITY, "run.toml", "metrics.jsonl", "quarantine.jsonl", "trackers.json")
_ROWS = "rows-*.jsonl"
# By these a run is known to be finished and a model to be there, so they come last.
_LAST = ("config.json", "adapter_config.json", "progress.json")
FAILURES = (OSError, pa.ArrowException, DataError, json.JSONDecodeError)
"""What goes wrong with a store; `RunStorage` raises these."""
_CREDENTIALS = {
    "s3": (
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of another service than AWS also AWS_ENDPOINT_URL",
        (),
    ),
    "gs": (
        "GOOGLE_APPLICATION_CREDENTIALS (a service account's file)",
        ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"),
    ),
    "abfs": (
        "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
        ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"),
    ),
    "hdfs": ("JAVA_HOME, HADOOP_HOME and CLASSPATH", ()),
}
"""By kind of store where its credentials stand in the environment, and which of it workers are told."""


def storage_of(config: RewardConfig, output_dir: Path, environment: Mapping[str, str]) -> RunStorage | None:
    """The store of a run, if it has one; `environment`: as `storage_environment` gave it where it began."""
    return RunStorage(config.storage_path, output_dir, environment) if config.storage_path else None


def storage_environment(config: RewardConfig) -> dict[str, str]:
    """What this process's environment says of the store, for the worker that writes to it."""
    if not config.storage_path:
        return {}
    _, names = _CREDENTIALS.get(_kind_of(config.storage_path), ("", ()))
    return {**dict(s3_environment()), **{name: os.environ[name] for name in names if name in os.environ}}


def _kind_of(url: str) -> str:
    """`s3a` -> `s3`, `gcs` -> `gs`, `abfss` -> `abfs`."""
    scheme = url.partition("://")[0].lower()
    return {"gcs": "gs", "viewfs": "hdfs"}.get(scheme) or next(
        (kind for kind in _CREDENTIALS if scheme.startswith(kind)), scheme
    )


def below(url: str, name: str) -> str:
    """A directory of a store's directory; what the URL says after `?` stays at its end."""
    place, mark, options = url.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def check_storage(config: RewardConfig, output_dir: Path) -> None:
    """Raise ConfigError where the store takes no object."""
    try:
        store = storage_of(config, output_dir, storage_environment(config))
        if store is None:
            return
        store.write(".probe", b"rayrm")
        store.remove(".probe")
    except (*FAILURES, ImportError) as error:
        credentials, _ = _CREDENTIALS.get(_kind_of(str(config.storage_path)), ("", ()))
        fix = f", or set in the environment {credentials}" if credentials else ""
        raise ConfigError(
            f"`storage_path` ({config.storage_path}) takes no object: {error}. Correct the URL{fix}."
        ) from error


class RunStorage:
    """The objects of one run."""

    def __init__(self, url: str, output_dir: Path, environment: Mapping[str, str]) -> None:
        """Of a URL that `RewardConfig` has let pass. Raises one of `FAILURES` where nothing is reached."""
        self._output_dir = output_dir
        self.url = below(url, output_dir.name)
        self._fs: Any
        self._fs, path = connect(url, tuple(environment.items()))
        self._base = f"{path.rstrip('/')}/{output_dir.name}"

    def checkpoints(self) -> list[str]:
        """The names of the whole checkpoints in the store, oldest first."""
        selector = fs.FileSelector(self._base, allow_not_found=True)
        named = [
            info.base_name for info in self._fs.get_file_info(selector) if info.type == fs.FileType.Directory
        ]
        found = [name for name in named if name.startswith("checkpoint-") and self.has(f"{name}/{MANIFEST}")]
        return sorted(found, key=lambda name: step_of(Path(name)))

    def is_ahead_of(self, checkpoint: Path) -> bool:
        """Whether its newest whole checkpoint is of a later step than this one."""
        return any(step_of(Path(name)) > step_of(checkpoint) for name in self.checkpoints())

    def is_used(self) -> bool:
        """Whether anything is there, but for a probe."""
        found = self._fs.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
        return any(info.base_name[0] != "." for info in found)

    def has(self, name: str) -> bool:
        return bool(self._fs.get_file_info(f"{self._base}/{name}").type == fs.FileType.File)

    def read(self, name: str) -> bytes:
        with self._fs.open_input_stream(f"{self._base}/{name}", compression=None) as source:
            return bytes(source.read())

    def write(self, name: str, content: bytes) -> None:
        with self._writing(name) as out:
            out.write(content)

    def remove(self, name: str) -> None:
        self._fs.delete_file(f"{self._base}/{name}")

    def keep(self, checkpoint: Path, limit: int | None) -> None:
        """Copy a whole checkpoint, and drop old ones beyond `limit`; a failure is a warning."""
        try:
            self._put_all(file for name in _KEPT if (file := self._output_dir / name).is_file())
            self._put_all(self._output_dir.glob(_ROWS))
            listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
            if self.has(f"{checkpoint.name}/{MANIFEST}"):  # of an attempt before: no mixture may look whole
                self._drop(checkpoint.name)
            self._put_all([*(checkpoint / name for name in listed), checkpoint / MANIFEST])
            best = json.loads((checkpoint / STATE).read_text()).get("best_checkpoint")
            self._prune(limit, best)
        except FAILURES as error:
            logger.warning(
                "%s could not be copied to %s (%s): the run goes on, with its checkpoints in %s alone",
                checkpoint.name,
                self.url,
                error,
                self._output_dir,
            )
        else:
            logger.info("copied %s to %s", checkpoint.name, self.url)

    def keep_result(self) -> None:
        """Copy the saved model and the records of a finished run, last what says that they are there."""
        files = [file for file in self._output_dir.iterdir() if file.is_file() and file.name[0] != "."]
        try:
            self._put_all(self._output_dir.glob("tensorboard/**/events.*"))
            for parts in (HEADS_FILE, "additional_chat_templates/*", "evaluation/*"):  # of directories
                self._put_all(self._output_dir.glob(parts))
            self._put_all(
                sorted(files, key=lambda file: _LAST.index(file.name) if file.name in _LAST else -1)
            )
        except FAILURES as error:
            raise CheckpointError(
                f"the run is finished and its model is in {self._output_dir}, but it could not be copied to "
                f"{self.url}: {error}. Copy the directory there by hand."
            ) from error
        logger.info("copied the model to %s", self.url)

    def fetch(self) -> None:
        """Bring the newest whole checkpoint, the best one and the records into the run's directory.

        The identity comes first and the newest checkpoint last: cut off anywhere, this leaves the run, and
        no checkpoint that is not whole, and the next start fetches again.
        """
        found = self.checkpoints()
        wanted = found[-1:]
        if found:
            best = json.loads(self.read(f"{found[-1]}/{STATE}")).get("best_checkpoint")
            wanted += [best] if best in found[:-1] else []
        self._output_dir.mkdir(parents=True, exist_ok=True)
        there = fs.FileSelector(self._base, allow_not_found=True)
        names = [info.base_name for info in self._fs.get_file_info(there)]
        rows = [name for name in names if name.startswith("rows-") and name.endswith(".jsonl")]
        for name in (*(one for one in _KEPT if one in names), *rows):
            self._get(name, self._output_dir / name)
        for name in reversed(wanted):
            self._fetch_checkpoint(name)
        logger.info("fetched %s from %s", ", ".join(wanted) or "a run without checkpoints", self.url)

    def _fetch_checkpoint(self, name: str) -> None:
        made = self._output_dir / name
        if (made / MANIFEST).is_file():
            return
        shutil.rmtree(made, ignore_errors=True)  # a deletion that was cut off
        partial = self._output_dir / f".{name}.fetched.partial"
        shutil.rmtree(partial, ignore_errors=True)  # a fetch that was
        for file in [*json.loads(self.read(f"{name}/{MANIFEST}"))["files"], MANIFEST]:
            self._get(f"{name}/{file}", partial / file)
        partial.rename(made)

    def _get(self, name: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        place = f"{self._base}/{name}"
        with self._fs.open_input_stream(place, compression=None) as source, aside.open("wb") as out:
            shutil.copyfileobj(source, out, _CHUNK)
        aside.replace(file)

    def _put_all(self, files: Iterable[Path]) -> None:
        for file in files:
            with file.open("rb") as source, self._writing(str(file.relative_to(self._output_dir))) as out:
                shutil.copyfileobj(source, out, _CHUNK)

    def _writing(self, name: str) -> Any:
        place = f"{self._base}/{name}"
        if self._fs.type_name not in ("s3", "gcs"):  # these have no directories to be made
            self._fs.create_dir(place.rpartition("/")[0], recursive=True)
        return self._fs.open_output_stream(place, compression=None)

    def _prune(self, limit: int | None, keep: str | None) -> None:
        found = self.checkpoints()
        if limit is None:
            return
        spare = [name for name in found[:-1] if name != keep]
        for name in spare[: max(0, len(found) - limit)]:
            self._drop(name)

    def _drop(self, checkpoint: str) -> None:
        self.remove(f"{checkpoint}/{MANIFEST}")  # first what makes it a checkpoint
        self._fs.delete_dir(f"{self._base}/{checkpoint}")
