"""How a model is served: the `[serve]` section."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from rayrm.settings import (
    Count,
    NonNegativeFloat,
    OptionalCount,
    OptionalTable,
    frozen_settings,
    json_value,
    none_word,
    settings,
)


def _not_none_at_all(value: int) -> int:
    if value == 0:
        raise ValueError("every request would be refused. Type 1 or more, or -1 for no limit")
    return value


@frozen_settings
class Ensemble:
    """Which models are asked and what becomes of their scores. ConfigError for what cannot be meant."""

    members: Annotated[list[str], Field(min_length=2)]
    """Names of models that the same service holds, at least two."""
    reduce: Literal["mean", "min", "mean-std"] = "mean"
    """`mean`; `min`, the most pessimistic member; `mean-std`, the mean less `k` standard deviations."""
    k: NonNegativeFloat = 1.0
    """How many standard deviations `mean-std` takes off."""

    def __post_init__(self) -> None:
        if blank := [name for name in self.members if not name.strip()]:
            raise ValueError(f"`members` ({self.members}): {blank[0]!r} is no name. Type a served model's.")
        if twice := sorted({name for name in self.members if self.members.count(name) > 1}):
            raise ValueError(
                f"`members` ({self.members}): {twice[0]!r} stands there twice, and a model agrees with "
                "itself. Name each model once."
            )
        if self.k != 1.0 and self.reduce != "mean-std":
            raise ValueError(
                f'`k` ({self.k:g}) is for `reduce` "mean-std", and `reduce` is "{self.reduce}". Delete `k`, '
                'or type `reduce="mean-std"`.'
            )


@settings
class ServeConfig:
    """The reward service."""

    name: str = "reward"
    """The Serve application's name: what `RewardClient(name)` calls."""
    ensembles: Annotated[dict[str, Ensemble], BeforeValidator(json_value)] = field(default_factory=dict)
    """Names that answer for several models: `{both = {members = ["a", "b"], reduce = "min"}}`."""
    num_replicas: Count = 1
    """Copies of the models that answer."""
    autoscaling: OptionalTable = None
    """Serve's `autoscaling_config`, instead of `num_replicas`: `{min_replicas = 1, max_replicas = 4}`."""
    max_tokens_per_batch: OptionalCount = None
    """Tokens a replica computes in one forward pass, at most: it sets memory. None: 16384 on a GPU, 4096 on a
    CPU."""
    max_queued_requests: Annotated[int, Field(ge=-1), AfterValidator(_not_none_at_all)] = -1
    """Requests that may wait in a replica before new ones are told to come back later; -1: no limit."""
    idle_offload_s: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(none_word)] = None
    """Seconds without work after which a replica's weights move to CPU memory, until the next request. None:
    they stay."""

    # Where replicas run.
    num_cpus: NonNegativeFloat = 1.0
    """CPUs Ray reserves for each replica."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs Ray reserves for each replica; a fraction shares one."""
    ray_actor_options: OptionalTable = None
    """More of Ray's options for each replica: `{resources = {scorer = 1}}`."""
    placement_group_bundles: Annotated[
        list[dict[str, NonNegativeFloat]] | None, BeforeValidator(json_value)
    ] = None
    """Bundles that Ray reserves for each replica, which stands in the first: `[{CPU = 1, GPU = 0.2}]`."""
    placement_group_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How a replica's bundles lie on the nodes."""

    # For callers outside Ray.
    http_port: Annotated[Annotated[int, Field(ge=1, le=65535)] | None, BeforeValidator(none_word)] = None
    """Answer HTTP on this port. None: callers inside the Ray cluster alone."""
    http_host: str = "127.0.0.1"
    """The address HTTP binds to; beyond loopback a token is required."""
    http_token_env: str = "RAYRM_HTTP_TOKEN"
    """The environment variable with the bearer token that callers must send. Unset: no token is asked for."""
    http_max_body_bytes: Count = 32 * 2**20
    """A larger body is refused (413)."""
    http_max_texts: Count = 4096
    """A request with more texts is refused."""
    http_max_characters: Count = 1_000_000
    """A longer text is refused."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("`name` (''): the service needs a name. Type one, such as `reward`.")
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError(
                f"`num_replicas` ({self.num_replicas}) with `autoscaling`, which chooses their number: "
                "delete `num_replicas`, or `autoscaling`."
            )
