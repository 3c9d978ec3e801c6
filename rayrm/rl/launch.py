"""[RAY] An RL run: policy workers and the reward service that they call, placed together, from start to end.

`train_policy` reserves room for both at once, starts the service on the nodes of that room, warms it up,
trains with TRL in Ray Train workers, and removes what it started. With a service that runs already nothing is
deployed and nothing removed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from rayrm.data.messages import Text
from rayrm.errors import ClusterError, ConfigError, DataError, RayrmError, RunDirectoryError
from rayrm.logs import show_logs
from rayrm.own_ray import trainer_class
from rayrm.rl.heldout import Gain
from rayrm.rl.policy import HELDOUT_FILE, PolicyJob, read_metrics, train_policy_rank, trainer_config
from rayrm.rl.runfile import dump_rl_run, with_absolute_places
from rayrm.rl.settings import RLRun
from rayrm.serve.caller import CallSettings, service_handle
from rayrm.serve.client import RewardClient
from rayrm.serve.score_file import read_rows
from rayrm.train.last_error import forget_error, leave_error, left_error
from rayrm.train.launch import join_cluster, ray_train_settings

logger = logging.getLogger("rayrm.rl")

_ROOM_WAIT_S = 60.0
_NODE = "ray.io/node-id"
_Clients = tuple[dict[str, RewardClient], RewardClient | None]


@dataclass(frozen=True, slots=True)
class RLSummary:
    """A finished run: where its policy is, its log's records, and the gain on held-out prompts, if any."""

    output_dir: Path
    records: list[dict[str, Any]]
    gain: Gain | None


def train_policy(run: RLRun) -> RLSummary:
    """Train what `run` says to the end; goes on where a run of the same settings was cut off.

    Raises:
        ConfigError, DataError, PublishError, ModelError, RunDirectoryError, ClusterError: refused before a
            worker starts.
        ScoreError, RewardUnavailableError: as the reward raised it.
    """
    show_logs()
    run = with_absolute_places(run)
    _check_trl()
    prompts = read_prompts(run.prompts.train, run.prompts.max_train)
    heldout = (
        [] if run.prompts.heldout is None else read_prompts(run.prompts.heldout, run.prompts.max_heldout)
    )
    trainer_config(run, len(heldout))
    _begin(run)
    join_cluster(run.cluster.address)
    with ending_on_sigterm(), _reward_service(run) as (clients, gold):
        for one in (*clients.values(), gold):
            _warm_up(one, (heldout or prompts)[0]["prompt"])
        _fit(PolicyJob(run, clients, gold, prompts, heldout))
    output_dir = run.output_dir
    file = output_dir / HELDOUT_FILE
    gain = Gain(**json.loads(file.read_text(encoding="utf-8"))["gain"]) if file.exists() else None
    return RLSummary(output_dir, read_metrics(output_dir), gain)


def read_prompts(source: str, most: int | None = None) -> list[dict[str, Any]]:
    """The rows of a source that have a `prompt`, without the columns of preferences.

    Other columns go to the reward as they are. Raises DataError naming the row that has no prompt.
    """
    rows: list[dict[str, Any]] = []
    for where, row in read_rows(source):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not prompt or not isinstance(prompt, str | list):
            raise DataError(
                f"{where}: `prompt` ({prompt!r}) must be a string or a message list [{{'role': 'user', "
                "'content': ...}]. Give rows with a prompt, or rename the column that holds it."
            )
        rows.append({key: value for key, value in row.items() if key not in ("chosen", "rejected")})
        if most is not None and len(rows) >= most:
            break
    if not rows:
        raise DataError(f"{source} holds no rows. Give rows with a `prompt`.")
    return rows


