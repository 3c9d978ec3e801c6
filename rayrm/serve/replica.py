"""[RAY] A replica of the reward service: a `BatchLoop` in an actor of Serve's, and how it changes versions.

A roll has three acts. Every replica stages the new version: loads it beside the old one, compares checksums
and the scores stored at its publication. Where one refuses, all drop it and nothing has changed. Then the
pointer is written (`pointer.py`), and the replicas swap. One that missed an act (it was starting, or was
killed) follows the pointer by itself, within a health check.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_LOGGER_NAME

from rayrm.errors import RayrmError, RewardUnavailableError
from rayrm.serve.adapters import SharedBases, bases_of, holds_adapter
from rayrm.serve.batch_loop import BatchLoop
from rayrm.serve.loaded import LoadedModel
from rayrm.serve.pointer import first_pointer, key_of, read_pointer
from rayrm.serve.request import ModelPlace, ScoreRequest, ScoreResult
from rayrm.serve_settings import Ensemble

logger = logging.getLogger("rayrm.serve")
_STAGED_S = 900.0
"""A staged version that nobody swaps in goes after this: who rolled is gone."""
_TRY_AGAIN_S = 30.0
"""A version that the pointer names and that can't be loaded here is tried again after this."""


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What a replica is started with. `deployed` names the deployment, whose pointer says which versions
    replicas load: to begin with, `models`."""

    deployed: str
    models: Mapping[str, ModelPlace]
    ensembles: Mapping[str, Ensemble] = field(default_factory=dict)
    max_tokens_per_batch: int | None = None
    max_queued: int | None = None
    idle_offload_s: float | None = None


class RewardReplica:
    """One copy of the models and their queues; Serve calls the methods."""

    def __init__(self, plan: ReplicaPlan) -> None:
        from rayrm.serve.metrics import ReplicaMetrics

        _log_with_serve()
        self._plan = plan
        self._key = key_of(serve.get_replica_context().app_name, plan.deployed)
        places = {**plan.models, **first_pointer(self._key, plan.models).current}
        # One adapter alone is merged, and scores faster.
        several = sum(holds_adapter(place.path) for place in places.values()) > 1
        self._bases = SharedBases() if several else None
        self._metrics = ReplicaMetrics()
        self._loop = BatchLoop(
            {name: self._load(name, place) for name, place in places.items()},
            plan.ensembles,
            plan.max_queued,
            plan.idle_offload_s,
            self._metrics.batch,
        )
        self._staged: dict[tuple[str, str], LoadedModel] = {}
        self._loading = ThreadPoolExecutor(1, "load")
        self._following: asyncio.Task[None] | None = None
        self._refused: dict[tuple[str, str], tuple[float, str]] = {}
        # A roll and a health check may come to change the version at the same time.
        self._changing = asyncio.Lock()

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult | RayrmError]:
        """The answer to each request, or what it is refused for; a bad one fails itself alone."""
        answers = await asyncio.gather(
            *(self._loop.score(request) for request in requests), return_exceptions=True
        )
        return [self._answer(answer) for answer in answers]

    def _answer(self, answer: ScoreResult | BaseException) -> ScoreResult | RayrmError:
        if isinstance(answer, ScoreResult):
            return answer
        self._metrics.error(answer)
        if isinstance(answer, RayrmError):
            return answer
        if not isinstance(answer, Exception):
            raise answer
        logger.error("a request failed", exc_info=answer)
        return RewardUnavailableError(
            f"the reward service failed: {type(answer).__name__}: {answer}. Its replica's log has the trace."
        )

    async def stage(self, name: str, place: ModelPlace) -> None:
        """Load a version beside the one that serves, and check it. Raises what is wrong with it."""
        async with self._changing:
            await self._stage(name, place)

    async def _stage(self, name: str, place: ModelPlace) -> None:
        if place != self._loop.models[name].place and (name, place.version) not in self._staged:
            loaded = await asyncio.get_running_loop().run_in_executor(self._loading, self._load, name, place)
            self._staged[name, place.version] = loaded

    async def unstage(self, name: str, place: ModelPlace) -> None:
        """The roll was given up."""
        self._staged.pop((name, place.version), None)

    async def follow(self) -> None:
        """Serve what the pointer says; a version that was not staged is loaded first.

        Where one can't be loaded, the others are served, and then its error is raised.
        """
        async with self._changing:
            errors = []
            for name, place in (await self._behind()).items():
                try:
                    await self._stage(name, place)
                except Exception as error:
                    self._refused[name, place.version] = time.time(), str(error)
                    errors.append(error)
                    continue
                model = self._staged.pop((name, place.version))
                self._loop.swap(model)
                logger.info("%s: version %s serves", name, place.version)
            if errors:
                raise errors[0]

    async def _behind(self) -> dict[str, ModelPlace]:
        """The versions that the pointer names and this replica does not serve yet, by model."""
        pointer = await asyncio.to_thread(read_pointer, self._key)
        named = {} if pointer is None else pointer.current
        models = self._loop.models
        return {
            name: place for name, place in named.items() if name in models and place != models[name].place
        }

    async def status(self) -> dict[str, Any]:
        """What this replica serves and how it stands."""
        return {
            "key": self._key,
            "pid": os.getpid(),
            "node": ray.util.get_node_ip_address(),
            "models": {name: model.place.version for name, model in self._loop.models.items()},
            "ensembles": {name: list(one.members) for name, one in self._plan.ensembles.items()},
            "bases": bases_of({name: one.model for name, one in self._loop.models.items()}),
            "num_parameters": self._num_parameters(),
            "staged": [version for _, version in self._staged],
            "leaving": self._loop.leaving(),
            "num_waiting": self._loop.num_waiting,
            "waiting_tokens": self._loop.waiting_tokens,
            "weights": self._loop.weights,
            "drift": {
                name: dataclasses.asdict(model.window.reading)
                for name, model in self._loop.models.items()
                if model.window is not None and model.window.reading is not None
            },
            "refused": {f"{name} {version}": said for (name, version), (_, said) in self._refused.items()},
        }

    def _num_parameters(self) -> int:
        """Of all models in memory; what several share counts once."""
        models = [*self._loop.models.values(), *self._staged.values()]
        return sum({id(one): one.numel() for model in models for one in model.model.parameters}.values())

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if (failure := self._loop.failure()) is not None:
            raise RuntimeError("the replica's batch loop has ended") from failure
        self._loop.start()
        self._metrics.state(self._loop)
        now = time.time()
        for key, model in list(self._staged.items()):
            if now - model.loaded_at > _STAGED_S:
                del self._staged[key]
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow_if_behind())

    async def _follow_if_behind(self) -> None:
        behind = {(name, place.version) for name, place in (await self._behind()).items()}
        self._refused = {key: refusal for key, refusal in self._refused.items() if key in behind}
        waits = {key for key, (at, _) in self._refused.items() if time.time() - at < _TRY_AGAIN_S}
        if not behind - waits:
            return
        try:
            await self.follow()
        except Exception as error:
            # The old version serves on: a replica that answers is better than one that is replaced for ever.
            logger.warning("the version that was rolled to can't be loaded here: %s", error)

    def _load(self, name: str, place: ModelPlace) -> LoadedModel:
        return LoadedModel.load(name, place, self._plan.max_tokens_per_batch, self._bases)


def _log_with_serve() -> None:
    """What the service says goes into the replica's own log file, among Serve's lines."""
    ours = logging.getLogger("rayrm")
    for handler in logging.getLogger(SERVE_LOGGER_NAME).handlers:
        ours.addHandler(handler)
    ours.setLevel(logging.INFO)
