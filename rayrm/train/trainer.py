"""`RewardTrainer`: TRL's signature, in this process or on Ray Train workers.

Without a `scaling_config` training runs here, through Ray Train's local mode, and a model object is updated
in place. With workers, every argument must pickle, and `trainer.model` loads the result when it is asked for.
Everything that can be refused is refused in the constructor, before a worker starts.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState, set_seed
from transformers.trainer_utils import PredictionOutput, TrainOutput

from rayrm.config import DataConfig, ModelConfig, RewardConfig
from rayrm.data.quarantine import quarantine_aside, replace_refusals
from rayrm.data.selection import selections
from rayrm.data.stream_steps import StreamedSteps
from rayrm.data.streaming import StreamSource
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, DataError, RayrmError
from rayrm.logs import show_logs
from rayrm.metrics.attributes import rewards_of
from rayrm.model.adapters import is_adapted
from rayrm.model.reward_model import load_saved
from rayrm.model.saving import FACTS, TextForm, copy_saved, save_model
from rayrm.objective import Objective
from rayrm.train.attributes import reopen_attributes
from rayrm.train.budget import given_budget
from rayrm.train.build import ModelSource, build_model, check_source
from rayrm.train.callbacks import CallbackArgs, call_all, check_callbacks
from rayrm.train.display import Display
from rayrm.train.environment import environment_of
from rayrm.train.evaluation import Scores, score_model, speed_of
from rayrm.train.evaluation_record import set_metrics
from rayrm.train.given import (
    absolute,
    check_places,
    check_tokens,
    check_types,
    resolved_args,
    tokenizer_of,
    warn_of_old_columns,
    with_collator,
)
from rayrm.train.hub import repository_of
from rayrm.train.job import TrainJob
from rayrm.train.leg import MAY_CHANGE, Leg
from rayrm.train.optimizer import check_holds, check_optimizers, made_of
from rayrm.train.preemption import leaving_before_training
from rayrm.train.rank import Rank
from rayrm.train.run_data import RunData, check_form
from rayrm.train.rundir import Resume, RunStart, bring, check_resume, claim, examine, identity_of, only_run
from rayrm.train.script_calls import ScriptCalls
from rayrm.train.script_words import Rows, check_overrides
from rayrm.train.sequence import check_workers
from rayrm.train.train_data import check_sets, choose_mode, identity_of_data, steps_for
from rayrm.train.trainer_state import TRAINER_STATE
from rayrm.train.user_metrics import prefixed, user_metrics
from rayrm.train.workers import check_cluster, check_pickles, check_run_config, fit_here, fit_on_workers

logger = logging.getLogger("rayrm.train")


class RewardTrainer(ScriptCalls):
    """Train a reward model on preference pairs with the Bradley-Terry objective.

    Positional arguments are TRL's, in TRL's order. Datasets: `datasets.Dataset`, `IterableDataset`, dicts of
    them for evaluation, `ray.data.Dataset`, a path, glob or hub name, a list of rows.

    Args:
        scaling_config: `ray.train.ScalingConfig`; None trains in this process.
        run_config: `ray.train.RunConfig` of failures, callbacks, runtime environment and logging (Ray's
            default, which shows every report, stands for ours).
        data_config: `DataConfig`: sources by name (where no dataset is passed), and how data is read.
        auto_resume: a run that was cut off goes on without `resume_from_checkpoint`.

    Raises:
        ConfigError, DataError, ModelError, RunDirectoryError, ClusterError: each says what to type.
    """

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        scaling_config: Any = None,
        run_config: Any = None,
        data_config: DataConfig | None = None,
        auto_resume: bool = False,
        run: Any = None,
        leg: Leg | None = None,
        finish: Callable[[Path], object] | None = None,
    ) -> None:
        show_logs()
        self._data = data_config or DataConfig()
        train_dataset = self._data.train if train_dataset is None else train_dataset
        eval_dataset = self._data.eval if eval_dataset is None else eval_dataset
        if train_dataset is None:
            raise DataError("`train_dataset` is required. Pass a dataset, a path, or a list of rows.")
        self._source = ModelSource(absolute(model), peft_config, quantization_config)
        check_types(self._source.model, args, scaling_config)
        warn_of_old_columns((train_dataset, eval_dataset))
        self.args = resolved_args(args, self._source, train_dataset)
        self.output_dir = Path(self.args.output_dir or "trainer_output").expanduser().absolute()
        self._scaling, self._run_config, self._run, self._leg = scaling_config, run_config, run, leg
        self._auto_resume, self._optimizer, self._finish = auto_resume, optimizer_cls_and_kwargs, finish
        self._callbacks = check_callbacks(callbacks or [])
        self._metrics = user_metrics(compute_metrics, preprocess_logits_for_metrics, self.args)
        self.num_workers = 0 if scaling_config is None else int(scaling_config.num_workers or 0)
        check_workers(self.args, self.num_workers)
        check_overrides(type(self), RewardTrainer, self.args)
        given = (optimizers, optimizer_cls_and_kwargs, self.args)
        self._optimizers = check_optimizers(
            *given, num_workers=self.num_workers, has_adapter=peft_config is not None
        )
        check_run_config(run_config, self.num_workers)
        self._mode = choose_mode(self._data, train_dataset, self.args)
        check_source(self._source, self.args)
        self._adapter = self._source.adapter
        self.processing_class, added = tokenizer_of(processing_class, self._source, self.args)
        self._source = dataclasses.replace(self._source, new_tokens=added)
        check_tokens(self._source, self.args, self.processing_class, scaling_config)
        self.args = with_collator(self.args, data_collator, self.processing_class)
        check_places(self.args, self.output_dir)
        # Aside until the output directory is this run's; see `_claim`.
        self._sets = RunData(self.processing_class, self.args, self._data, quarantine_aside(self))
        check_resume(self.args.resume_from_checkpoint)
        check_sets(self._data, self.args, train_dataset, eval_dataset)
        for_training, for_evaluation = selections(self._data)
        self.train_set = self._sets.training(train_dataset, for_training, self._mode)
        self.eval_sets = (
            self._sets.held_out(train_dataset, for_evaluation)
            if self._data.eval_fraction
            else self._sets.evaluation(eval_dataset)
        )
        self.text_form: TextForm = self._sets.text_form(self.train_set, self.eval_sets)
        if self.num_workers:
            check_pickles(self._sent())
            check_cluster(scaling_config)
        self._hub = repository_of(self.args, self.output_dir)
        self.state = TrainerState()
        self._model: torch.nn.Module | None = None
        if self.num_workers == 0:
            set_seed(self.args.seed)
            built = build_model(self._source, self.args, self.processing_class)
            self._model = built.to(Rank.here(use_cpu=self.args.use_cpu).device)
            if self._optimizers is not None:
                check_holds(self._optimizers[0], self._model)
        self._call("on_init_end")

    @property
    def model(self) -> Any:
        """The model: in this process the one that trains, with workers the result, loaded on first use."""
        if self._model is None:
            if (
                not (self.output_dir / "config.json").exists()
                and not (self.output_dir / "adapter_config.json").exists()
            ):
                raise RayrmError(
                    "the workers hold the model; call `train()` first, and `model` loads its result. Leave "
                    "`scaling_config` out to look at a model before it is trained."
                )
            trusts = self.args.trust_remote_code
            self._model = load_saved(self.output_dir, trust_remote_code=trusts).model
            reopen_attributes(self._model, self.output_dir)
        return self._model

    def train(
        self,
        resume_from_checkpoint: Resume = None,
        trial: None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the end of the schedule; the model is saved in `output_dir`.

        `resume_from_checkpoint`: True for the newest checkpoint of `output_dir`, or a checkpoint's path.
        `ignore_keys_for_eval`: outputs of the model to leave out; of all only the scores are kept anyway.
        """
        if trial is not None:
            raise ConfigError("`trial` is not supported: for a search type `rayrm sweep`, or use Ray Tune.")
        with only_run(self.output_dir):
            resume = resume_from_checkpoint
            with leaving_before_training(self.output_dir):
                start = self._claim(self.args.resume_from_checkpoint if resume is None else resume)
            steps = steps_for(
                self.train_set,
                self.args,
                self._data,
                num_workers=self.num_workers,
                quarantine_path=self._sets.quarantine,
            )
            with steps as train_set, Display(self.output_dir, bar=not self.args.disable_tqdm):
                job = self._job(start, train_set)
                if self.num_workers == 0:
                    fit_here(job)
                else:
                    fit_on_workers(job, self._scaling, self._run_config)
                    self._model = None
        self.state = TrainerState.load_from_json(str(self.output_dir / TRAINER_STATE))
        summary = self.state.log_history[-1]
        if self._finish is not None:
            self._finish(self.output_dir)
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(self.state.global_step, summary["train_loss"], summary)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the evaluation set(s), exact over all pairs, with TRL's names under the prefix.

        `eval_dataset`: as the constructor's, or the name of one of its sets. `ignore_keys`: outputs of the
        model to leave out; of all only the scores are kept anyway.
        """
        if isinstance(eval_dataset, str) and eval_dataset in self.eval_sets:
            sets = {eval_dataset: self.eval_sets[eval_dataset]}
        else:
            sets = self.eval_sets if eval_dataset is None else self._sets.evaluation(eval_dataset)
        if not sets:
            raise DataError("`eval_dataset` is required: pass it here or to the trainer.")
        metrics: dict[str, float] = {}
        for name, rows in sets.items():
            prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            found = self._scored(rows, prefix)[1]
            found |= {f"{prefix}num_tokens": self.state.num_input_tokens_seen, "epoch": self.state.epoch}
            self.state.log_history.append({**found, "step": self.state.global_step})
            self._call("on_log", logs=dict(found))
            self._call("on_evaluate", metrics=found)
            metrics |= found
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Scores of rows, `predictions` `[R, K]`, and their metrics.

        A row's scores stand in its own order, a pair's as (chosen, rejected). Where rows have different
        numbers of completions, the shorter ones end in NaN.
        """
        rows = self._sets.ingest(test_dataset, metric_key_prefix, None)
        scores, metrics = self._scored(rows, f"{metric_key_prefix}_")
        counts = rows.index.num_completions
        predictions = np.full((rows.num_rows, counts.max()), np.nan)
        predictions[np.arange(counts.max()) < counts[:, None]] = scores
        self._call("on_predict", metrics=metrics)
        return PredictionOutput(predictions=predictions, label_ids=None, metrics=metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer as transformers does, in `output_dir` or the run's directory."""
        directory = Path(output_dir).expanduser().absolute() if output_dir else self.output_dir
        with self._writing(directory):
            if self.num_workers and (self.output_dir / FACTS).exists():
                copy_saved(self.output_dir, directory)
            else:
                model = self.model
                if self.args.merge_on_save and is_adapted(model):
                    model = copy.deepcopy(model).merge_and_unload()
                save_model(
                    model,
                    self.processing_class,
                    directory,
                    text_form=self.text_form,
                    objective=Objective.of(self.args).settings,
                )
        if self.args.push_to_hub and not _internal_call:
            self._hub.push(directory, "Model save")

    @property
    def train_dataset(self) -> Any:
        """The rows that are trained on, as TRL tokenizes them; of a stream its source."""
        return Rows(self.train_set) if isinstance(self.train_set, TokenizedSet) else self.train_set

    @property
    def eval_dataset(self) -> Any:
        """The evaluation rows, or by name those of several sets; None without any."""
        found = {name: Rows(rows) for name, rows in self.eval_sets.items()}
        return found.get("", found or None)

    def _call(self, event: str, **given: Any) -> None:
        args = CallbackArgs(self.args, Rank.here(use_cpu=self.args.use_cpu))
        given |= {"model": self._model, "processing_class": self.processing_class}
        call_all(self._callbacks, event, args, self.state, **given)

    def _scored(self, rows: TokenizedSet, prefix: str) -> tuple[Scores, dict[str, float]]:
        """The scores of all completions, and their metrics."""
        check_form(rows, self.text_form)
        began = time.time()
        scores = score_model(self.model, rows, self.args)
        found = set_metrics(scores, rows.index, Objective.of(self.args))
        if self._metrics is not None:
            found |= self._metrics.of(rewards_of(scores), rows.index)
        speed = speed_of(prefix, began, rows.num_rows, self.args.per_device_eval_batch_size)
        return rewards_of(scores), prefixed(prefix, found) | speed

    def _sent(self) -> dict[str, Any]:
        """Whatever of the arguments workers are given, by name."""
        callbacks = {f"callbacks[{place}]": one for place, one in enumerate(self._callbacks)}
        return {
            "model": self._source.model,
            "processing_class": self.processing_class,
            "optimizer_cls_and_kwargs": self._optimizer,
            "compute_metrics": self._metrics,
            **callbacks,
        }

    def _claim(self, resume: Resume) -> RunStart:
        """Check the output directory and the token budget, and make the directory this run's."""
        rows_per_step = self.args.train_batch_rows(self.num_workers)
        num_rows = self.train_set.sample.rows_per_epoch
        streams = isinstance(self.train_set, StreamSource)
        if self.args.dataloader_drop_last and not streams and rows_per_step > num_rows:
            raise ConfigError(
                f"`dataloader_drop_last` (True) leaves no step: a step takes {rows_per_step} rows and there "
                f"are {num_rows}. Lower `per_device_train_batch_size`, or set it to False."
            )
        identity = identity_of(
            self.args,
            model=self._source.name,
            adapter=self._adapter,
            quantization=self._source.quantization,
            data=identity_of_data(self.train_set, self._data),
            rows_per_step=rows_per_step,
            optimizer=self._optimizer or made_of(self._optimizers),
        )
        asked: dict[str, Any] = {"resume": resume, "automatic": self._auto_resume}
        bring(self.args, self.output_dir, identity, **asked)
        free = frozenset() if self._leg is None else MAY_CHANGE
        start = examine(self.output_dir, identity, **asked, may_differ=free, own=self._own)
        longest = int(self.train_set.sample.index.tokens(share=self.args.share_prefix).max())
        budget = given_budget(self.args, longest) or start.max_tokens
        claim(self.output_dir, identity, budget, self._run_toml(budget), start.origin, self._leg is None)
        kept = self.output_dir / "quarantine.jsonl"
        if self._sets.quarantine != kept and self._sets.quarantine.exists():
            streamed = self.train_set.names if isinstance(self.train_set, StreamSource) else []
            replace_refusals(self._sets.quarantine, kept, streamed)
            self._sets.quarantine.parent.rmdir()
        self._sets.quarantine = kept
        return RunStart(start.resume, budget)

    def _run_toml(self, budget: int | None) -> str:
        from rayrm.config import ClusterConfig
        from rayrm.runfile import Run, dump_run

        run = self._run or Run(
            model=ModelConfig(self._source.name),
            data=dataclasses.replace(
                self._data, train=f"in memory, sha256 {self.train_set.report.fingerprint}"
            ),
            cluster=ClusterConfig(num_workers=self.num_workers),
        )
        reward = dataclasses.replace(self.args, max_tokens_per_microbatch=budget)
        return dump_run(dataclasses.replace(run, reward=reward))

    def _job(self, start: RunStart, train_set: TokenizedSet | StreamedSteps) -> TrainJob:
        return TrainJob(
            config=self.args,
            source=self._source,
            built=self._model if self.num_workers == 0 else None,
            tokenizer=self.processing_class,
            text_form=self.text_form,
            train_set=train_set,
            eval_sets=dict(self.eval_sets),
            output_dir=self.output_dir,
            max_tokens=start.max_tokens,
            resume=start.resume,
            optimizer=self._optimizer,
            optimizers=self._optimizers,
            metrics=self._metrics,
            callbacks=tuple(self._callbacks),
            environment=environment_of(self.args),
            leg=self._leg,
        )
