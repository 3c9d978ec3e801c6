"""A run whose rows the model cannot place is refused before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest

from rayrm.config import RewardConfig
from rayrm.errors import ConfigError
from rayrm.train.positions import check_rope
from tests.tiny import tiny_model


@pytest.mark.parametrize("stage", [{"zero_stage": 3}, {"deepspeed": {"zero_optimization": {"stage": 3}}}])
def test_rows_that_take_forwards_of_their_own_are_refused_at_the_start_of_zero_3(
    stage: dict[str, Any],
) -> None:
    def config_of(**settings: Any) -> RewardConfig:
        return RewardConfig(bf16=False, **settings)

    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model.config.max_position_embeddings = 64
    with pytest.raises(ConfigError, match=r"rows above 64 tokens .* the longest has 65.* `max_length=64`"):
        check_rope(model, 65, config_of(**stage), 2)
    check_rope(model, 64, config_of(**stage), 2)
    check_rope(model, 65, config_of(**stage), 1)
    check_rope(model, 65, config_of(zero_stage=2), 2)
