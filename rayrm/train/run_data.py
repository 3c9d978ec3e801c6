"""The sets of a run as its trainer is given them: read, tokenized, and all of one text form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrm.config import DataConfig, RewardConfig
from rayrm.data.ingest import ingest
from rayrm.data.selection import EVERY_ROW, Selection
from rayrm.data.streaming import StreamSource, open_stream
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import DataError
from rayrm.model.reward_model import TextForm

logger = logging.getLogger("rayrm.train")


@dataclass(slots=True)
class RunData:
    """How one run reads its sets. `quarantine`: the file of the rows that are refused."""

    tokenizer: Any
    args: RewardConfig
    settings: DataConfig
    quarantine: Path

    def training(self, source: Any, selection: Selection, mode: str) -> TokenizedSet | StreamSource:
        """What the run trains on: a whole set (`mode` "indexed"), or a stream that is read as it trains."""
        if mode == "indexed":
            return self.ingest(source, "train", self.settings.max_pairs, selection)
        assert self.args.max_length is not None
        return open_stream(
            source,
            self.tokenizer,
            max_length=self.args.max_length,
            max_rows=self.settings.max_pairs,
            columns=self.settings.columns,
            shuffle=self.args.shuffle is not False,
            selection=selection,
            token_cache=self.settings.token_cache,
        )

    def evaluation(self, source: Any) -> dict[str, TokenizedSet]:
        """The evaluation sets by name; one without a name is called ""."""
        if source is None:
            return {}
        most = self.settings.max_eval_pairs
        if isinstance(source, dict):
            return {name: self.ingest(one, name, most) for name, one in source.items()}
        return {"": self.ingest(source, "eval", most)}

    def ingest(
        self, source: Any, name: str, max_rows: int | None, selection: Selection = EVERY_ROW
    ) -> TokenizedSet:
        """A source, read whole; a set that was read already is itself."""
        if isinstance(source, TokenizedSet):
            return source
        return ingest(
            source,
            self.tokenizer,
            max_length=self.args.max_length,
            max_rows=max_rows,
            quarantine_path=self.quarantine,
            max_bad_row_fraction=self.args.max_bad_row_fraction,
            max_tasks=self.args.dataset_num_proc,
            token_cache=self.settings.token_cache,
            name=name,
            selection=selection,
            columns=self.settings.columns,
        )

    def text_form(
        self, train_set: TokenizedSet | StreamSource, eval_sets: Mapping[str, TokenizedSet]
    ) -> TextForm:
        """The one form of all sets. Raises DataError where they differ."""
        forms = {"train": train_set.report.text_form}
        forms |= {name or "eval": pairs.report.text_form for name, pairs in eval_sets.items()}
        named = {name: form for name, form in forms.items() if form != "tokenized"}
        if len(set(named.values())) > 1:
            listed = ", ".join(f"{name} is {form}" for name, form in named.items())
            raise DataError(
                f"the data sets have different text forms ({listed}). A model is trained and evaluated on "
                "one: write both as message lists, or both as strings."
            )
        if named:
            return next(iter(named.values()))
        form: TextForm = "conversational" if self.tokenizer.chat_template else "standard"
        logger.info("the data is tokenized already: the model is saved as %s, by its tokenizer", form)
        return form


def check_form(pairs: TokenizedSet, text_form: TextForm) -> None:
    """Raise DataError for rows of another form than the model's."""
    form = pairs.report.text_form
    if form not in ("tokenized", text_form):
        raise DataError(
            f"the rows of `{pairs.report.name}` are {form}, but the model is {text_form}: its scores of them "
            "would mean nothing. Write them in the form of the training data."
        )
