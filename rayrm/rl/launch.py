"""[RAY] An RL run: policy workers and the reward service that they call, placed together, from start to end.

`train_policy` reserves room for both at once, starts the service on the nodes of that room, warms it up,
trains with TRL in Ray Train workers, and removes what it started. With a service that runs already nothing is
deployed and nothing removed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import warnings
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

from rayrm.data.messages import answer_to
from rayrm.errors import ClusterError, ConfigError, PeerFailedError, RayrmError, ScoreError
from rayrm.logs import show_logs
from rayrm.own_ray import join_cluster, keeping_handlers, trainer_class
from rayrm.rl.ending import ending_on_sigterm, finishing_first, ray_told_to_leave
from rayrm.rl.fresh_answers import BEFORE_FILE, HELDOUT_FILE
from rayrm.rl.heldout import Gain
from rayrm.rl.policy import PolicyJob, train_policy_rank
from rayrm.rl.prompts import read_prompts, without_heldout
from rayrm.rl.run_directory import FINISHED, own_directory
from rayrm.rl.run_log import Report, write_json
from rayrm.rl.runfile import with_absolute_places
from rayrm.rl.settings import RLRun
from rayrm.rl.shaping import Shaper
from rayrm.rl.trainer_config import check_policy, check_trainer
from rayrm.serve.caller import CallSettings, service_handle
from rayrm.serve.client import RewardClient
from rayrm.serve_settings import ServeConfig
from rayrm.train.last_error import forget_error, leave_error, left_error
from rayrm.train.launch import ray_train_settings, training_failed
from rayrm.train.records import read_records

logger = logging.getLogger("rayrm.rl")

_ROOM_WAIT_S = 60.0
_PRINT_PATCH = "RAY_TRAIN_ENABLE_PRINT_PATCH"
_SERVICE = "service.json"
"""In the run's directory while a service of its own runs: whose it is, should this process be killed."""
_NODE = "ray.io/node-id"
_Clients = tuple[dict[str, RewardClient], RewardClient | None]


@dataclass(frozen=True, slots=True)
class RLSummary:
    """A finished run: where its policy is, its log's records, and the gain on held-out prompts, if any."""

    output_dir: Path
    records: list[dict[str, Any]]
    gain: Gain | None


def train_policy(run: RLRun, *, report: Report | None = None) -> RLSummary:
    """Train what `run` says to the end; goes on where a run of the same settings was cut off.

    `report`: called with the run's directory now and then while it trains.

    Raises:
        ConfigError, DataError, PublishError, ModelError, RunDirectoryError, ClusterError: refused before a
            worker starts.
        ScoreError, RewardUnavailableError: as the reward raised it.
    """
    show_logs()
    run = with_absolute_places(run)
    given = run.prompts
    heldout = [] if given.heldout is None else read_prompts(given.heldout, given.max_heldout)
    prompts = without_heldout(read_prompts(given.train, given.max_train), heldout)
    check_trainer(run, len(prompts), len(heldout))
    check_policy(run.policy.name, [*prompts, *heldout])
    with own_directory(run):
        with ray_told_to_leave():
            join_cluster(run.cluster.address)
        with ending_on_sigterm():
            with _reward_service(run) as (clients, gold):
                for client in clients.values():
                    _warm_up(run, client, prompts[0], is_gold=False)
                if gold is not None:
                    _warm_up(run, gold, prompts[0], is_gold=True)
                _fit(PolicyJob(run, clients, gold, prompts, heldout, report))
            return _summary(run.output_dir)


def _summary(output_dir: Path) -> RLSummary:
    """What a run that is done left; marks its directory as finished."""
    file = output_dir / HELDOUT_FILE
    gain = Gain(**json.loads(file.read_text(encoding="utf-8"))["gain"]) if file.exists() else None
    records = read_records(output_dir)
    write_json(output_dir / FINISHED, {"steps": records[-1]["step"] if records else 0})
    (output_dir / BEFORE_FILE).unlink(missing_ok=True)
    return RLSummary(output_dir, records, gain)


