"""`RewardConfig` means what TRL's means, refuses what it cannot honour, and says what to type."""

from __future__ import annotations

import ast
import copy
import dataclasses
import enum
import inspect
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rayrm.config
import rayrm.data_settings
import rayrm.model_settings
import rayrm.serve_settings
from rayrm.config import ClusterConfig, DataConfig, LoraConfig, ModelConfig, RewardConfig, ServeConfig
from rayrm.errors import ConfigError
from rayrm.rules import SAME
from rayrm.unsupported import GONE, INSTEAD, NOT_HONOURED, RENAMED

# transformers warns of its own alias while it resolves TRL's defaults.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")

OURS = {
    "max_tokens_per_microbatch",
    "share_prefix",
    "shuffle",
    "zero_stage",
    "label_smoothing",
    "tie_model",
    "tie_parameter",
    "ranking_loss",
    "pointwise_loss",
    "attributes",
    "attribute_weight",
    "sequence_parallel_size",
    "zero_init",
    "nonfinite_loss",
    "log_rows",
    "storage_path",
    "merge_on_save",
    "max_bad_row_fraction",
}
HONOURED = {field.name for field in dataclasses.fields(RewardConfig)}


def plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def trl_defaults() -> tuple[dict[str, Any], dict[str, Any]]:
    """The installed TRL's fields with their written defaults, and with those resolved on a CPU."""
    trl = pytest.importorskip("trl")
    fields = dataclasses.fields(trl.RewardConfig)
    written = {
        field.name: field.default_factory() if callable(field.default_factory) else plain(field.default)
        for field in fields
    }
    config = trl.RewardConfig(use_cpu=True)  # on a CPU, TRL refuses its own default of bf16 without it
    return written, {field.name: plain(getattr(config, field.name)) for field in fields}


