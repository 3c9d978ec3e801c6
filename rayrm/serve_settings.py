"""How a model is served: the `[serve]` section."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rayrm.settings import (
    Count,
    NonNegativeFloat,
    OptionalCount,
    OptionalNonNegativeFloat,
    OptionalTable,
    none_word,
    settings,
)


@settings
class Ensemble:
    """Several models of a service that answer as one."""

    members: list[str]
    """Names of the service's models, two or more."""
    reduce: Literal["mean", "min", "mean-std"] = "mean"
    """What becomes of their scores: the mean, the least, or the mean less `k` standard deviations
    (arXiv:2312.09244)."""
    k: NonNegativeFloat = 1.0
    """Of "mean-std"."""

    def __post_init__(self) -> None:
        if len(self.members) < 2 or len(set(self.members)) < len(self.members):
            raise ValueError(
                f"`members` ({', '.join(self.members)}): an ensemble has two members or more, each once. "
                "Name others, or call the model by its own name."
            )


@settings
class ServeConfig:
    """The reward service."""

    name: str = "reward"
    """The Serve application's name: what `RewardClient(name)` calls."""
    ensembles: dict[str, Ensemble] = field(default_factory=dict)
    """Names that answer for several models: `{both = {members = ["a", "b"], reduce = "min"}}`."""
    num_replicas: Count = 1
    """Copies of the models that answer."""
    autoscaling: OptionalTable = None
    """Serve's `autoscaling_config`, instead of `num_replicas`: `{min_replicas = 1, max_replicas = 4}`."""
    max_tokens_per_batch: OptionalCount = None
    """Tokens a replica computes in one forward pass, at most: it sets memory. None: 16384 on a GPU, 4096 on a
    CPU."""
    max_queued_requests: Annotated[int, Field(ge=-1)] = -1
    """Requests that may wait in a replica before new ones are told to come back later; -1: no limit."""
    idle_offload_s: OptionalNonNegativeFloat = None
    """Seconds without work after which a replica's weights move to CPU memory, until the next request. None:
    they stay."""

    # Where replicas run.
    num_cpus: NonNegativeFloat = 1.0
    """CPUs Ray reserves for each replica."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs Ray reserves for each replica; a fraction shares one."""
    ray_actor_options: OptionalTable = None
    """More of Ray's options for each replica: `{resources = {scorer = 1}}`."""
    placement_group_bundles: list[dict[str, NonNegativeFloat]] | None = None
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
    http_route_prefix: str = "/"
    """Where the service's routes begin; two services of one cluster need different ones."""
    http_num_replicas: Count = 1
    """Processes that answer HTTP; each takes the requests of many callers."""
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
        if not self.http_route_prefix.startswith("/"):
            raise ValueError(
                f"`http_route_prefix` ({self.http_route_prefix!r}) must begin with `/`, such as `/reward`."
            )