@contextmanager
def _reward_service(run: RLRun) -> Iterator[_Clients]:
    """The rewards' clients by name, and the gold reward's. A service of this run ends with the block."""
    from ray import serve

    source, settings = run.reward, run.serve
    if source.service is not None:
        name = source.service
        service_handle(CallSettings(name))  # raises where none of that name runs
        _nodes_with_room(run, 0)
        yield _clients(run, name, source.use)
        return
    from rayrm.serve.deployment import deploy

    note = run.output_dir / _SERVICE
    place = {"name": settings.name, "cluster": ray.get_runtime_context().gcs_address}
    if settings.name in serve.status().applications:
        if not note.exists() or json.loads(note.read_text(encoding="utf-8")) != place:
            raise ConfigError(
                f"a service {settings.name!r} runs on this cluster, and [reward] has a `model` to serve. "
                f"Type reward.service={settings.name} without `model` to use it, or serve.name=ANOTHER."
            )
        logger.info("removing the service %r, which an attempt that was killed left", settings.name)
        serve.delete(settings.name)
    settings = _placed(run)
    logger.info("starting the reward service %r", settings.name)
    write_json(note, place)
    try:
        client = deploy(source.model or "", config=settings)
        yield _clients(run, settings.name, source.use or client.model)
    finally:
        with finishing_first(f"removing the service {settings.name!r}"):
            if ray.is_initialized() and settings.name in serve.status().applications:
                serve.delete(settings.name)
            note.unlink(missing_ok=True)


def _clients(run: RLRun, name: str, use: str | None) -> _Clients:
    def client(model: str | None) -> RewardClient:
        return RewardClient(name, model=model, deadline_s=run.reward.deadline_s)

    rewards = [client(model) for model in (run.reward.weights or [use])]
    gold = run.reward.gold
    return {one.__name__: one for one in rewards}, None if gold is None else client(gold)


def _placed(run: RLRun) -> ServeConfig:
    """`[serve]` with its replicas on nodes where Ray has room for them and for the policy workers at once.

    Replicas prefer those nodes, and start elsewhere when a node is lost.
    """
    settings = run.serve
    nodes = _nodes_with_room(run, settings.num_replicas)
    if settings.placement_group_bundles is not None or settings.autoscaling is not None or not nodes:
        return settings  # the user places them
    selector = {_NODE: f"in({','.join(nodes)})"}
    options = {"label_selector": selector, "fallback_strategy": [{"label_selector": {}}]}
    return dataclasses.replace(settings, ray_actor_options={**(settings.ray_actor_options or {}), **options})


def _nodes_with_room(run: RLRun, num_replicas: int) -> list[str]:
    """Nodes for so many replicas, where the policy workers have room too. ClusterError where there is none.

    Ray Train makes a placement group of its own and Serve places each replica by itself, so that neither
    knows of the other. One group over both, as close together as it goes, is asked for and given back: it
    tells before anything starts whether all fit, and where.
    """
    num_workers = run.cluster.num_workers
    worker = _of_worker(run)
    replica = {"CPU": run.serve.num_cpus, "GPU": run.serve.num_gpus}
    asked = [worker] * num_workers + [replica] * num_replicas
    bundles = [{kind: amount for kind, amount in bundle.items() if amount > 0} for bundle in asked]
    places = [place for place, bundle in enumerate(bundles) if bundle]
    if not places:
        return []
    beside = f" and {num_replicas} replicas of {replica}" if num_replicas else ""
    group = reserve_room(
        [bundles[place] for place in places],
        f"{num_workers} policy workers of {worker}{beside}",
        "Lower `cluster.num_workers`, `cluster.resources_per_worker`, `serve.num_replicas` or "
        "`serve.num_cpus`, or end what runs beside.",
    )
    try:
        nodes = placement_group_table(group)["bundles_to_node_id"]
        return sorted({node for place, node in nodes.items() if places[int(place)] >= num_workers})
    finally:
        remove_placement_group(group)


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
    """What Ray Train reserves for a worker."""
    given = run.cluster.resources_per_worker
    if given is None:
        return {"GPU": 1.0} if run.cluster.use_gpu else {"CPU": 1.0}
    return {"GPU": 1.0, **given} if run.cluster.use_gpu else dict(given)


