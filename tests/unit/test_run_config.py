"""What Ray's RunConfig says is used, or refused with what to set here."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig

from rayrm.errors import ConfigError
from rayrm.train.workers import check_run_config


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"name": "mine"}, r"`run_config.name` \('mine'\) is not used: the run's directory is `output_dir`"),
        (
            {"storage_path": "s3://bucket/runs"},
            "`run_config.storage_path` .* `output_dir`; .* `RewardConfig.storage_path`",
        ),
        ({"checkpoint_config": CheckpointConfig(num_to_keep=2)}, "`save_total_limit`"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_run_of_ours_decides_otherwise_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_run_config(RunConfig(**given), 2)


def test_failures_environment_and_logging_are_taken_where_there_are_workers() -> None:
    given = RunConfig(
        failure_config=FailureConfig(max_failures=3),
        worker_runtime_env={"env_vars": {"A": "1"}},
        logging_config=LoggingConfig(log_level="DEBUG"),
    )
    check_run_config(given, 2)
    check_run_config(None, 0)
    with pytest.raises(ConfigError, match="needs `scaling_config`"):
        check_run_config(given, 0)
    with pytest.raises(ConfigError, match=r"is a dict. Pass `ray.train.RunConfig"):
        check_run_config({"name": "x"}, 2)
