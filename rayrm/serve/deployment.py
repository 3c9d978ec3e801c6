"""[RAY] The reward service: a Serve application of replicas that score, and of what answers HTTP for them.

Everything wrong with a model's files is raised by `deploy` before Serve starts. What a replica does is
`replica.py`; how it is called, `client.py` and `http.py`. Scoring without a cluster is `RewardModel`.
"""

from __future__ import annotations

import dataclasses
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import RayActorOptionsSchema

from rayrm.errors import ClusterError, ConfigError, RewardUnavailableError
from rayrm.serve.caller import REPLICAS
from rayrm.serve.client import RewardClient
from rayrm.serve.connect import connect, shows_token
from rayrm.serve.gateway import (
    DRAIN_S,
    MAX_ONGOING_REQUESTS,
    check_port,
    gateway,
    is_loopback,
    no_token_for,
    proxied,
)
from rayrm.serve.http_guard import token_sha256_in
from rayrm.serve.pointer import drop_pointers, key_of
from rayrm.serve.registry import CURRENT, MANIFEST, PublishedModel, content_version, open_published
from rayrm.serve.replica import ReplicaPlan, RewardReplica
from rayrm.serve.request import ModelPlace
from rayrm.serve.saved import check_base
from rayrm.serve_settings import ServeConfig
from rayrm.settings import nearest, readable

_WAIT_S = 600.0
_SERVES_OWN = {
    "name": "applications.name",
    "http_host": "http_options.host",
    "http_port": "http_options.port",
}
Model = PublishedModel | str | Path


def deploy(
    model: Model | Mapping[str, Model],
    name: str | None = None,
    *,
    config: ServeConfig | None = None,
    wait_s: float = _WAIT_S,
    check_resources: bool = True,
    **fields: Any,
) -> RewardClient:
    """Serve `model` as the application `name` on the running cluster; returns when it answers.

    Args:
        model: a published model, its directory (or `registry/<name>`: the current version), or any saved
            model; several by their names in the service.
        name: the application's name (default: the config's, "reward"). A second call with the same name
            replaces the application; requests in flight are answered by the old one. To change a version
            alone, `client.roll` costs nothing.
        config: a `ServeConfig`; or pass its fields as keywords (`num_replicas=2`).
        wait_s: how long to wait for the replicas to be ready.
        check_resources: refuse at once what is more than the cluster has. False on a cluster that grows.

    Raises:
        PublishError, ModelError: the files are missing, damaged or no reward model (nothing was started).
        ConfigError: settings that contradict each other, or HTTP beyond loopback without a token.
        ClusterError: more resources than the cluster has, or not ready within `wait_s`.
        RewardUnavailableError: the replicas could not start; the message holds Serve's.
    """
    settings = _settings(config, name, fields)
    places, token_sha256 = _checked(model, settings), _http_token(settings)
    return _deployed(settings, places, token_sha256, wait_s=wait_s, check_resources=check_resources)


def app(args: dict[str, Any]) -> serve.Application:
    """The service for Serve's own tools: `import_path: rayrm.serve.deployment:app` in a Serve config.

    `args`: `model` (a directory that every node sees, or a table of several by name) and fields of
    `ServeConfig`. The application's name, and the address and port of HTTP, are the config's (`name`,
    `http_options`); `http: false` leaves HTTP out. Where Serve's proxy is bound beyond loopback, the
    environment in which Ray was started must hold the token. jobs/serve.yaml is an example.

    Raises ConfigError, PublishError, ModelError.
    """
    fields = dict(args)
    for name, instead in _SERVES_OWN.items():
        if name in fields:
            raise ConfigError(f"`args.{name}` is Serve's in a Serve config. Set `{instead}` there.")
    model, http = fields.pop("model", None), fields.pop("http", True)
    if not isinstance(http, bool | str) or str(http).lower() not in ("true", "false"):
        raise ConfigError(f"`args.http` ({http!r}) must be true or false.")
    if not isinstance(model, str | Mapping) or not model:
        raise ConfigError(
            f"`args.model` ({model!r}) must be a published model's directory, or a table of several by name."
        )
    settings = ServeConfig(**fields)
    places = _checked(model, settings)
    token_sha256 = token_sha256_in(settings.http_token_env)
    by_proxy = str(http).lower() == "true"
    return _application(settings, places, secrets.token_hex(8), token_sha256, by_proxy=by_proxy)