def _total() -> dict[str, float]:
    return {kind: ray.cluster_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}


def _free() -> dict[str, float]:
    return {kind: ray.available_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}


def _warm_up(run: RLRun, client: RewardClient, row: dict[str, Any], *, is_gold: bool) -> None:
    """Let the service score one text, and shape its score: what cannot be is told before a worker starts.

    The first batch is slow too.
    """
    prompt = row["prompt"]
    try:
        result = client.score([prompt], [answer_to(prompt, "Yes.")], truncation=run.reward.truncation)
    except ScoreError as error:
        raise type(error)(
            f"[reward] the model {client.model or client.name!r} cannot score an answer to the first of "
            f"[prompts]: {error}"
        ) from error
    if not is_gold:
        column = run.shaping.calibrate_column
        named = None if column is None or column not in row else [row[column]]
        shaper = Shaper(dataclasses.replace(run.shaping, normalize=False))
        shaper.shape(result, lengths=[1], datasets=named)
    logger.info("the reward %s answers: version %s", client.__name__, result.version)


def _fit(job: PolicyJob) -> None:
    """Run the ranks; what one of them raised comes back as it was."""
    from ray.train import LoggingConfig, RunConfig, ScalingConfig

    scaling, settings = ray_train_settings(job.run.cluster)
    output_dir = job.run.output_dir
    forget_error(output_dir)
    of_workers = None
    if scaling is not None:
        of_workers = RunConfig(
            name=output_dir.name,
            storage_path=str(output_dir.parent),
            failure_config=settings.failure_config,
            logging_config=LoggingConfig(log_level="WARNING"),
        )
    trainer = trainer_class()(
        _run_rank,
        train_loop_config={"job": job},
        scaling_config=scaling or ScalingConfig(num_workers=0),
        run_config=of_workers,
    )
    try:
        # Ray Train's own handler does nothing once its workers are gone.
        with _plain_print(), keeping_handlers(signal.SIGINT):
            trainer.fit()
    except SystemExit as ended:
        raise KeyboardInterrupt from ended  # Ray Train's own answer to Ctrl-C: it has stopped the workers
    except Exception as failure:
        raise (left_error(output_dir) or _told(failure, output_dir)) from failure
    else:
        if (error := left_error(output_dir)) is not None:
            raise error
    finally:
        forget_error(output_dir)


@contextmanager
def _plain_print() -> Iterator[None]:
    """Ray Train's workers of the block print as Python does.

    Ray Train's own `print` goes past whoever catches stdout, as `datasets` does when it hashes a function:
    the log would hold that function's bytecode.
    """
    if _PRINT_PATCH in os.environ:
        yield
        return
    os.environ[_PRINT_PATCH] = "0"
    try:
        yield
    finally:
        del os.environ[_PRINT_PATCH]


def _told(failure: Exception, output_dir: Path) -> Exception:
    from ray.train import TrainingFailedError

    if not isinstance(failure, TrainingFailedError):
        return failure
    return training_failed(
        failure,
        output_dir,
        "with `save_strategy` and `save_steps` in the run file the same command goes on from the last "
        "checkpoint.",
    )


def _run_rank(config: dict[str, Any]) -> None:
    """What every Ray Train worker (or this process, in local mode) runs."""
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    show_logs(logging.INFO if first else logging.WARNING)
    # TRL's own code meets names that transformers renames, and torch its own collectives.
    warnings.filterwarnings("ignore", category=FutureWarning)
    job: PolicyJob = config["job"]
    if left_error(job.run.output_dir) is not None:
        return
    try:
        train_policy_rank(job)
    except PeerFailedError:
        raise  # the other rank leaves its own
    except RayrmError as error:
        leave_error(job.run.output_dir, error)
        raise
