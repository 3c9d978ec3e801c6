"""[RAY] What answers HTTP for a reward service: `http.py`'s routes, in a process beside the replicas.

Reading and checking bodies takes nothing from the loop that computes, and requests that arrive together
travel to a replica together, as those of a `RewardClient` do. The server binds an address of its own. Serve's
proxy has one port for a whole cluster, fixed by whoever started Serve, and routes that ask for no token.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

from rayrm.errors import ClusterError, ConfigError, RewardUnavailableError
from rayrm.serve.caller import REPLICAS
from rayrm.serve.client import RewardClient
from rayrm.serve.request import ScoreRequest, ScoreResult
from rayrm.serve_settings import ServeConfig

DRAIN_S = 20.0
"""So long replicas that are told to go finish their requests, and the gateway waits for the answers."""
_LEAVE_S = 5
"""What is then left to the server: to write its last answers, and to close."""
_BIND_WAIT_S = DRAIN_S + 2 * _LEAVE_S + 10
"""The gateway of the deployment before may still be leaving."""
_POLL_S = 0.1
# A replica's queue is its own; Serve's limit (5 unless raised) would keep requests from meeting in a batch.
MAX_ONGOING_REQUESTS = 4096


class InFlight:
    """`ask`, until `leave`: new requests are refused from then on, those in flight answered or cut.

    A request that is cut, and one that is refused, raises RewardUnavailableError, which is a 503.
    """

    def __init__(self, ask: Callable[[ScoreRequest], Awaitable[ScoreResult]]) -> None:
        self._ask = ask
        self._asked: set[asyncio.Future[ScoreResult]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving = self._cut = False

    async def ask(self, request: ScoreRequest) -> ScoreResult:
        """The answer to `request`; called in the server's event loop alone."""
        if self._leaving:
            raise _stopped()
        self._loop = asyncio.get_running_loop()
        asked = asyncio.ensure_future(self._ask(request))
        self._asked.add(asked)
        try:
            return await asked
        except asyncio.CancelledError:
            if self._cut:
                raise _stopped() from None
            raise
        finally:
            self._asked.discard(asked)

    def leave(self, wait_s: float, may_answer: Callable[[], bool]) -> None:
        """Refuse what comes, and return when nothing is in flight; called in another thread than `ask`.

        What waits after `wait_s` seconds, or when `may_answer` says that nothing can answer it, is cut.
        """
        self._leaving = True
        deadline = time.monotonic() + wait_s
        while self._asked and time.monotonic() < deadline and may_answer():
            time.sleep(_POLL_S)
        if self._loop is not None:
            # Also for a request that came as this began.
            self._loop.call_soon_threadsafe(self._cut_all)

    def _cut_all(self) -> None:
        self._cut = True
        for asked in self._asked:
            asked.cancel()


def _stopped() -> RewardUnavailableError:
    return RewardUnavailableError(
        "the service is being stopped, or deployed again. Send the request again later."
    )


class HttpGateway:
    """Serves on a port of its own until Serve deletes it. `token_sha256`: None: no token is asked for."""

    def __init__(self, settings: ServeConfig, token_sha256: str | None, replicas: Any) -> None:
        import uvicorn

        # Serve makes what an application is bound with a part of it.
        self._replicas = replicas
        listening = _bound(settings.http_host, settings.http_port or 0)
        self._application = serve.get_replica_context().app_name
        client = _client()
        self._in_flight = InFlight(client.ask)
        config = uvicorn.Config(
            _routes(settings, token_sha256, client, self._in_flight.ask),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LEAVE_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, daemon=True, name="http"
        )
        self._thread.start()

    async def check_health(self) -> None:
        """Called by Serve, which replaces the gateway when this raises."""
        if not self._thread.is_alive():
            raise RuntimeError("the HTTP server has ended")

    def __del__(self) -> None:
        """Called by Serve when it is told to remove the gateway, which it then waits for."""
        server, thread = getattr(self, "_server", None), getattr(self, "_thread", None)
        if server is not None and thread is not None and not server.should_exit:
            self._in_flight.leave(DRAIN_S, self._has_replicas)
            server.should_exit = True
            thread.join(2 * _LEAVE_S)

    def _has_replicas(self) -> bool:
        """Whether a replica is left: they are told to go when the gateway is, and may be gone first."""
        wanted = DeploymentID(REPLICAS, self._application)
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        replicas = [ReplicaID.from_full_id_str(name) for name in names if ReplicaID.is_full_id_str(name)]
        return any(replica.deployment_id == wanted for replica in replicas)


