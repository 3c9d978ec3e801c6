"""[RAY] What answers HTTP for a reward service: `http.py`'s routes in a deployment before the replicas.

It shares no process with a model: reading and checking bodies takes nothing from the loop that computes, and
requests that arrive together travel to a replica together, as those of a `RewardClient` do.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve

from rayrm.serve_settings import ServeConfig


class HttpGateway:
    """Serve builds the application in the process that answers. `token_sha256`: None where none is asked."""

    def __init__(self, settings: ServeConfig, token_sha256: str | None, replicas: Any) -> None:
        # Serve makes what an application is bound with a part of it.
        self._settings, self._token_sha256, self._replicas = settings, token_sha256, replicas

    def __serve_build_asgi_app__(self) -> Any:
        from rayrm.serve.client import RewardClient
        from rayrm.serve.http import HttpLimits, build_app

        settings = self._settings
        # A full queue is told to who asks, who may go elsewhere.
        client = RewardClient(settings.name, retry_overload=False)

        async def status() -> dict[str, Any]:
            found = await asyncio.to_thread(client.status, wait_s=5.0)
            models: dict[str, Any] = {name: {"version": one} for name, one in found["models"].items()}
            models |= {name: {"members": members} for name, members in found["ensembles"].items()}
            return {"ready": True, "models": models}

        limits = HttpLimits(
            max_body_bytes=settings.http_max_body_bytes,
            max_texts=settings.http_max_texts,
            max_characters=settings.http_max_characters,
        )
        return build_app(client.ask, status, limits, self._token_sha256)


def gateway(
    settings: ServeConfig, replicas: serve.Application, token_sha256: str | None
) -> serve.Application:
    """The application whose ingress speaks HTTP and whose replicas score."""
    return serve.deployment(
        serve.ingress()(HttpGateway),
        name="HttpGateway",
        num_replicas=settings.http_num_replicas,
        ray_actor_options={"num_cpus": 0.0},
        max_ongoing_requests=4096,
        logging_config={"enable_access_log": False},
        health_check_period_s=1.0,
    ).bind(settings, token_sha256, replicas)
