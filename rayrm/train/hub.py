"""A run's model on the Hugging Face hub: its repository, pushes beside the training, and at its end.

What transformers' trainer does under the same names (transformers 5.23, `Trainer.push_to_hub` and
`_push_from_checkpoint`), but of `output_dir` the model's own files alone go there: a run directory also holds
rows of the data. They are copied aside first, so that a push never reads what training writes.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, ModelCard

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError, RayrmError
from rayrm.model.card import CARD, move_card, shown
from rayrm.model.saving import copy_saved
from rayrm.train.checkpoint import PUSH_ASIDE
from rayrm.urls import MASK, masked

logger = logging.getLogger("rayrm.train")
_PATIENCE_S = 60.0
# The hub's storage of large files fails by RuntimeErrors. Ours are of these too, and pass as they are.
_FAILURES = (httpx.HTTPError, OSError, ValueError, RuntimeError)
_SHARD = r"model-[^/]*\.safetensors"
_CARD_FIELDS = {
    "dataset_name": "datasets",
    "language": "language",
    "license": "license",
    "tags": "tags",
    "model_name": "model_name",
}
"""What a caller may say for the card -> its field there."""


class HubRepository:
    """The repository of a run, `hub_model_id` or the name of `output_dir`; created by the first push."""

    def __init__(self, config: RewardConfig, output_dir: Path, hub: HfApi | None = None) -> None:
        self.name: str | None = None
        self._config = config
        self._output_dir = output_dir
        self._hub = hub or HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=config.hub_token)
        self._running: threading.Thread | None = None

    def create(self, *, token: str | None = None, private: bool | None = None) -> str:
        """Create it where it is not there; its full name. Raises ConfigError where the hub refuses."""
        wanted, revision = self._config.hub_model_id or self._output_dir.name, self._config.hub_revision
        private = self._config.hub_private_repo if private is None else private
        try:
            made = self._hub.create_repo(wanted, token=token, private=private, exist_ok=True)
            name = str(made.repo_id)
            if revision not in (None, "main"):
                self._hub.create_branch(name, branch=revision, token=token, exist_ok=True)
        except _FAILURES as error:
            raise ConfigError(
                f"`hub_model_id` ({wanted!r}) cannot be pushed to: {self._said(error, token)} Log in (`hf "
                "auth login`) or set `HF_TOKEN`, to a token that may write there, or delete `push_to_hub`."
            ) from error
        self.name = name
        return name

    def push(
        self,
        directory: Path,
        message: str,
        *,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> Any:
        """Upload the model that is saved in `directory`: the hub's answer, or a future of it.

        Raises ConfigError for what the card has no field for, RayrmError where the hub did not take it.
        """
        said = _metadata(card or {})
        if self.name is None:
            self.create(token=token, private=private)
        upload = self._copied(directory, message, said, token=token, revision=revision)
        return upload() if blocking else self._hub.run_as_future(upload)

    def push_beside(self, checkpoint: Path) -> None:
        """Begin to upload a whole checkpoint's model, unless one is still on its way; failures are logged.

        Called by the thread that writes checkpoints: training waits for nothing.
        """
        if self._running is not None and self._running.is_alive():
            logger.info("%s is not pushed: the one before is still on its way", checkpoint.name)
            return

        def push() -> None:
            try:
                upload()
            except Exception as error:  # whatever a library raises: no push is worth a run
                self._warn(checkpoint, error)

        step = checkpoint.name.rpartition("-")[2]
        try:
            upload = self._copied(checkpoint, f"Training in progress, step {step}", {})
        except Exception as error:
            self._warn(checkpoint, error)
            return
        # A daemon: the process that is to end does not wait for one that hangs.
        self._running = threading.Thread(target=push, name=f"push-{checkpoint.name}", daemon=True)
        self._running.start()

    def _copied(
        self,
        directory: Path,
        message: str,
        said: Mapping[str, Any],
        *,
        token: str | None = None,
        revision: str | None = None,
    ) -> Callable[[], Any]:
        """Copies the model's files; what it returns uploads them, and removes the copy."""
        try:
            aside = self._copy(directory, said)
        except OSError as error:
            raise RayrmError(
                f"the model in `{directory}` was not pushed, since its files could not be copied aside: "
                f"{error}. It is saved there; free space, then push it again."
            ) from error
        files = sorted(file.relative_to(aside).as_posix() for file in aside.rglob("*") if file.is_file())

        def upload() -> Any:
            try:
                name = self.name or self.create(token=token)
                if (aside / CARD).exists():
                    move_card(aside, shown(directory), name)
                return self._hub.upload_folder(
                    repo_id=name,
                    folder_path=str(aside),
                    commit_message=message,
                    token=token,
                    revision=revision or self._config.hub_revision,
                )
            except RayrmError:
                raise
            except _FAILURES as error:
                typed = _upload_line(name, directory, files, revision or self._config.hub_revision)
                raise RayrmError(
                    f"the model in `{directory}` could not be pushed to {name}: {self._said(error, token)} "
                    f"It is saved there, beside files that are not the model's. Type `{typed}` when the hub "
                    "can be reached."
                ) from error
            finally:
                shutil.rmtree(aside, ignore_errors=True)

        return upload

    def _copy(self, directory: Path, said: Mapping[str, Any]) -> Path:
        """The directory of the copy; none stays where it cannot be made."""
        aside = Path(tempfile.mkdtemp(prefix=PUSH_ASIDE, dir=self._output_dir))
        try:
            copy_saved(directory, aside, directory)
            if said:
                _say_in_card(aside, said)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return aside

    def _said(self, error: BaseException, token: str | None) -> str:
        """An error's words in one line, without what is secret."""
        said = masked(" ".join(str(error).split()))
        for secret in filter(None, (token, self._config.hub_token)):
            said = said.replace(secret, MASK)
        return said.rstrip(".") + "."

    def _warn(self, checkpoint: Path, error: Exception) -> None:
        said = str(error)
        if not isinstance(error, RayrmError):
            said = f"{type(error).__name__}: {self._said(error, None)}"
        logger.warning("%s was not pushed, and the run goes on: %s", checkpoint.name, said)

    def close(self, patience_s: float = _PATIENCE_S) -> None:
        """Wait for the upload that is on its way, so long and no longer."""
        if self._running is not None:
            self._running.join(patience_s)
            if self._running.is_alive():
                logger.warning(
                    "the upload to %s has not ended in %.0f s and is left: the checkpoint is on the disk",
                    self.name,
                    patience_s,
                )
                return
        for aside in self._output_dir.glob(f"{PUSH_ASIDE}*"):  # of a push that did not come to its upload
            shutil.rmtree(aside, ignore_errors=True)


