"""As roll/distributed/executor/worker.py of alibaba/ROLL at 8eb27cc2: what a worker inherits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass
class RankInfo:
    world_size: int = 1
    dp_size: int = 1
    rank: int = 0
    dp_rank: int = 0


class Worker:
    def __init__(self, worker_config: Any) -> None:
        self.worker_config = worker_config
        self.pipeline_config: Any = None
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.rank_info = RankInfo(world_size, world_size, rank, rank)

    def initialize(self, pipeline_config: Any) -> None:
        self.pipeline_config = pipeline_config

    def get_rank_info(self) -> RankInfo:
        return self.rank_info
