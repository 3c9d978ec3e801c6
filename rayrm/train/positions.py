"""Whether a model has positions for the rows of a run: checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayrm.config import RewardConfig
from rayrm.deepspeed_rules import resolved_stage
from rayrm.errors import ConfigError
from rayrm.model.reward_model import position_limit
from rayrm.model.scaling_rope import ScalingRope


def check_positions(model: Any, longest: int, say: Callable[[str], None]) -> None:
    """Rotary positions go on beyond their limit, as in TRL, but scoring refuses such texts; tables end."""
    limit = position_limit(model)
    if limit is None or longest <= limit:
        return
    if not hasattr(model.config.get_text_config(), "rope_parameters"):
        raise ConfigError(
            f"the longest side has {longest} tokens, but the model has {limit} positions. Set "
            f"`max_length={limit}` (longer pairs are left out and counted)."
        )
    say(
        f"the longest side has {longest} tokens, above the model's {limit} positions: the trained model will "
        f"refuse to score such texts. `max_length={limit}` leaves them out"
    )


def check_rope(model: Any, longest: int, config: RewardConfig, num_ranks: int) -> None:
    """Refuse at the start what `PackedScorer` refuses where it happens: others would wait for that rank."""
    rope = ScalingRope.of(model.config.get_text_config())
    if resolved_stage(config) == 3 and num_ranks > 1 and rope is not None and longest > rope.limit:
        raise ConfigError(
            f"ZeRO stage 3 on {num_ranks} workers cannot train rows above {rope.limit} tokens with a rope of "
            f"type {rope.kind}, and the longest has {longest}: such rows take forwards of their own, and "
            f"ZeRO-3 wants equally many of every worker. Set `zero_stage=2`, or `max_length={rope.limit}`."
        )
