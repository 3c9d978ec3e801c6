"""[RAY] A run file's `Run` -> a trained model.

What the command line, the jobs and the sweep share: `RewardTrainer` built from a `Run`, with the settings of
`[cluster]` as Ray Train's. A run that was cut off goes on by itself; one that is finished, or another's
directory, is refused. In a script use `RewardTrainer` itself: it takes objects where a run file has names.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrm.config import ClusterConfig, LoraConfig, SourceConfig
from rayrm.errors import MissingExtraError, RayrmError
from rayrm.logs import show_logs
from rayrm.own_ray import join_cluster, keeping_handlers
from rayrm.runfile import Run, dump_run, read_run
from rayrm.train.build import ModelSource, check_source
from rayrm.train.leg import Leg
from rayrm.train.preemption import leaving_before_training
from rayrm.train.rundir import finished, read_finished
from rayrm.train.train_data import check_sources
from rayrm.train.trainer import RewardTrainer
from rayrm.train.workers import check_cluster
from rayrm.urls import is_url

logger = logging.getLogger("rayrm.train")


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """A finished run: where its model is, its steps, and the last value of every logged metric."""

    output_dir: Path
    num_steps: int
    metrics: dict[str, float]


def train_run(
    run: Run,
    *,
    callbacks: Sequence[Any] = (),
    leg: Leg | None = None,
    finish: Callable[[Path], object] | None = None,
) -> TrainSummary:
    """Train what `run` says to the end; goes on where a run of the same settings was cut off.

    `callbacks`: Ray Train's `UserCallback`s, for runs with workers. `leg`: a sweep's asking to train a part
    only; it ends in PreemptedError, as where the run is told to leave. `finish` is called with the directory
    of the finished run, before its model is pushed.

    Raises:
        ConfigError, DataError, ModelError, RunDirectoryError, CheckpointError, ClusterError: refused before a
            worker starts, and nothing was overwritten.
        PreemptedError: told to leave (SIGTERM), while data is read too.
    """
    show_logs()
    run = with_absolute_paths(run)
    # What the files can tell is told before a cluster is started.
    output_dir = Path(run.reward.output_dir or "")
    if read_finished(output_dir) and _is_run_of(output_dir, run):
        raise finished(output_dir)
    adapter = None if run.model.lora is None else peft_settings(run.model.lora)
    check_source(ModelSource(run.model.name, adapter, run.model.quantization), run.reward)
    check_sources(run.data.train, run.data.eval)
    join_cluster(run.cluster.address)
    scaling, run_config = ray_train_settings(run.cluster, callbacks)
    with leaving_before_training(output_dir):
        if scaling is not None:
            check_cluster(scaling)
        trainer = RewardTrainer(
            run.model.name,
            run.reward,
            quantization_config=run.model.quantization,
            peft_config=adapter,
            scaling_config=scaling,
            run_config=run_config,
            data_config=run.data,
            auto_resume=True,
            run=run,
            leg=leg,
            finish=finish,
        )
    _train(trainer)
    metrics: dict[str, float] = {}
    for record in trainer.state.log_history:
        metrics |= record
    return TrainSummary(trainer.output_dir, trainer.state.global_step, metrics)


def _is_run_of(output_dir: Path, run: Run) -> bool:
    """Whether the directory's `run.toml` says the same; its token budget was decided at its start."""
    file = output_dir / "run.toml"
    if not file.is_file():
        return False
    before = read_run(file)
    reward = dataclasses.replace(
        before.reward, max_tokens_per_microbatch=run.reward.max_tokens_per_microbatch
    )
    # As both would be written: a file holds no credentials of the data's URLs.
    now = dataclasses.replace(before, model=run.model, data=run.data, reward=run.reward)
    return dump_run(dataclasses.replace(before, reward=reward)) == dump_run(now)


def _train(trainer: RewardTrainer) -> None:
    """Train; what ends the workers, and is no error of ours, ends with its last line and what to do."""
    from ray.train import TrainingFailedError

    try:
        # Ray Train's own handler, left behind, would end this process without a word.
        with keeping_handlers(signal.SIGINT):
            trainer.train()
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:
            raise  # the second one: Ray's own answer
        # Ray Train's own answer to Ctrl-C: it has stopped the workers.
        raise KeyboardInterrupt from ended
    except TrainingFailedError as failure:
        again = "type the same again to go on from the last checkpoint."
        raise training_failed(failure, trainer.output_dir, again) from failure


def training_failed(failure: Exception, output_dir: Path, again: str) -> RayrmError:
    """What ended the workers and is no error of ours: what they raised, and how to go on (`again`)."""
    told = (
        getattr(failure, "__notes__", None)
        or [line for line in str(failure).splitlines() if line.strip()][-1:]
    )
    return RayrmError(
        f"training in {output_dir} failed: {'; '.join(told)}. The workers' own messages stand above; {again}"
    )


def ray_train_settings(cluster: ClusterConfig, callbacks: Sequence[Any] = ()) -> tuple[Any, Any]:
    """`[cluster]` as Ray Train's `ScalingConfig` and `RunConfig`; (None, None) for training in process."""
    if cluster.num_workers == 0:
        return None, None
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    scaling = ScalingConfig(
        num_workers=cluster.num_workers,
        use_gpu=cluster.use_gpu,
        resources_per_worker=cluster.resources_per_worker,
    )
    failures = FailureConfig(max_failures=cluster.max_failures)
    return scaling, RunConfig(failure_config=failures, callbacks=list(callbacks) or None)


def peft_settings(lora: LoraConfig, task_type: str = "SEQ_CLS") -> Any:
    """`[model.lora]` as PEFT's configuration, of a sequence classifier unless `task_type` says otherwise."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("`model.lora` needs peft. Type: pip install peft") from error
    if lora.kind == "ia3":
        chosen = None if lora.target_modules == "all-linear" else lora.target_modules
        return peft.IA3Config(
            task_type=task_type,
            target_modules=chosen,
            feedforward_modules=None if chosen is None else lora.feedforward_modules,
            modules_to_save=lora.modules_to_save or None,
        )
    return peft.LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        bias=lora.bias,
        init_lora_weights=lora.init_lora_weights,
    )


def with_absolute_paths(run: Run) -> Run:
    """The run with every local path absolute: workers and trials have current directories of their own.

    A name that is no path here (a hub name) stays as it is.
    """
    reward = run.reward
    files: dict[str, Any] = {
        name: _absolute(value)
        for name in ("deepspeed", "chat_template_path", "resume_from_checkpoint")
        if isinstance(value := getattr(reward, name), str)
    }
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, name=_absolute(run.model.name)),
        data=dataclasses.replace(
            run.data,
            **{
                name: absolute_source(getattr(run.data, name))
                for name in ("train", "eval", "exclude_prompts_of")
            },
            token_cache=None
            if run.data.token_cache is None
            else str(Path(run.data.token_cache).expanduser().absolute()),
        ),
        reward=dataclasses.replace(
            reward, output_dir=str(Path(reward.output_dir or "").expanduser().absolute()), **files
        ),
    )


def absolute_source(source: Any) -> Any:
    """A source, several, or several by name, with each path that is one here absolute."""
    if isinstance(source, dict):
        return {name: absolute_source(one) for name, one in source.items()}
    if isinstance(source, list):
        return [absolute_source(one) for one in source]
    if isinstance(source, SourceConfig):
        return dataclasses.replace(source, path=absolute_source(source.path))
    return source if source is None else _absolute(source)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    is_path = path.exists() or (glob.has_magic(name) and not is_url(name))
    return str(path.absolute()) if is_path else name