def refusal(**names: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        RewardConfig(**names)
    return str(caught.value)


def test_every_trl_field_is_honoured_or_in_the_table_and_no_name_is_ours_but_the_listed() -> None:
    written, _ = trl_defaults()
    assert set(written) == (HONOURED - OURS) | set(NOT_HONOURED) | set(SAME)
    assert not HONOURED & (set(NOT_HONOURED) | set(SAME) | set(RENAMED))
    assert set(INSTEAD) == set(NOT_HONOURED)
    assert not set(GONE) & (set(written) | set(RENAMED) | OURS)


def test_the_table_holds_trls_default_of_every_name() -> None:
    written, _ = trl_defaults()
    assert {name: written[name] for name in NOT_HONOURED} == NOT_HONOURED


def test_every_honoured_default_resolves_as_trls() -> None:
    _, resolved = trl_defaults()
    ours = RewardConfig(use_cpu=True)
    differing = {
        name: (getattr(ours, name), resolved[name])
        for name in (HONOURED - OURS) | set(SAME)
        if getattr(ours, name) != resolved[name]
    }
    assert differing == {}


@pytest.mark.parametrize(
    ("metric", "less_is_better"),
    [
        ("loss", True),
        ("eval_helpful_loss", True),
        ("mse", True),
        ("eval_brier", True),
        ("eval_attribute_mse_good", True),
        ("eval_attribute_pearson_loss", False),
        ("eval_mse_accuracy", False),
        ("accuracy", False),
        ("pearson", False),
        ("tie_accuracy", False),
        ("top_accuracy", False),
        ("margin", False),
    ],
)
def test_the_best_model_by_an_error_is_the_one_with_less(metric: str, less_is_better: bool) -> None:
    from rayrm.train.checkpoint import TrainState
    from rayrm.train.evaluation import note_checkpoint, note_metric

    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    config, state = RewardConfig(metric_for_best_model=metric), TrainState()
    for step, value in enumerate((0.5, 0.2, 0.8, 0.4), start=1):
        state.step = step
        note_checkpoint(state, note_metric(state, {name: value}, config), config)
    assert (state.best_metric, state.best_checkpoint) == (
        (0.2, "checkpoint-2") if less_is_better else (0.8, "checkpoint-3")
    )
    # What is given stands, be it the contrary.
    assert RewardConfig(metric_for_best_model=metric, greater_is_better=less_is_better).greater_is_better is (
        less_is_better
    )


def test_several_trackers_may_be_one_word_of_a_command_line() -> None:
    assert RewardConfig(report_to="tensorboard, wandb").report_to == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    "given",
    [
        {"eval_strategy": "steps"},
        {"eval_strategy": "steps", "logging_steps": 0.1},
        {"eval_strategy": "steps", "eval_steps": 50.0, "save_steps": 100, "load_best_model_at_end": True},
        {"metric_for_best_model": "eval_accuracy"},
        {"metric_for_best_model": "eval_loss"},
        {"report_to": "tensorboard"},
        {"report_to": ["none"]},
        {"pad_to_multiple_of": "8"},
        {"gradient_checkpointing": False},
        {"activation_checkpointing": False},
        {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"output_dir": "~/somewhere"},
        {"lr_scheduler_kwargs": '{"num_cycles": 2}'},
        {"warmup_steps": 0.03},
    ],
    ids=str,
)
def test_what_follows_from_a_setting_follows_as_in_trl(given: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl")
    theirs = trl.RewardConfig(use_cpu=True, **copy.deepcopy(given))
    ours = RewardConfig(use_cpu=True, **given)
    for name in (HONOURED - OURS) | set(SAME):
        assert getattr(ours, name) == plain(getattr(theirs, name)), name
    for num_steps in (1, 7, 1000):
        assert ours.warmup_steps_for(num_steps) == theirs.get_warmup_steps(num_steps)


def test_transformers_enumerations_are_accepted_by_value() -> None:
    transformers = pytest.importorskip("transformers")
    config = RewardConfig(
        lr_scheduler_type=transformers.SchedulerType.COSINE,
        hub_strategy=transformers.trainer_utils.HubStrategy.EVERY_SAVE,
    )
    assert config.lr_scheduler_type == "cosine"


def test_scalars_on_a_transformers_command_line_are_parsed() -> None:
    transformers = pytest.importorskip("transformers")
    words = ["--output_dir", "x", "--learning_rate", "2e-6", "--max_length", "32", "--bf16", "false"]
    (config,) = transformers.HfArgumentParser(RewardConfig).parse_args_into_dataclasses(words)
    assert config == RewardConfig("x", learning_rate=2e-6, max_length=32, bf16=False)


TABLES = {
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "model_init_kwargs": {"dtype": "float32", "num_hidden_layers": 2},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "deepspeed": {"zero_optimization": {"stage": 2}},
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_on_a_transformers_command_line_are_json(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    parser = transformers.HfArgumentParser(RewardConfig)
    (config,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "x", f"--{name}", json.dumps(TABLES[name])]
    )
    assert config == RewardConfig("x", **{name: TABLES[name]})
    assert getattr(config, name) == TABLES[name]
    (config,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--activation-checkpointing", "no"])
    assert not config.gradient_checkpointing


def test_what_is_no_table_is_refused_with_an_example() -> None:
    for value in ("cosine", 3, [1]):
        said = refusal(lr_scheduler_kwargs=value)
        assert said.startswith(f"`lr_scheduler_kwargs` ({value!r}): must be a table, or one as JSON text")
    assert "is not valid JSON" in refusal(lr_scheduler_kwargs='{"num_cycles": 2')


@pytest.mark.parametrize("name", sorted(NOT_HONOURED))
def test_an_unsupported_setting_is_accepted_and_readable_at_its_default_only(name: str) -> None:
    default = NOT_HONOURED[name]
    assert getattr(RewardConfig(**{name: default}), name) == default
    other = {bool: not default, int: 7, float: 0.5}.get(type(default), "something-else")
    said = refusal(**{name: other})
    assert f"`{name}` ({other!r})" in said
    assert repr(default) in said
    assert said.endswith(INSTEAD[name])


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"torch_compile": True}, "its own shape and attention plan"),
        ({"torch_compile_backend": "inductor"}, "as `torch_compile`"),
        ({"torch_compile_mode": "max-autotune"}, "as `torch_compile`"),
        ({"use_liger_kernel": True}, "need a GPU and are not tested with shared prefixes"),
        ({"liger_kernel_config": {"rope": True}}, "as `use_liger_kernel`"),
    ],
    ids=str,
)
def test_what_would_change_the_step_is_refused_with_its_reason(names: dict[str, Any], reason: str) -> None:
    (name,) = names
    said = refusal(**names)
    assert f"`{name}`" in said
    assert "Delete it" in said
    assert reason in said


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED.items()))
def test_an_old_name_is_an_error_that_names_the_new_one(old: str, new: str) -> None:
    said = refusal(**{old: 1})
    assert f"`{old}` (1)" in said
    assert f"`{new}`" in said


@pytest.mark.parametrize("name", sorted(GONE))
def test_a_name_that_transformers_dropped_is_an_error_that_says_why_it_is_not_needed(name: str) -> None:
    assert refusal(**{name: 1}) == f"`{name}` (1) is no setting any more. Delete it: {GONE[name]}"


