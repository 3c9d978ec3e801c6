"""[RAY] A run file's `Run` -> a trained model; a saved model and sources of pairs -> metrics.

What the command line, the jobs and the sweep share: `RewardTrainer` built from a `Run`, with the settings of
`[cluster]` as Ray Train's. A run that was cut off goes on by itself; one that is finished, or another's
directory, is refused. In a script use `RewardTrainer` itself: it takes objects where a run file has names.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.config import ClusterConfig, LoraConfig, RewardConfig, SourceConfig
from rayrm.data.ingest import ingest
from rayrm.data.labels import LabelRules
from rayrm.data.row_index import RowIndex
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ClusterError, ConfigError, DataError, MissingExtraError, RayrmError
from rayrm.logs import show_logs
from rayrm.metrics.evaluation import evaluate_scores
from rayrm.model.attribute_head import attribute_head_of
from rayrm.model.reward_model import LoadedModel, load_saved
from rayrm.objective import OBJECTIVE_SETTINGS, Objective, PointwiseLoss
from rayrm.own_ray import ensure_ray, keeping_handlers
from rayrm.runfile import Run, dump_run, read_run
from rayrm.train.attributes import reopen_attributes
from rayrm.train.build import ModelSource, check_source
from rayrm.train.evaluation import Scores, score_model
from rayrm.train.leg import Leg
from rayrm.train.preemption import leaving_before_training
from rayrm.train.rundir import finished, read_finished
from rayrm.train.train_data import check_sources
from rayrm.train.trainer import RewardTrainer
from rayrm.train.workers import check_cluster
from rayrm.urls import is_url, masked

logger = logging.getLogger("rayrm.train")


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """A finished run: where its model is, its steps, and the last value of every logged metric."""

    output_dir: Path
    num_steps: int
    metrics: dict[str, float]


def train_run(run: Run, *, callbacks: Sequence[Any] = (), leg: Leg | None = None) -> TrainSummary:
    """Train what `run` says to the end; goes on where a run of the same settings was cut off.

    `callbacks`: Ray Train's `UserCallback`s, for runs with workers. `leg`: a sweep's asking to train a part
    only; it ends in PreemptedError, as where the run is told to leave.

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


def join_cluster(address: str | None) -> None:
    """Connect to the cluster at `address`, or `RAY_ADDRESS`; without one, start Ray on this machine."""
    try:
        ensure_ray(address)
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster lets us in at {address or 'RAY_ADDRESS'}: {error}. Start one with `ray start "
            "--head`, or leave `cluster.address` and RAY_ADDRESS out to run on this machine alone."
        ) from error


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


def evaluate_model(
    model: str | Path,
    sources: Sequence[Any],
    *,
    max_pairs: int | None = None,
    max_bad_row_fraction: float = 0.01,
    on_progress: Callable[[str, int, int], None] | None = None,
    objective: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of a saved model on each source, by the source's name, and on "all" where there are several.

    They are those of the run that trained it: its objective is kept with the model (`rayrm.json`), and is
    TRL's where nothing is. A model trained without a loss of scores is measured against them as
    `pointwise_loss` "mse" trains. Ratings by attribute are measured where the model has their heads
    (`attributes/heads.safetensors`).

    Args:
        objective: settings of `RewardConfig` (`OBJECTIVE_SETTINGS`) to take instead of the model's own.
        max_pairs: read only the first rows of each source, this many. A pair beyond the model's position
            limit is left out and counted, as in training.
        on_progress: called with (source, rows done, rows in all).

    Raises:
        ModelError: no saved reward model. DataError: a source that is missing, bad, or of the other text
            form than the model. ConfigError: settings that are no objective.
    """
    show_logs()
    if not sources:
        raise DataError("there is nothing to evaluate on. Give at least one path, glob or hub name.")
    loaded = load_saved(model)
    reopen_attributes(loaded.model, Path(model))
    chosen = objective_of(loaded, objective or {})
    metrics: dict[str, dict[str, float]] = {}
    parts: list[_ScoredSet] = []
    for source in sources:
        name = masked(str(source))
        rows = _ingest_for(loaded, source, name, max_pairs, max_bad_row_fraction, chosen)
        scored = _score(loaded, rows, name, on_progress)
        metrics[name] = _metrics([scored], chosen)
        parts.append(scored)
    if len(parts) > 1:
        metrics["all"] = _metrics(parts, chosen)
    return metrics


def objective_of(loaded: LoadedModel, asked: Mapping[str, Any]) -> Objective:
    """What a loaded model is measured by: its own objective, with the settings `asked` over it.

    Raises ConfigError for settings that are none of an objective, or no objective together.
    """
    # Attributes are those that the model has heads of: a published one has none.
    heads = ("attributes", "attribute_weight")
    names = [name for name in OBJECTIVE_SETTINGS if name not in heads]
    settings = {name: value for name, value in loaded.objective.items() if name not in heads} | dict(asked)
    if "tie_model" in asked and "tie_parameter" not in asked:
        settings.pop("tie_parameter", None)  # of the model's own way with ties
    if unknown := sorted(set(settings) - set(names)):
        raise ConfigError(f"`{unknown[0]}` is no setting to evaluate by. Type one of {', '.join(names)}.")
    chosen = Objective.of(RewardConfig(bf16=False, **settings))
    # Scores of completions are measured, whatever the model was trained on.
    pointwise: PointwiseLoss = "mse" if chosen.pointwise_loss == "none" else chosen.pointwise_loss
    head = attribute_head_of(loaded.model)
    if head is None:
        return dataclasses.replace(chosen, pointwise_loss=pointwise)
    weight = float(loaded.objective.get("attribute_weight", Objective().attribute_weight))
    return dataclasses.replace(
        chosen, pointwise_loss=pointwise, attributes=head.names, attribute_weight=weight
    )


@dataclass(frozen=True, slots=True)
class _ScoredSet:
    index: RowIndex
    scores: Scores


def _ingest_for(
    loaded: LoadedModel,
    source: Any,
    name: str,
    max_pairs: int | None,
    max_bad_row_fraction: float,
    objective: Objective,
) -> TokenizedSet:
    rows = ingest(
        source,
        loaded.tokenizer,
        max_length=loaded.max_positions,
        max_rows=max_pairs,
        max_bad_row_fraction=max_bad_row_fraction,
        name=name,
        labels=LabelRules.of(objective),
    )
    form = rows.report.text_form
    if form not in (loaded.text_form, "tokenized"):
        raise DataError(
            f"{name} is {form} and the model was trained on {loaded.text_form} text: its scores would mean "
            "nothing. Evaluate on rows of "
            + ("message lists." if loaded.text_form == "conversational" else "plain strings.")
        )
    return rows


def _score(
    loaded: LoadedModel, rows: TokenizedSet, name: str, on_progress: Callable[[str, int, int], None] | None
) -> _ScoredSet:
    def progress(done: int) -> None:
        if on_progress is not None:
            on_progress(name, done, rows.num_rows)

    # Scores are float32's, as those of `RewardModel` and of the service are.
    config = RewardConfig(bf16=False)
    return _ScoredSet(rows.index, score_model(loaded.model, rows, config, on_progress=progress))


def _metrics(parts: Sequence[_ScoredSet], objective: Objective) -> dict[str, float]:
    scores = np.concatenate([part.scores for part in parts])
    index = RowIndex.joined([part.index for part in parts])
    return evaluate_scores(scores, index, objective)
