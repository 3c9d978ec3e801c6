"""What a run is told: `RewardConfig` (TRL's names, meanings and defaults), model, data, cluster and service.

Every field is documented once, under the field. Values are coerced and checked when a config is made or a
field is assigned; an unknown, contradictory or unsupported setting is a `ConfigError` that says what to type.
Importing this module loads neither torch nor ray nor transformers.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayrm.data_settings import DataConfig, SourceConfig
from rayrm.model_settings import LoraConfig, ModelConfig, QuantizationConfig
from rayrm.objective import PointwiseLoss, RankingLoss, TieModel
from rayrm.rules import SAME, adopt_trl_names, check_reward_config, parse_optim_args, resolve_defaults
from rayrm.serve_settings import ServeConfig
from rayrm.settings import (
    Count,
    Decay,
    Fraction,
    NameList,
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalBool,
    OptionalCount,
    OptionalNonNegativeFloat,
    OptionalSeed,
    OptionalTable,
    OptionalTableOrPath,
    Seed,
    none_word,
    settings,
    switch_word,
)
from rayrm.unsupported import NOT_HONOURED

__all__ = [
    "ClusterConfig",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "QuantizationConfig",
    "RewardConfig",
    "ServeConfig",
    "SourceConfig",
]

Strategy = Literal["no", "steps", "epoch"]
SaveStrategy = Literal["no", "steps", "epoch", "best"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


def _also(name: str) -> dict[str, list[str]]:
    """Another name of a field on the command lines of transformers' `HfArgumentParser`."""
    return {"aliases": [f"--{name}", f"--{name.replace('_', '-')}"]}


