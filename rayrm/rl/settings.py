"""The sections of an RL run file: `[policy]`, `[prompts]`, `[reward]`, `[shaping]`, `[guard]`, `[rl]`.

`[cluster]` and `[serve]` are those of a training run. `[rl]` has `algorithm` and the fields of TRL's config
of it; a bare key on the command line is one of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayrm.config import ClusterConfig, LoraConfig
from rayrm.rl.guard import GuardSettings
from rayrm.rl.shaping import Shaping
from rayrm.serve_settings import ServeConfig
from rayrm.settings import Count, ModelName, OptionalCount, json_value, none_word, settings

Algorithm = Literal["grpo", "rloo"]


@settings
class PolicyConfig:
    """The model that learns."""

    name: ModelName
    """A causal language model: a directory or a hub name."""
    lora: Annotated[LoraConfig | None, BeforeValidator(none_word)] = None
    """Train adapters only. None: train every parameter."""


@settings
class PromptsConfig:
    """What the policy answers."""

    train: str
    """Rows with a `prompt` (a string or messages): a file, directory, URL or hub name, as [data] takes."""
    heldout: Annotated[str | None, BeforeValidator(none_word)] = None
    """Prompts that are never trained on: answered before and after training, and compared."""
    max_train: OptionalCount = None
    """Only the first so many."""
    max_heldout: Count = 64
    """Only the first so many."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 2
    """Answers to each held-out prompt, before and after."""


@settings
class RewardSource:
    """Which service scores."""

    model: Annotated[str | dict[str, str] | None, BeforeValidator(json_value)] = None
    """A published model (a run's directory, `registry/NAME`), served for this run beside the policy; several
    as `{helpful = "registry/helpful", gold = "registry/large"}`."""
    service: Annotated[str | None, BeforeValidator(none_word)] = None
    """Or the name of a service that runs on the cluster."""
    use: Annotated[str | None, BeforeValidator(none_word)] = None
    """Which of its models or ensembles is the reward. None: its only one."""
    weights: Annotated[dict[str, float] | None, BeforeValidator(json_value)] = None
    """Instead of `use`: several of its models or ensembles, whose shaped rewards are added up:
    `{helpful = 1.0, safe = 0.5}`."""
    gold: Annotated[str | None, BeforeValidator(none_word)] = None
    """Another of its models or ensembles, which is watched and not trained on."""
    truncation: Annotated[Literal["left", "right"] | None, BeforeValidator(none_word)] = None
    """What to do with a text beyond the reward model's positions. None: it ends the run."""
    asynchronous: bool = True
    """Call it by asyncio: the reward and the gold reward at once."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a call may take in all; a replica that starts again takes some ten seconds."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.service is None):
            raise ValueError(
                "needs one of `model` (served for this run) and `service` (one that runs). Type "
                'model = "registry/NAME", or service = "reward".'
            )
        if self.weights == {}:
            raise ValueError("`weights` ({}) names no reward. Type {helpful = 1.0, ...}, or delete it.")
        if self.use is not None and self.weights is not None:
            raise ValueError(
                f"`use` ({self.use!r}) with `weights`, which names the rewards. Delete one of them."
            )
        if isinstance(self.model, dict) and len(self.model) > 1 and not (self.use or self.weights):
            raise ValueError(
                f"`use` is missing among the models {', '.join(self.model)}. Type which one is the "
                f'reward: use = "{next(iter(self.model))}", or an ensemble of [serve].'
            )
        only = next(iter(self.model)) if isinstance(self.model, dict) and len(self.model) == 1 else None
        if self.gold is not None and self.gold in (self.use or only, *(self.weights or ())):
            raise ValueError(
                f"`gold` ({self.gold!r}) is the reward itself. Name another model, or delete it."
            )


@dataclass
class RLRun:
    """All an RL run is told; `run.toml` in its directory holds it."""

    policy: PolicyConfig
    prompts: PromptsConfig
    reward: RewardSource
    algorithm: Algorithm
    trainer: dict[str, Any]
    """Fields of TRL's `GRPOConfig` or `RLOOConfig`."""
    shaping: Shaping = field(default_factory=Shaping)
    guard: GuardSettings = field(default_factory=GuardSettings)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    @property
    def output_dir(self) -> Path:
        return Path(self.trainer["output_dir"])
