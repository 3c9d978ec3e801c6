"""What `jobs/refresh.py` is told: [refresh], [data], [reward] and [cluster] of its file. No torch, no ray.

Keys, overrides and errors are those of run files (`runfile.py`); an override without a section is one of
[refresh].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rayrm.config import ClusterConfig, LoraConfig, RewardConfig
from rayrm.data_settings import Sources
from rayrm.errors import ConfigError
from rayrm.runfile import dump_tables, read_tables
from rayrm.settings import Count, Fraction, OptionalCount, none_word, settings


@settings
class RefreshConfig:
    """Which service is refreshed, from which samples, by whose judgement, and when a round may take over."""

    samples: str | list[str]
    """Glob, or globs, of the `samples-<rank>.jsonl` that RL appends to: `step`, `prompt`, `completion`."""
    judge: str
    """The function that ranks: "path/to/file.py:function" or "package.module:function". It is called as
    `judge(prompt, completions)` with the different completions of one prompt, and returns a number for each,
    higher is better; it may be async."""
    output_dir: str
    """Where rounds are kept. The same command goes on where it was cut off."""
    _: KW_ONLY
    service: str = "reward"
    """The name of the running Serve application."""
    model: Annotated[str | None, BeforeValidator(none_word)] = None
    """Which of its models. None: its only one."""
    registry: str = "registry"
    """The directory of published models that the service's versions lie in."""
    name: Annotated[str | None, BeforeValidator(none_word)] = None
    """What the model is called there. None: as the service calls it."""
    min_pairs: Count = 64
    """A round begins when it has so many rows: prompts of which the judge prefers some completion."""
    max_rounds: OptionalCount = None
    """End after so many rounds in `output_dir`, refused ones included. None: go on until stopped."""
    poll_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two looks at the samples."""
    judge_concurrency: Count = 8
    """An async judge is asked about so many prompts at a time; another about one."""
    allowed_drop: Fraction = 0.01
    """A round is refused where its held-out accuracy is lower by more than this than the served version's."""
    min_probe_agreement: Fraction = 0.5
    """A round is refused where it orders fewer of the pairs of probe texts as the served version does: 1 is
    every one, 0.5 chance, 0 the order turned round."""
    gate: Annotated[str | None, BeforeValidator(none_word)] = None
    """A gate file, as `rayrm publish --gate` takes: a round that breaks one of its rules is refused."""
    calibrate: dict[str, str] = dataclasses.field(default_factory=dict)
    """Files of texts by the name of a calibration, in the place of those that the served version was
    published with. A new version is calibrated by its predecessor's texts, which must still lie there."""
    lora: Annotated[LoraConfig | None, BeforeValidator(none_word)] = None
    """Train adapters only, which publication merges. None: train every parameter."""

    def __post_init__(self) -> None:
        if not self.samples or not all(self.samples):
            raise ValueError(f"`samples` ({self.samples!r}): names no file. Type `runs/rl/samples*.jsonl`.")
        place, colon, function = self.judge.rpartition(":")
        if not colon or not place or not function.isidentifier():
            raise ValueError(
                f"`judge` ({self.judge!r}) must name a file or module and a function in it. Type "
                '`judge = "judge.py:judge"` or `judge = "package.module:function"`.'
            )
        if not self.output_dir.strip():
            raise ValueError("`output_dir` (''): names no directory. Type for example `runs/refresh`.")


@settings
class RefreshData:
    """What rounds are measured on, and what keeps them from forgetting."""

    eval: Sources
    """Held-out pairs: sources as those of `[data] eval` in a run file. RL's samples with one of their prompts
    are left out and counted."""
    _: KW_ONLY
    max_eval_pairs: OptionalCount = None
    """Read only the first rows of each held-out source, this many."""
    replay: Annotated[Sources | None, BeforeValidator(none_word)] = None
    """The preferences that the model was first trained on: some are drawn anew for each round."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Which share of a round's rows these are, as far as there are so many."""

    def __post_init__(self) -> None:
        for name, source in (("eval", self.eval), ("replay", self.replay)):
            if source in ("", []):
                raise ValueError(
                    f"`{name}` ({source!r}): names no source. Type a path, a glob or a hub name."
                )


@dataclasses.dataclass
class Refresh:
    """All that a refresh is told."""

    refresh: RefreshConfig
    """[refresh]"""
    data: RefreshData
    """[data]"""
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    """[reward]: how each round is trained; its directory is the round's."""
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    """[cluster]: the workers that train, beside those of RL and of the service."""


def dump_refresh(settings: Refresh) -> str:
    """The settings as TOML, which `read_refresh` reads back."""
    return dump_tables({name: getattr(settings, name) for name in SECTIONS})


SECTIONS: dict[str, type] = {
    "refresh": RefreshConfig,
    "data": RefreshData,
    "reward": RewardConfig,
    "cluster": ClusterConfig,
}
"""A refresh file's sections and what each becomes."""


def read_refresh(path: str | Path | None, overrides: Sequence[str] = ()) -> Refresh:
    """Read a refresh file and put `overrides` over it; a word without a section is one of [refresh].

    Raises:
        ConfigError: the file is missing or no TOML, or a section, key or value is wrong.
    """
    read: dict[str, Any] = read_tables(path, overrides, SECTIONS, bare="refresh")
    reward: RewardConfig = read["reward"]
    own = "each round has its own directory below `refresh.output_dir`, and goes on by itself"
    leaves_out = "a round leaves out every row that is refused, and counts it in its outcome"
    for key, why in {
        "output_dir": own,
        "resume_from_checkpoint": own,
        "max_bad_row_fraction": leaves_out,
        "attributes": "what a judge prefers has no ratings to learn them from",
    }.items():
        given = getattr(reward, key)
        if given != getattr(RewardConfig(), key):
            raise ConfigError(f"[reward] `{key}` ({given!r}): {why}. Delete it.")
    return Refresh(**read)