@settings
class RewardConfig:
    """How a reward model is trained: TRL's `RewardConfig`, and our own settings at the end."""

    output_dir: str | None = None
    """The run's directory, `~` expanded. None: `trainer_output`."""
    _: KW_ONLY

    # The model.
    model_init_kwargs: OptionalTable = None
    """Arguments of `AutoModelForSequenceClassification.from_pretrained` for a model given by name."""
    trust_remote_code: bool = False
    """Allow models and tokenizers that ship their own Python code."""
    chat_template_path: str | None = None
    """A `.jinja` file, or a tokenizer whose chat template is taken over."""
    disable_dropout: bool = True
    """Set every dropout to zero: the model's, its configuration's, an adapter's (`model.lora.dropout`)."""

    # The data.
    dataset_num_proc: OptionalCount = None
    """At most this many parallel tokenizing tasks. None: as many as the cluster has CPUs."""
    eos_token: str | None = None
    """The token that ends a standard text. None: the tokenizer's own."""
    pad_token: str | None = None
    """The token for padding. None: the tokenizer's own, else its EOS token."""
    max_length: OptionalCount = 1024
    """Pairs with a longer side, in tokens, are left out and counted. None: no limit."""
    pad_to_multiple_of: int | str | None = "auto"
    """On the padded path, pad lengths to a multiple of this. "auto" and None: to the longest side."""
    dataloader_drop_last: bool = False
    """Leave out the last, short step of an epoch."""
    train_sampling_strategy: Literal["random", "sequential"] = "random"
    """"sequential": the data's own order, as `shuffle=False`."""
    remove_unused_columns: bool = True
    """Either value means the same: only the columns a pair is made of are read."""

    # The optimizer's steps.
    per_device_train_batch_size: Count = 8
    """Pairs a worker takes for one optimizer step, per accumulation."""
    gradient_accumulation_steps: Count = 1
    """Pairs per step = this x `per_device_train_batch_size` x workers. It does not set memory."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the data; a fraction ends within a pass."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Optimizer steps; -1: as many as `num_train_epochs` gives."""
    learning_rate: NonNegativeFloat = 1e-4
    """The highest learning rate."""
    lr_scheduler_type: Scheduler = "linear"
    """The learning rate's course, as in `transformers.get_scheduler`."""
    lr_scheduler_kwargs: OptionalTable = None
    """Further arguments of that schedule."""
    warmup_steps: NonNegativeFloat = 0.0
    """Steps over which the learning rate rises; below 1, a share of all steps."""
    optim: Optimizer = "adamw_torch_fused"
    """The optimizer. With DeepSpeed it is used as DeepSpeed's client optimizer."""
    optim_args: str | None = None
    """Options of sgd, adagrad and rmsprop: "momentum=0.9, nesterov=true"."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay (AdamW) of all parameters but biases and norms."""
    adam_beta1: Decay = 0.9
    """AdamW's decay of the mean."""
    adam_beta2: Decay = 0.999
    """AdamW's decay of the mean square."""
    adam_epsilon: NonNegativeFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    center_rewards_coefficient: OptionalNonNegativeFloat = None
    """Adds this x (chosen + rejected)^2 to the loss, which centres rewards on zero; 0.01 is usual."""
    seed: Seed = 42
    """Seeds the new head, dropout and (through `data_seed`) the order of the data."""
    data_seed: OptionalSeed = None
    """Seeds the order of the data. None: `seed`."""

    # Precision, memory, device.
    bf16: OptionalBool = None
    """bf16 autocast over fp32 parameters; fp32 on hardware without fast bf16. None: True unless `fp16`."""
    fp16: bool = False
    """fp16 autocast over fp32 parameters with loss scaling; GPUs only."""
    gradient_checkpointing: bool = dataclasses.field(default=True, metadata=_also("activation_checkpointing"))
    """Recompute activations in the backward pass: less memory, more time."""
    gradient_checkpointing_kwargs: OptionalTable = dataclasses.field(
        default=None, metadata=_also("activation_checkpointing_kwargs")
    )
    """Arguments of `torch.utils.checkpoint`. `use_reentrant` unset: True for an adapter under ZeRO-3, as in
    TRL, else False."""
    activation_offloading: bool = False
    """Keep what the backward pass needs in the host's memory until then: less of the GPU's, more time."""
    deepspeed: OptionalTableOrPath = None
    """A DeepSpeed configuration: a table, or a JSON file's path. `zero_stage` is the short form. What a field
    here says too must be equal there, absent or "auto"."""
    use_cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    # Logging.
    logging_strategy: Strategy = "steps"
    """When to log: every `logging_steps`, every epoch, or not."""
    logging_steps: NonNegativeFloat = 10
    """Steps between logs, over which metrics are averaged; below 1, a share of all steps."""
    logging_first_step: bool = False
    """Log step 1 too."""
    report_to: Names = "none"
    """"tensorboard", "wandb", "mlflow", "trackio", "none", or a list. `metrics.jsonl` is always written."""
    project: str = "huggingface"
    """The project of wandb (unless WANDB_PROJECT is set) and of trackio that the run is shown in."""
    run_name: str | None = None
    """The run's name in reports. None: the last part of `output_dir`."""
    disable_tqdm: OptionalBool = None
    """No progress bar. None: False."""

    # Evaluation.
    per_device_eval_batch_size: Count = 8
    """Sets only the order in which `compute_metrics` gets the scores, as in TRL: evaluation goes by
    `max_tokens_per_microbatch`, and our metrics depend on neither."""
    eval_strategy: Strategy = "no"
    """When to evaluate: every `eval_steps`, every epoch, or not."""
    eval_steps: OptionalNonNegativeFloat = None
    """Steps between evaluations; below 1, a share of all steps. None: `logging_steps`."""
    eval_delay: NonNegativeFloat = 0.0
    """No evaluation before this many steps, or epochs, as `eval_strategy` counts."""
    eval_on_start: bool = False
    """Evaluate before the first step too."""

    # Checkpoints.
    save_strategy: SaveStrategy = "steps"
    """When to write a checkpoint: every `save_steps`, every epoch, after each evaluation that is the best so
    far ("best"), or not."""
    save_steps: NonNegativeFloat = 500
    """Steps between checkpoints; below 1, a share of all steps."""
    save_total_limit: OptionalCount = None
    """Keep this many checkpoints, the newest (and the best, with `load_best_model_at_end`). None: all."""
    merge_on_save: bool = False
    """Of an adapter, save at the end the whole model with the adapter added. Checkpoints hold the adapter."""
    load_best_model_at_end: bool = False
    """End with the checkpoint that is best by `metric_for_best_model`."""
    metric_for_best_model: str | None = None
    """An evaluation metric, with or without `eval_`. None: "loss", where one is needed."""
    greater_is_better: OptionalBool = None
    """Whether more of that metric is better. None: True unless it is an error: its name ends in "loss",
    "mse" or "brier", or is `attribute_mse_<name>`."""
    resume_from_checkpoint: Annotated[str | None, BeforeValidator(switch_word)] = None
    """A checkpoint's directory, or "true" (or True) for the newest in `output_dir`."""

    restore_callback_states_from_checkpoint: bool = False
    """Either value means the same: what callbacks keep (`ExportableState`) goes on where a run goes on, so
    that it ends as one that was not cut off."""

    # The hub.
    push_to_hub: bool = False
    """Upload the model to the Hugging Face hub: at the end, and as `hub_strategy` says."""
    hub_model_id: str | None = None
    """The repository there. None: named as `output_dir`, of your account."""
    hub_strategy: Literal["end", "every_save"] = "every_save"
    """"every_save": each checkpoint's model is uploaded too, beside the training."""
    hub_token: str | None = dataclasses.field(default=None, repr=False)
    """A token that may write there; never written to a file. None: that of `hf auth login` or `HF_TOKEN`."""
    hub_private_repo: OptionalBool = None
    """Make a new repository private. None: as your organization has it."""
    hub_revision: str | None = None
    """The branch to upload to, created where it is not there. None: main."""

    # For scripts.
    do_train: bool = False
    """For your script's own use, as in TRL: the trainer does not read it."""
    do_eval: bool = False
    """For your script's own use; True when `eval_strategy` is not "no"."""
    do_predict: bool = False
    """For your script's own use."""

    # Ours.
    max_tokens_per_microbatch: OptionalCount = None
    """Most tokens in one forward pass of a worker: sets memory, cannot change the loss. None: measured."""
    share_prefix: bool = True
    """Compute the tokens that both sides of a pair begin with once (causal decoders)."""
    shuffle: Annotated[bool | None, BeforeValidator(none_word)] = None
    """A new seeded order every epoch. False: the data's own order. None: shuffled, but an `IterableDataset`
    keeps its own, as in TRL."""
    zero_stage: Annotated[Annotated[int, Field(ge=0, le=3)] | None, BeforeValidator(none_word)] = None
    """DeepSpeed's ZeRO stage. None: plain PyTorch, gradients summed over workers."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The probability that a comparison's label is wrong: chosen wins with 1 - this, or with what `target`
    says, drawn as much towards the middle."""
    tie_model: TieModel = "none"
    """What rows of equal ranks, and pairs with `tie`, teach. "none": nothing, equal ranks are not compared.
    "rao-kupper", "davidson": the probability of a tie under that model."""
    tie_parameter: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(none_word)] = None
    """How often completions of equal reward tie: Rao and Kupper's theta (above 1; None: 3), Davidson's nu
    (above 0; None: 2)."""
    ranking_loss: RankingLoss = "pairwise"
    """What a ranking of three or more teaches. "pairwise": each of its comparisons. "plackett-luce": its
    order, as one choice after another."""
    pointwise_loss: PointwiseLoss = "none"
    """What a completion's own `score` teaches. "none": such rows are refused. "mse": the reward is the score.
    "bce": the score, from 0 to 1, is the probability that it is good, and the reward its logit."""
    attributes: NameList = dataclasses.field(default_factory=list)
    """What rows rate completions by (`attributes`, `chosen_attributes`, `rejected_attributes`): each gets a
    head that foretells its ratings, and the reward is the heads' mean under weights that are learned."""
    attribute_weight: Annotated[float, Field(gt=0)] = 1.0
    """The weight of the ratings' squared error beside the loss of comparisons."""
    sequence_parallel_size: Count = 1
    """Workers that compute each row together, every one a part of its tokens (DeepSpeed's Ulysses): for rows
    that are too long for one. It divides the workers, and deals a model's heads of attention to them."""
    zero_init: Annotated[bool | None, BeforeValidator(none_word)] = None
    """Under ZeRO stage 3, load the model in parts, so that no worker ever holds all of it. None: where whole
    copies would take more than half of a host's free memory."""
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """What an infinite or NaN loss does. "stop": ends the run and names the rows. "skip": leaves the step's
    update out and keeps those rows in `quarantine.jsonl`; it waits for the device in each step."""
    storage_path: str | None = None
    """An object store's directory (`s3://bucket/runs`) to which the run is copied, under the last part of
    `output_dir`: checkpoints, records, the model. A start without them in `output_dir` goes on from there."""
    log_rows: bool = False
    """Write which rows each step was trained on: `rows-<rank>.jsonl` in `output_dir`."""
    max_bad_row_fraction: Fraction = 0.01
    """The run fails when a larger share of a source's rows is refused (too long a pair is no bad row)."""

    def __post_init__(self) -> None:
        resolve_defaults(self)
        check_reward_config(self)

    @classmethod
    def __adopt_names__(cls, names: dict[str, Any]) -> dict[str, Any]:
        return adopt_trl_names(names, [field.name for field in dataclasses.fields(cls)])

    if not TYPE_CHECKING:  # a typed __getattr__ would hide misspelt names from type checkers

        def __getattr__(self, name: str) -> Any:
            if name in SAME:
                return getattr(self, SAME[name])
            if name in NOT_HONOURED:
                return NOT_HONOURED[name]
            raise AttributeError(f"RewardConfig has no setting `{name}`")

        def __setattr__(self, name: str, value: Any) -> None:
            names = {name: value}
            if name in SAME:
                names = {SAME[name]: value}
            self.__dict__.update(vars(dataclasses.replace(self, **names)))

    def warmup_steps_for(self, num_steps: int) -> int:
        """Warm-up steps of a run of `num_steps` steps."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(num_steps * self.warmup_steps)

    def train_batch_rows(self, num_workers: int) -> int:
        """Rows in one optimizer step of `num_workers` workers (0: in process, counts as 1)."""
        groups = max(1, num_workers // self.sequence_parallel_size)
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * groups

    def interval(self, of: Literal["logging", "eval", "save"], num_steps: int) -> int:
        """Steps between two events, a share resolved against the run's `num_steps`; at least 1."""
        every: dict[str, float | None] = {
            "logging": self.logging_steps,
            "eval": self.eval_steps,
            "save": self.save_steps,
        }
        steps: float = every[of] or self.logging_steps
        return int(steps) if steps >= 1 else max(1, math.ceil(num_steps * steps))

    def optimizer_options(self) -> dict[str, float | bool]:
        """`optim_args` as keyword arguments of the torch optimizer."""
        return parse_optim_args(self.optim, self.optim_args)


@settings
class ClusterConfig:
    """The workers that train."""

    num_workers: NonNegativeInt = 0
    """Ray Train workers. 0: train in this process, without Ray Train."""
    use_gpu: bool = False
    """One GPU for each worker."""
    resources_per_worker: Annotated[dict[str, NonNegativeFloat] | None, BeforeValidator(none_word)] = None
    """What Ray reserves for each worker: `{CPU = 4}`. None: one CPU, and one GPU with `use_gpu`."""
    max_failures: Annotated[int, Field(ge=-1)] = 0
    """How often lost workers are replaced and training goes on from the last checkpoint; -1: always."""
    address: str | None = None
    """The Ray cluster to join. None: the one `ray job submit` or `RAY_ADDRESS` names, else a local one."""

    def __post_init__(self) -> None:
        if self.use_gpu and self.num_workers == 0:
            raise ValueError(
                "`use_gpu` (True) is about Ray workers, and `num_workers` is 0: training in this process "
                "takes the GPU by itself. Type `cluster.num_workers=1`, or delete `use_gpu`."
            )