def test_the_new_names_exist() -> None:
    owners = {"model": ModelConfig, "data": DataConfig, "cluster": ClusterConfig}
    for new in RENAMED.values():
        section, _, key = new.rpartition(".")
        assert key in {field.name for field in dataclasses.fields(owners.get(section, RewardConfig))}


def test_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    assert (
        refusal(learning_rat=1)
        == "`learning_rat` is no setting of RewardConfig. Did you mean `learning_rate`?"
    )
    assert refusal(xyzzy=1) == "`xyzzy` is no setting of RewardConfig."


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"bf16": True, "fp16": True}, ["`bf16` (True)", "`fp16` (True)", "`fp16=false`"]),
        ({"fp16": True, "use_cpu": True}, ["`fp16` (True) needs a GPU"]),
        ({"zero_stage": 2, "deepspeed": {"train_batch_size": 1}}, ["`zero_stage` (2)", "`deepspeed`"]),
        ({"deepspeed": "nowhere/ds.json"}, ["`deepspeed` ('nowhere/ds.json') is no file"]),
        ({"max_steps": 0}, ["`max_steps` (0)", "`max_steps=-1`"]),
        ({"logging_steps": 0}, ["`logging_steps` (0)"]),
        ({"save_steps": 1.5}, ["`save_steps` (1.5)", "whole number"]),
        ({"load_best_model_at_end": True}, ['`eval_strategy` ("no")', '`save_strategy` ("steps")']),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 30, "save_steps": 100},
            ["`save_steps` (100)", "`eval_steps` (30)", "`save_steps=90`"],
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1},
            ["`save_steps` (500)", "`eval_steps` (0.1)", "shares"],
        ),
        (
            {"save_strategy": "best", "eval_strategy": "steps"},
            ["`metric_for_best_model` is None", "accuracy"],
        ),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss"},
            ['`save_strategy` ("best")', '`eval_strategy` is "no"'],
        ),
        ({"train_sampling_strategy": "sequential", "shuffle": True}, ["contradict"]),
        ({"train_sampling_strategy": "group_by_length"}, ["`train_sampling_strategy`", "sequential"]),
        ({"hub_strategy": "all_checkpoints"}, ["`hub_strategy` ('all_checkpoints')", "every_save"]),
        ({"report_to": ["tensorboard", "all"]}, ["`report_to` ('all')", "tensorboard"]),
        ({"storage_path": "/shared/runs"}, ["`storage_path` ('/shared/runs')", "s3://bucket/runs"]),
        ({"storage_path": "s3://me:secret@bucket/runs"}, ["s3://***@bucket", "AWS_ACCESS_KEY_ID"]),
        ({"storage_path": "s33://bucket/runs"}, ["`s33` is no store", "Did you mean `s3`?", "gs://"]),
        ({"storage_path": "https://host/runs"}, ["`https` is no store", "s3://"]),
        ({"gradient_checkpointing": False, "activation_checkpointing": True}, ["one setting"]),
        ({"optim_args": "momentum=0.9"}, ["`adamw_torch_fused` takes none"]),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, ["Did you mean `momentum`?"]),
        ({"optim": "sgd", "optim_args": "momentum=much"}, ["`momentum=0.9`"]),
        ({"optim": "lion_8bit"}, ["`optim` ('lion_8bit')", "adamw_torch"]),
        ({"lr_scheduler_type": "greedy"}, ["`lr_scheduler_type` ('greedy')"]),
        ({"pad_to_multiple_of": "lots"}, ["`pad_to_multiple_of` ('lots')"]),
        ({"lr_scheduler_kwargs": "{oops"}, ["`lr_scheduler_kwargs`", "JSON"]),
        ({"learning_rate": math.nan}, ["`learning_rate` (nan)", "finite"]),
        ({"learning_rate": -1, "seed": -1}, ["`learning_rate` (-1)", "`seed` (-1)"]),
        ({"zero_stage": 4}, ["`zero_stage` (4)"]),
        ({"max_bad_row_fraction": 1.5}, ["`max_bad_row_fraction` (1.5)"]),
        ({"per_device_train_batch_size": 0}, ["`per_device_train_batch_size` (0)"]),
        ({"adam_beta1": 1.0}, ["`adam_beta1` (1.0)"]),
    ],
    ids=str,
)
def test_a_refusal_tells_field_value_rule_and_fix(names: dict[str, Any], says: list[str]) -> None:
    said = refusal(**names)
    assert all(part in said for part in says), said


def test_fp16_turns_the_default_of_bf16_off() -> None:
    assert RewardConfig(fp16=True).bf16 is False