def repository_of(config: RewardConfig, output_dir: Path) -> HubRepository:
    """A run's repository; one that is pushed to is there, or the hub's refusal is raised before training."""
    repository = HubRepository(config, output_dir)
    if config.push_to_hub:
        repository.create()
    return repository


def _metadata(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller says for the card, by its fields' names. Raises ConfigError for anything else."""
    if unknown := sorted(set(card) - set(_CARD_FIELDS)):
        raise ConfigError(
            f"`{unknown[0]}` is nothing that `push_to_hub` writes into the card: it takes "
            f"{', '.join(sorted(_CARD_FIELDS))}. Edit README.md for more."
        )
    return {_CARD_FIELDS[key]: value for key, value in card.items() if value is not None}


def _say_in_card(aside: Path, said: Mapping[str, Any]) -> None:
    """Write `said` into the metadata of the copy's card; the run's own stays as it is."""
    card = ModelCard.load(aside / CARD)
    for key, value in said.items():
        values = [value] if isinstance(value, str) and key in ("datasets", "tags") else value
        if key == "tags":
            values = [*(card.data.tags or []), *(tag for tag in values if tag not in (card.data.tags or []))]
        setattr(card.data, key, values)
    (aside / CARD).write_text(str(card), encoding="utf-8")


def _upload_line(name: str, directory: Path, files: list[str], revision: str | None) -> str:
    """The command that uploads these files of `directory` and no others; shards by one pattern."""
    shards = [file for file in files if re.fullmatch(_SHARD, file)]
    wanted = [*(file for file in files if file not in shards), *(["model-*.safetensors"] if shards else [])]
    where = [] if revision is None else ["--revision", revision]
    words = ["hf", "upload", name, str(directory), *where]
    return shlex.join([*words, *(word for file in wanted for word in ("--include", file))])
