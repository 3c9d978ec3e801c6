"""The sets of a run as its trainer is given them: read, tokenized, and all of one text form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.config import DataConfig, RewardConfig
from rayrm.data.ingest import ingest
from rayrm.data.labels import LabelRules
from rayrm.data.selection import EVERY_ROW, Selection
from rayrm.data.streaming import StreamSource, open_stream
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import DataError
from rayrm.model.saving import TextForm
from rayrm.objective import Objective
from rayrm.train.attributes import check_rated
from rayrm.train.script_words import Rows

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
        names = self._labels.attributes
        if mode == "indexed":
            whole = self.ingest(source, "train", self.settings.max_pairs, selection)
            check_rated(whole.index, names, whole.report.name)
            return whole
        assert self.args.max_length is not None
        stream = open_stream(
            source,
            self.tokenizer,
            max_length=self.args.max_length,
            max_rows=self.settings.max_pairs,
            columns=self.settings.columns,
            shuffle=self.args.shuffle is not False,
            selection=selection,
            token_cache=self.settings.token_cache,
            labels=self._labels,
        )
        check_rated(stream.sample.index, names, stream.report.name, is_sample=True)
        return stream

    @property
    def _labels(self) -> LabelRules:
        return LabelRules.of(Objective.of(self.args))

    def evaluation(self, source: Any) -> dict[str, TokenizedSet]:
        """The evaluation sets by name; one without a name is called ""."""
        if source is None:
            return {}
        most = self.settings.max_eval_pairs
        if isinstance(source, dict):
            return {name: self.ingest(one, name, most) for name, one in source.items()}
        return {"": self.ingest(source, "eval", most)}

    def held_out(self, train_source: Any, selection: Selection) -> dict[str, TokenizedSet]:
        """The evaluation set that `eval_fraction` takes from the training rows."""
        return {"": self.ingest(train_source, "eval", self.settings.max_split_pairs, selection)}

    def ingest(
        self, source: Any, name: str, max_rows: int | None, selection: Selection = EVERY_ROW
    ) -> TokenizedSet:
        """A source, read whole; a set that was read already is itself."""
        source = source.of if isinstance(source, Rows) else source
        if isinstance(source, TokenizedSet):
            _check_usable(source, self._labels)
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
            labels=self._labels,
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


def _check_usable(rows: TokenizedSet, labels: LabelRules) -> None:
    """Raise DataError for a set, read under other settings, with rows that this run can't learn from."""
    index, named = rows.index, rows.report.attributes
    # Rows that were made in memory name none.
    fits = named == labels.attributes if named else index.attributes.shape[1] == len(labels.attributes)
    if index.attributes.shape[1] and not fits:
        raise DataError(
            f"`{rows.report.name}` was read for {index.attributes.shape[1]} `attributes` "
            f"({', '.join(named)}), and this run has {', '.join(labels.attributes) or 'none'}. Set the same, "
            "or read the set anew."
        )
    rated = np.flatnonzero(~np.isnan(index.ratings))
    has_term = np.bincount(index.comparisons(ties=labels.ties).row, minlength=index.num_rows) > 0
    if labels.pointwise != "none":
        has_term[index.row_of[rated]] = True
    if labels.attributes:
        has_term[index.row_of[~np.isnan(index.attributes).all(axis=1)]] = True
    if not has_term.all():
        raise DataError(
            f"`{rows.report.name}` has {int((~has_term).sum())} rows without better and worse: set "
            "`tie_model` to learn from ties and `pointwise_loss` from scores, or read the set without them."
        )
    soft = index.is_ranking & (index.targets != 1)
    if labels.listwise and soft.any():
        raise DataError(
            f"`{rows.report.name}` has {int(soft.sum())} rankings with a `target`, which is of a comparison, "
            "and `ranking_loss` (plackett-luce) takes a ranking as a whole. Set `ranking_loss=pairwise`, or "
            "read the set without them."
        )
    if labels.pointwise == "bce" and ((index.ratings[rated] < 0) | (index.ratings[rated] > 1)).any():
        raise DataError(
            f"`{rows.report.name}` has scores outside 0 to 1, which `pointwise_loss` (bce) takes. Set "
            "`pointwise_loss=mse`, or scale them."
        )


def check_form(pairs: TokenizedSet, text_form: TextForm) -> None:
    """Raise DataError for rows of another form than the model's."""
    form = pairs.report.text_form
    if form not in ("tokenized", text_form):
        raise DataError(
            f"the rows of `{pairs.report.name}` are {form}, but the model is {text_form}: its scores of them "
            "would mean nothing. Write them in the form of the training data."
        )