def _deployed(
    settings: ServeConfig,
    places: Mapping[str, ModelPlace],
    token_sha256: str | None,
    *,
    wait_s: float = _WAIT_S,
    check_resources: bool = True,
    stop: threading.Event | None = None,
) -> RewardClient:
    """`deploy` of what was checked: a model's files are read once for it. `stop`, once set, gives it up."""
    if not ray.is_initialized():
        connect()
    if check_resources:
        _check_resources(settings)
    is_update = settings.name in serve.status().applications
    if not is_update:
        check_port(settings)
    # Handles, and a gateway of our own, are the way in: Serve's HTTP proxy is not started for it.
    serve.start(proxy_location="Disabled")
    deployed = secrets.token_hex(8)
    application = _application(settings, places, deployed, token_sha256)
    target = serve.RunTarget(application, name=settings.name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        _wait_until_running(settings.name, wait_s, stop)
    except (ClusterError, RewardUnavailableError):
        # What never ran is removed, so that callers are told at once and do not wait for their deadline.
        if not is_update:
            serve.delete(settings.name)
            drop_pointers(settings.name)
        raise
    drop_pointers(settings.name, but=key_of(settings.name, deployed))
    only = next(iter(places)) if len(places) == 1 and not settings.ensembles else None
    return RewardClient(settings.name, model=only)


def serve_forever(
    model: Model | Mapping[str, Model], config: ServeConfig | None = None, *, address: str | None = None
) -> None:
    """Deploy, say how to call it, wait for SIGINT or SIGTERM, and remove this application alone.

    Uses the Ray cluster at `address`, else the one that runs on this machine, else starts one for its own
    life.
    """
    settings = config or ServeConfig()
    places, token_sha256 = _checked(model, settings), _http_token(settings)
    started_here = connect(address)
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        _deployed(settings, places, token_sha256, stop=stop)
        print(_how_to_call(settings, places), flush=True)
        while not stop.wait(timeout=0.5):
            pass
        print(f"stopping {settings.name!r}: requests in flight are answered first", flush=True)
        serve.delete(settings.name)
        drop_pointers(settings.name)
        print(f"removed {settings.name!r}", flush=True)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
        if started_here:
            ray.shutdown()


def _application(
    settings: ServeConfig,
    places: Mapping[str, ModelPlace],
    deployed: str,
    token_sha256: str | None,
    *,
    by_proxy: bool = False,
) -> serve.Application:
    max_queued = None if settings.max_queued_requests < 0 else settings.max_queued_requests
    plan = ReplicaPlan(
        deployed,
        places,
        settings.ensembles,
        settings.max_tokens_per_batch,
        max_queued,
        settings.idle_offload_s,
    )
    options = {name: value for part in _serve_options(settings).values() for name, value in part.items()}
    if settings.autoscaling is None:
        options["num_replicas"] = settings.num_replicas
    replicas = serve.deployment(
        RewardReplica,
        name=REPLICAS,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=1.0,
        # A log line for each request would be one for each step of every caller.
        logging_config={"enable_access_log": False},
        # The files were checked: a replica that cannot load them once will not the second time.
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=DRAIN_S,
        **options,
    ).bind(plan)
    if by_proxy:
        return proxied(settings, replicas, token_sha256)
    return replicas if settings.http_port is None else gateway(settings, replicas, token_sha256)


def _serve_options(settings: ServeConfig) -> dict[str, dict[str, Any]]:
    """What settings that are Serve's own come to there, by the setting's name."""
    actor = {
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        **(settings.ray_actor_options or {}),
    }
    options: dict[str, dict[str, Any]] = {"ray_actor_options": {"ray_actor_options": actor}}
    if settings.placement_group_bundles is not None:
        options["placement_group_bundles"] = {
            "placement_group_bundles": settings.placement_group_bundles,
            "placement_group_strategy": settings.placement_group_strategy,
        }
    if settings.autoscaling is not None:
        options["autoscaling"] = {"autoscaling_config": settings.autoscaling}
    return options


def _check_serve_options(settings: ServeConfig) -> None:
    """Raise ConfigError for what Serve refuses, or would not read."""
    for setting, names in (
        ("autoscaling", AutoscalingConfig.model_fields),
        ("ray_actor_options", RayActorOptionsSchema.model_fields),
    ):
        for name in getattr(settings, setting) or {}:
            if name not in names:
                raise ConfigError(
                    f"`{setting}.{name}` is no option of Serve's. It has {', '.join(sorted(names))}."
                    f"{nearest(name, names)}"
                )
    given: dict[str, Any] = {}
    for setting, options in _serve_options(settings).items():
        given |= options
        try:
            if setting == "autoscaling":
                AutoscalingConfig.model_validate(settings.autoscaling)
            serve.deployment(RewardReplica, name=REPLICAS, **given)
        except (ValueError, TypeError, ImportError, AttributeError) as error:
            said = readable(error, AutoscalingConfig) if isinstance(error, ValidationError) else str(error)
            raise ConfigError(
                f"`{setting}` is refused by Serve: {' '.join(said.split()).rstrip('.!')}. Change that, or "
                f"delete `{setting}`."
            ) from error


def _settings(config: ServeConfig | None, name: str | None, fields: dict[str, Any]) -> ServeConfig:
    if name is not None:
        fields = {"name": name, **fields}
    return ServeConfig(**fields) if config is None else dataclasses.replace(config, **fields)


def _checked(model: Model | Mapping[str, Model], settings: ServeConfig) -> dict[str, ModelPlace]:
    """Where each model lies; PublishError for anything that is not a sound reward model, ConfigError for
    settings that Serve or the models contradict."""
    _check_serve_options(settings)
    if isinstance(model, Mapping):
        places = {name: _checked_model(one)[1] for name, one in model.items()}
    else:
        found, place = _checked_model(model)
        places = {found or settings.name: place}
    if not places:
        raise ConfigError("`model` ({}) names no model. Pass {'name': 'directory'}, or one directory.")
    for name, ensemble in settings.ensembles.items():
        if name in places:
            raise ConfigError(f"ensemble {name!r} has a model's name. Call it otherwise.")
        for member in ensemble.members:
            if member not in places:
                raise ConfigError(
                    f"ensemble {name!r} has the member {member!r}, and the service's models are "
                    f"{', '.join(places)}.{nearest(member, places)}"
                )
    return places


def _checked_model(model: Model) -> tuple[str | None, ModelPlace]:
    path = model.path if isinstance(model, PublishedModel) else Path(model)
    if (path / MANIFEST).is_file() or (path / CURRENT).is_file():
        published = open_published(path)
        check_base(published.path)
        return published.name, ModelPlace(str(published.path.resolve()), published.version)
    version = content_version(path)
    check_base(path)
    return None, ModelPlace(str(path.resolve()), version)


def _http_token(settings: ServeConfig) -> str | None:
    """The SHA-256 of the token that callers must send; ConfigError where one is needed and not set."""
    if settings.http_port is None:
        return None
    token_sha256 = token_sha256_in(settings.http_token_env)
    if token_sha256 is None and not is_loopback(settings.http_host):
        raise ConfigError(no_token_for("`http_host`", settings.http_host, settings))
    return token_sha256


def _how_to_call(settings: ServeConfig, places: Mapping[str, ModelPlace]) -> str:
    served = ", ".join(f"{name} {place.version}" for name, place in places.items())
    several = len(places) > 1 or bool(settings.ensembles)
    which = f", model={next(iter(places))!r}" if several else ""
    lines = [
        f"serving {served} as {settings.name!r} on the Ray cluster at "
        f"{ray.get_runtime_context().gcs_address}",
        "call it from any process of the cluster:",
        "    from rayrm import RewardClient",
        f"    RewardClient({settings.name!r}{which})(prompts=[...], completions=[...])",
    ]
    if shows_token():
        lines += ["what joins by ray.init(address=...) types export RAY_AUTH_MODE=token first (Ray's token)"]
    if settings.http_port is not None:
        root = f"http://{settings.http_host}:{settings.http_port}"
        lines += [f"or over HTTP: {root}/v1/score (every route: {root}/docs)"]
    return "\n".join([*lines, "stop with Ctrl-C"])


def _check_resources(settings: ServeConfig) -> None:
    has = ray.cluster_resources()
    options = settings.ray_actor_options or {}
    for kind, each, setting in (
        ("CPU", options.get("num_cpus", settings.num_cpus), "num_cpus"),
        ("GPU", options.get("num_gpus", settings.num_gpus), "num_gpus"),
    ):
        needed = settings.num_replicas * each
        if needed > has.get(kind, 0):
            raise ClusterError(
                f"{settings.num_replicas} replicas with `{setting}` ({each:g}) need {needed:g} {kind}s, the "
                f"cluster has {has.get(kind, 0):g}. Lower `num_replicas` or `{setting}`; on a cluster that "
                "grows on demand pass check_resources=False."
            )


def _wait_until_running(name: str, wait_s: float, stop: threading.Event | None) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        application = serve.status().applications.get(name)
        status = "NOT_STARTED" if application is None else application.status.value
        messages = [] if application is None else [application.message]
        messages += [] if application is None else [d.message for d in application.deployments.values()]
        said = " ".join(message for message in messages if message)
        if status == "RUNNING":
            return
        if stop is not None and stop.is_set():
            raise ClusterError(f"told to stop before application {name!r} was ready ({status}).")
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RewardUnavailableError(f"application {name!r} could not start ({status}): {said}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"application {name!r} is not ready after {wait_s:g} s ({status}): {said or 'no message'}. "
                "Free the resources that its replicas wait for, lower `num_replicas`, or raise `wait_s`."
            )
        time.sleep(0.1)