def test_a_field_of_several_types_gives_one_line() -> None:
    assert refusal(report_to=7.5j).count("\n") == 0


def test_all_broken_rules_are_told_at_once() -> None:
    assert len(refusal(bf16=True, fp16=True, max_steps=0, report_to="comet_ml").splitlines()) == 3


def test_only_output_dir_is_positional() -> None:
    assert RewardConfig("out").output_dir == "out"
    with pytest.raises(ConfigError, match="by name"):
        RewardConfig("out", 8)  # type: ignore[misc]


def test_strings_from_a_command_line_are_coerced() -> None:
    config = RewardConfig(
        learning_rate="2e-6", max_steps="30", bf16="false", max_length="none", eval_steps="0.1"
    )  # type: ignore[arg-type]
    assert (config.learning_rate, config.max_steps, config.bf16) == (2e-6, 30, False)
    assert (config.max_length, config.eval_steps) == (None, 0.1)


def test_an_assignment_is_checked_like_an_argument() -> None:
    config = RewardConfig()
    config.gradient_checkpointing_kwargs = {"use_reentrant": False}
    config.learning_rate = "3e-5"  # type: ignore[assignment]
    config.activation_checkpointing = False  # type: ignore[attr-defined]
    assert config.learning_rate == 3e-5
    assert config.gradient_checkpointing is False
    for name, value in [("lerning_rate", 1), ("full_determinism", True), ("fp16", True), ("seed", -1)]:
        before = copy.deepcopy(config)
        with pytest.raises(ConfigError, match=name):
            setattr(config, name, value)
        assert config == before


def test_a_misspelt_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="lerning_rate"):
        RewardConfig().lerning_rate  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "config",
    [
        RewardConfig("x", zero_stage=2),
        ModelConfig("m", lora=LoraConfig(r=4)),
        DataConfig("t", eval={"a": "b"}),
        ClusterConfig(num_workers=2),
        ServeConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_config_survives_pickling_copying_and_replacing(config: Any) -> None:
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert dataclasses.replace(config) == config
    assert type(config)(**dataclasses.asdict(config)) == config


@given(num_steps=st.integers(1, 10**6), share=st.floats(1e-6, 0.999), count=st.integers(1, 10**6))
def test_an_interval_is_a_count_or_the_ceiling_of_a_share(num_steps: int, share: float, count: int) -> None:
    config = RewardConfig(logging_steps=count, save_steps=share, eval_strategy="steps")
    assert config.interval("logging", num_steps) == config.interval("eval", num_steps) == count
    assert config.interval("save", num_steps) == math.ceil(num_steps * share)


def test_rows_of_a_step_count_workers_and_a_run_in_process_counts_as_one() -> None:
    config = RewardConfig(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert [config.train_batch_rows(workers) for workers in (0, 1, 8)] == [12, 12, 96]


def test_optim_args_become_the_options_transformers_gives_the_optimizer() -> None:
    config = RewardConfig(optim="sgd", optim_args="momentum=0.9, nesterov=True")
    assert config.optimizer_options() == {"momentum": 0.9, "nesterov": True}
    assert RewardConfig().optimizer_options() == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ModelConfig(), "`name` is missing"),
        (lambda: ModelConfig(" "), "names no model"),
        (lambda: ModelConfig("m", lora={"r": 0}), "`lora.r` (0)"),
        (lambda: ModelConfig("m", lora={"rank": 8}), "`rank` is no setting of LoraConfig"),
        (lambda: LoraConfig(dropout=1.0), "`dropout` (1.0)"),
        (lambda: DataConfig([]), "`train` ([])"),
        (lambda: DataConfig("a", eval={}), "`eval` ({})"),
        (lambda: DataConfig("a", eval={"x": ""}), "names no source"),
        (lambda: DataConfig("a", max_pairs=0), "`max_pairs` (0)"),
        (lambda: ClusterConfig(use_gpu=True), "`cluster.num_workers=1`"),
        (lambda: ClusterConfig(num_workers=-1), "`num_workers` (-1)"),
        (lambda: ServeConfig(name=""), "needs a name"),
    ],
)
def test_the_other_sections_refuse_what_they_cannot_use(make: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)


def test_every_field_of_every_section_is_documented_once_under_the_field() -> None:
    trees = [
        ast.parse(Path(inspect.getfile(m)).read_text("utf-8"))
        for m in (rayrm.config, rayrm.data_settings, rayrm.model_settings, rayrm.serve_settings)
    ]
    sections = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(sections) == 9
    for section in sections:
        for field, following in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) != "_":
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{section.name}.{ast.unparse(field.target)}"
