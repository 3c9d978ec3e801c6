"""What a run is told of its data: where pairs come from, and in which order they are trained on."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag

from rayrm.settings import Count, OptionalCount, OptionalTable, none_word, settings


@settings
class SourceConfig:
    """One source of a mixture: a table in the list `data.train`, where a plain string needs no table."""

    path: str | list[str]
    """A file, directory, glob, URL or hub name, or several that count as one source."""
    name: str | None = None
    """What reports call it. None: its path."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often an epoch shows each of its pairs: 2 is twice, 0.5 half of them (another half each epoch)."""
    max_pairs: OptionalCount = None
    """Read only its first rows, this many."""
    columns: OptionalTable = None
    """Its column names, where they are not ours: `{prompt = "question", chosen = "good"}`."""


def _kind(value: Any) -> str:
    """Which of its kinds a source is meant to be: the others' errors would be told too."""
    return "[list]" if isinstance(value, list) else _kind_of_one(value)


def _kind_of_one(value: Any) -> str:
    return "[table]" if isinstance(value, dict | SourceConfig) else "[path]"


def _kind_of_eval(value: Any) -> str:
    named = isinstance(value, dict) and not value.keys() & {"path", "weight", "max_pairs", "columns"}
    return "[names]" if named else _kind(value)


_Path: TypeAlias = Annotated[str, Tag("[path]")]
_Table: TypeAlias = Annotated[SourceConfig, Tag("[table]")]
Source: TypeAlias = Annotated[_Path | _Table, Discriminator(_kind_of_one)]
_List: TypeAlias = Annotated[list[Source], Tag("[list]")]
Sources: TypeAlias = Annotated[_Path | _Table | _List, Discriminator(_kind)]
_Named: TypeAlias = Annotated[dict[str, Sources], Tag("[names]")]
_EvalSources: TypeAlias = Annotated[_Path | _Table | _List | _Named, Discriminator(_kind_of_eval)]


@settings
class DataConfig:
    """Where pairs come from, and in which order. A source is a file, directory, glob, URL or hub name."""

    train: Annotated[Sources | None, BeforeValidator(none_word)] = None
    """The training source, or several: strings, or tables with `path`, `name`, `weight`, `max_pairs`,
    `columns`."""
    eval: Annotated[_EvalSources | None, BeforeValidator(none_word)] = None
    """The evaluation source or sources; a table of names gives each its own `eval_<name>_` metrics."""
    _: KW_ONLY
    max_pairs: OptionalCount = None
    """Read only the first rows of the training source, this many (each one's own: `max_pairs` in its
    table)."""
    max_eval_pairs: OptionalCount = None
    """Read only the first rows of each evaluation source, this many. With `eval_fraction`: of the training
    source's first rows, this many, the held-out ones are the evaluation set (a stream needs it)."""
    columns: OptionalTable = None
    """Column names of all sources, where they are not ours: `{prompt = "question", chosen = "good"}`."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Hold out this share of the training source's prompts as the evaluation set, by a hash of the prompt:
    all pairs of a prompt are on one side, in every run alike."""
    exclude_prompts_of: Annotated[str | list[str] | None, BeforeValidator(none_word)] = None
    """Leave out training pairs whose prompt, up to case, space and punctuation, is in this source."""
    mode: Literal["auto", "indexed", "streaming"] = "auto"
    """"indexed": tokenize all pairs first, then train in a global order. "streaming": train while later
    shards are read (needs `max_steps`). "auto": indexed, unless the source is unbounded or too large."""
    token_cache: Annotated[str | None, BeforeValidator(none_word)] = None
    """A directory that keeps tokenized shards for later runs, on storage that every node sees. None: none."""
    shuffle_window: Count = 4096
    """Streaming: pairs are shuffled among this many that follow one another, and shards among all."""

    def __post_init__(self) -> None:
        tables = self.eval.values() if isinstance(self.eval, dict) else [self.eval]
        for name, sources in [("train", self.train), *(("eval", source) for source in tables)]:
            for source in sources if isinstance(sources, list) else [sources]:
                path = source.path if isinstance(source, SourceConfig) else source
                if sources == [] or (path is not None and (not path or not all(path))):
                    raise ValueError(
                        f"`{name}` ({path!r}): names no source. Type a path, a glob or a hub name."
                    )
            if sources == []:
                raise ValueError(f"`{name}` ([]): names no source. Type a path, a glob or a hub name.")
        if self.eval == {}:
            raise ValueError("`eval` ({}): names no source. Delete it, or give it a name and a source.")
        if self.eval_fraction and self.eval is not None:
            raise ValueError(
                f"`eval_fraction` ({self.eval_fraction:g}) and `eval` ({self.eval!r}): the evaluation set is "
                "one of the two. Delete one."
            )

    @property
    def max_split_pairs(self) -> int | None:
        """How many first rows of the training source `eval_fraction` makes an evaluation set of."""
        given = [limit for limit in (self.max_pairs, self.max_eval_pairs) if limit is not None]
        return min(given, default=None)