def gateway(
    settings: ServeConfig, replicas: serve.Application, token_sha256: str | None
) -> serve.Application:
    """The gateway with its replicas, on the node of the process that deploys it."""
    here = ray.util.get_node_ip_address()
    return serve.deployment(
        HttpGateway,
        name="HttpGateway",
        ray_actor_options={"num_cpus": 0, "resources": {f"node:{here}": 0.001}},
        health_check_period_s=1.0,
        max_constructor_retry_count=1,
        # Serve counts no request of ours: it says at once that the gateway must go, and gives it the time.
        graceful_shutdown_wait_loop_s=0.0,
        graceful_shutdown_timeout_s=DRAIN_S + 2 * _LEAVE_S + 5,
        logging_config={"enable_access_log": False},
    ).bind(settings, token_sha256, replicas)


def check_port(settings: ServeConfig) -> None:
    """Raise ClusterError where another process has the port already, before anything is started."""
    if settings.http_port is None:
        return
    try:
        _listening(settings.http_host, settings.http_port).close()
    except OSError as error:
        raise ClusterError(_taken(settings.http_host, settings.http_port, error)) from error


def proxied(
    settings: ServeConfig, replicas: serve.Application, token_sha256: str | None
) -> serve.Application:
    """The same routes behind Serve's own proxy, on the address that whoever started Serve gave to it."""

    def routes() -> Any:
        _check_proxy(settings, token_sha256)
        client = _client()
        return _routes(settings, token_sha256, client, client.ask)

    @serve.ingress(routes)
    class HttpProxied:
        def __init__(self, replicas: Any) -> None:
            self._replicas = replicas

    return serve.deployment(
        HttpProxied,
        name="HttpGateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=1.0,
        max_constructor_retry_count=1,
        logging_config={"enable_access_log": False},
    ).bind(replicas)


def _check_proxy(settings: ServeConfig, token_sha256: str | None) -> None:
    client = _get_global_client()
    if ray.get(client._controller.get_proxy_location.remote()) == ProxyLocation.Disabled:
        raise ConfigError(
            "Serve runs here without its HTTP proxy, as `rayrm serve` or `deploy` started it, so nobody "
            "would answer at `http_options`. Type `serve shutdown`, which removes every application, and "
            "deploy the Serve config first; or set `args.http: false`, for callers in the cluster alone."
        )
    host = client.http_config.host
    if token_sha256 is None and host is not None and not is_loopback(host):
        raise ConfigError(no_token_for("Serve's proxy (`http_options.host`)", host, settings))


def is_loopback(host: str) -> bool:
    """Whether only this machine can call a server that is bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def no_token_for(setting: str, host: str, settings: ServeConfig) -> str:
    """What to type where callers from other machines are answered and no token is set."""
    return (
        f"{setting} ({host!r}) answers callers from other machines, and no token is set. Type export "
        f'{settings.http_token_env}="$(openssl rand -hex 32)" first, on every node where Ray starts for a '
        'Serve config, and give callers the same; or bind "127.0.0.1".'
    )


def _client() -> RewardClient:
    # A full queue is told to who asks, who may go elsewhere.
    return RewardClient(serve.get_replica_context().app_name, retry_overload=False)


def _routes(
    settings: ServeConfig,
    token_sha256: str | None,
    client: RewardClient,
    ask: Callable[[ScoreRequest], Awaitable[ScoreResult]],
) -> Any:
    from rayrm.serve.http import build_app
    from rayrm.serve.http_limits import HttpLimits

    async def status() -> dict[str, Any]:
        found = await asyncio.to_thread(client.status, wait_s=5.0)
        models: dict[str, Any] = {name: {"version": one} for name, one in found["models"].items()}
        for name, members in found["ensembles"].items() if found["models"] else ():
            version = ".".join(found["models"][member] for member in members)
            models[name] = {"version": version, "members": members}
        return {"ready": True, "models": models}

    limits = HttpLimits(
        max_body_bytes=settings.http_max_body_bytes,
        max_texts=settings.http_max_texts,
        max_characters=settings.http_max_characters,
    )
    return build_app(ask, status, limits, token_sha256)


def _bound(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + _BIND_WAIT_S
    while True:
        try:
            return _listening(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ClusterError(_taken(host, port, error)) from error
            time.sleep(0.2)


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError:
        found.close()
        raise
    return found


def _taken(host: str, port: int, error: OSError) -> str:
    return (
        f"HTTP cannot be answered at `http_host` {host!r}, `http_port` {port}: {error.strerror or error}. "
        "Pass another port, or an address of this machine."
    )