def _begin(run: RLRun) -> None:
    """Make the run's directory, or check that it holds this run, unfinished."""
    output_dir = run.output_dir
    file = output_dir / "run.toml"
    if (output_dir / "config.json").exists() or (output_dir / "adapter_config.json").exists():
        raise RunDirectoryError(
            f"{output_dir} holds a finished policy. Choose another `output_dir`, or delete that directory."
        )
    said = dump_rl_run(run)
    if file.exists() and file.read_text(encoding="utf-8") != said:
        raise RunDirectoryError(
            f"{output_dir} holds another run: its run.toml says otherwise. Choose another `output_dir`, or "
            "set what you changed back to go on with that run."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(said, encoding="utf-8")


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM (`ray job stop`) ends the block as Ctrl-C does, so that the service of this run is removed.

    Ray Train sets handlers of its own for Ctrl-C and leaves them behind; those from before come back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _reward_service(run: RLRun) -> Iterator[_Clients]:
    """The rewards' clients by name, and the gold reward's. A service of this run ends with the block."""
    from ray import serve

    source = run.reward
    if source.service is not None:
        name = source.service
        service_handle(CallSettings(name))  # raises where none of that name runs
        yield _clients(run, name, source.use)
        return
    from rayrm.serve.deployment import deploy

    if run.serve.name in serve.status().applications:
        raise ConfigError(
            f"a service {run.serve.name!r} runs on this cluster, and [reward] has a `model` to serve. Type "
            f"reward.service={run.serve.name} without `model` to use it, or serve.name=ANOTHER."
        )
    settings = _placed(run)
    logger.info("starting the reward service %r", settings.name)
    client = deploy(source.model or "", config=settings)
    try:
        yield _clients(run, settings.name, source.use or client.model)
    finally:
        if ray.is_initialized():
            serve.delete(settings.name)


def _clients(run: RLRun, name: str, use: str | None) -> _Clients:
    def client(model: str | None) -> RewardClient:
        return RewardClient(name, model=model, deadline_s=run.reward.deadline_s)

    rewards = [client(model) for model in (run.reward.weights or [use])]
    gold = run.reward.gold
    return {one.__name__: one for one in rewards}, None if gold is None else client(gold)


def _placed(run: RLRun) -> Any:
    """`[serve]` with its replicas on nodes where Ray has room for them and for the policy workers at once.

    Ray Train makes a placement group of its own and Serve places each replica by itself, so that neither
    knows of the other. One group over both, as close together as it goes, is asked for and given back: it
    tells before anything starts whether all fit, and where. Replicas prefer those nodes, and start elsewhere
    when a node is lost.
    """
    scaling, _ = ray_train_settings(run.cluster)
    worker = {"CPU": 1.0} if scaling is None else _of_worker(run)
    num_workers = 0 if scaling is None else run.cluster.num_workers
    settings = run.serve
    replica = {"CPU": settings.num_cpus, "GPU": settings.num_gpus}
    bundles = [worker] * num_workers + [replica] * settings.num_replicas
    bundles = [kept for bundle in bundles if (kept := {k: v for k, v in bundle.items() if v > 0})]
    if not bundles:
        return settings
    group = reserve_room(
        bundles,
        f"{num_workers} policy workers of {worker} and {settings.num_replicas} replicas of {replica}",
        "Lower `cluster.num_workers`, `cluster.resources_per_worker`, `serve.num_replicas` or "
        "`serve.num_cpus`, or end what runs beside.",
    )
    try:
        nodes = placement_group_table(group)["bundles_to_node_id"]
        mine = sorted({node for place, node in nodes.items() if int(place) >= num_workers})
    finally:
        remove_placement_group(group)
    options = dict(settings.ray_actor_options or {})
    if settings.placement_group_bundles is not None or settings.autoscaling is not None or not mine:
        return settings  # the user places them
    selector = {_NODE: f"in({','.join(mine)})"}
    options |= {"label_selector": selector, "fallback_strategy": [{"label_selector": {}}]}
    return dataclasses.replace(settings, ray_actor_options=options)


def reserve_room(bundles: list[dict[str, float]], asked: str, remedy: str) -> PlacementGroup:
    """A placement group of all `bundles` at once, as close together as it goes; who asks removes it.

    Raises ClusterError where there is no room within a minute: `asked` says for what, `remedy` what to type.
    """
    group = placement_group(bundles, strategy="PACK")
    try:
        if group.wait(_ROOM_WAIT_S):
            return group
        raise ClusterError(
            f"{asked} do not fit together on this cluster, which has {_total()}, free {_free()}. {remedy}"
        )
    except BaseException:
        remove_placement_group(group)
        raise


def _of_worker(run: RLRun) -> dict[str, float]:
    if run.cluster.resources_per_worker is not None:
        return dict(run.cluster.resources_per_worker)
    return {"CPU": 1.0, "GPU": 1.0} if run.cluster.use_gpu else {"CPU": 1.0}


def _total() -> dict[str, float]:
    return {kind: ray.cluster_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}


def _free() -> dict[str, float]:
    return {kind: ray.available_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}


def _warm_up(client: RewardClient | None, prompt: Text) -> None:
    """Let the service score one text: its text form must be the prompts' own, and its first batch is slow."""
    if client is None:
        return
    answer: Text = "A first answer."
    if not isinstance(prompt, str):
        answer = [{"role": "assistant", "content": "A first answer."}]
    result = client.score([prompt], [answer])
    logger.info("the reward %s answers: version %s", client.__name__, result.version)


def _fit(job: PolicyJob) -> None:
    """Run the ranks; what one of them raised comes back as it was."""
    from ray.train import LoggingConfig, RunConfig, ScalingConfig

    scaling, settings = ray_train_settings(job.run.cluster)
    output_dir = job.run.output_dir
    forget_error(output_dir)
    if scaling is None:
        trainer = trainer_class()(
            _run_rank, train_loop_config={"job": job}, scaling_config=ScalingConfig(num_workers=0)
        )
    else:
        trainer = trainer_class()(
            _run_rank,
            train_loop_config={"job": job},
            scaling_config=scaling,
            run_config=RunConfig(
                name=output_dir.name,
                storage_path=str(output_dir.parent),
                failure_config=settings.failure_config,
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
    try:
        trainer.fit()
    except Exception as failure:
        raise (left_error(output_dir) or _told(failure, output_dir)) from failure
    else:
        if (error := left_error(output_dir)) is not None:
            raise error
    finally:
        forget_error(output_dir)


def _told(failure: Exception, output_dir: Path) -> Exception:
    from ray.train import TrainingFailedError

    if not isinstance(failure, TrainingFailedError):
        return failure
    said = [line for line in str(failure).splitlines() if line.strip()]
    return RayrmError(
        f"training in {output_dir} failed: {said[-1]}. The workers' own messages stand above; with "
        "`save_strategy` and `save_steps` in the run file the same command goes on from the last checkpoint."
    )


def _run_rank(config: dict[str, Any]) -> None:
    """What every Ray Train worker (or this process, in local mode) runs."""
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    show_logs(logging.INFO if first else logging.WARNING)
    job: PolicyJob = config["job"]
    if left_error(job.run.output_dir) is not None:
        return
    try:
        train_policy_rank(job)
    except RayrmError as error:
        leave_error(job.run.output_dir, error)
        raise


def _check_trl() -> None:
    import importlib.util

    from rayrm.errors import MissingExtraError

    if importlib.util.find_spec("trl") is None:
        raise MissingExtraError(
            "GRPO and RLOO need TRL, which is not installed. Type: pip install 'rayrm[trl]'"
        )
