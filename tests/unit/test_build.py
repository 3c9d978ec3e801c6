"""What building a model decides for the user is said, once and with what to type."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.errors import ConfigError, ModelError
from rayrm.model.layout import unwrapped
from rayrm.train import zero_init
from rayrm.train.build import ModelSource, build_model, check_source
from rayrm.train.given import check_tokens
from rayrm.train.rank import Hosts, Rank
from rayrm.train.worker import train_rank
from rayrm.train.zero_init import builds_in_parts
from tests.numerics.ranks import Variant, job_of, tokenized
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


def adapter(dropout: float = 0.0) -> Any:
    return peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=dropout, target_modules="all-linear")


def dropouts(model: torch.nn.Module) -> set[float]:
    return {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)}


def test_a_dropout_of_the_adapter_that_is_set_to_zero_is_told_with_what_to_type(
    caplog: pytest.LogCaptureFixture,
) -> None:
    built = build_model(ModelSource(tiny_model(), adapter(0.1)), RewardConfig(), tiny_tokenizer())
    assert dropouts(built) <= {0.0}
    (said,) = [r for r in caplog.records if r.levelname == "WARNING" and "dropout" in r.getMessage()]
    for part in ("`lora_dropout` (0.1", "`model.lora.dropout`", "`disable_dropout` (True)", "=false`"):
        assert part in said.getMessage()


@pytest.mark.parametrize(("dropout", "disable"), [(0.0, True), (0.1, False)])
def test_an_adapter_whose_dropout_stays_as_set_is_not_warned_about(
    dropout: float, disable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = RewardConfig(disable_dropout=disable)
    built = build_model(ModelSource(tiny_model(), adapter(dropout)), config, tiny_tokenizer())
    assert max(dropouts(built), default=0.0) == dropout
    assert "dropout" not in caplog.text


ZERO3: list[dict[str, Any]] = [{"zero_stage": 3}, {"deepspeed": {"zero_optimization": {"stage": 3}}}]
KEEPS: list[dict[str, Any]] = [{}, {"zero_stage": 2}, {"deepspeed": {"zero_optimization": {"stage": 2}}}]


def reentrant(config: RewardConfig, *, adapted: bool) -> bool:
    """Whether the built model's layers are recomputed reentrantly."""
    source = ModelSource(tiny_model(), adapter() if adapted else None)
    layers: Any = unwrapped(build_model(source, config, tiny_tokenizer())).model.layers
    chosen: bool = layers[0]._gradient_checkpointing_func.keywords["use_reentrant"]
    return chosen


@pytest.mark.parametrize(
    ("settings", "adapted", "expected"),
    [
        *((settings, True, True) for settings in ZERO3),
        *((settings, False, False) for settings in ZERO3),
        *((settings, True, False) for settings in KEEPS),
    ],
    ids=str,
)
def test_an_adapter_under_zero3_is_recomputed_reentrantly_however_the_stage_is_said(
    settings: dict[str, Any], adapted: bool, expected: bool
) -> None:
    assert reentrant(RewardConfig(**settings), adapted=adapted) is expected


@pytest.mark.parametrize("settings", [*ZERO3, *KEEPS], ids=str)
@pytest.mark.parametrize("said", [False, True])
def test_what_the_user_says_of_reentrance_holds(
    settings: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = RewardConfig(gradient_checkpointing_kwargs={"use_reentrant": said}, **settings)
    with caplog.at_level(logging.INFO, "rayrm.train"):
        assert reentrant(config, adapted=True) is said
    assert ("`use_reentrant` (False) is kept" in caplog.text) is (settings in ZERO3 and not said)


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_model_that_cannot_recompute_is_warned_about_by_one_rank(
    rank: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = tiny_model()
    model.supports_gradient_checkpointing = False
    with contextlib.ExitStack() as around:
        if rank is not None:
            around.enter_context(_as_rank(rank))
        build_model(ModelSource(model), RewardConfig(), tiny_tokenizer())
    said = [record for record in caplog.records if "`gradient_checkpointing` (True) is off" in record.message]
    assert [record.levelname for record in said] == ([] if rank == 1 else ["WARNING"])


@contextlib.contextmanager
def _as_rank(rank: int) -> Iterator[None]:
    """A process group of two, of which this process is `rank`; no other comes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("rows", "lines"), [(8, 0), (3, 1)])
def test_an_evaluation_batch_that_is_set_is_told_to_set_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: int, lines: int
) -> None:
    settings = {"per_device_eval_batch_size": rows, "max_steps": 1}
    with caplog.at_level(logging.INFO, "rayrm.train"):
        train_rank(job_of(Variant("run", settings), tmp_path, tokenized(8)), lambda record: None)
    assert caplog.text.count(f"`per_device_eval_batch_size` ({rows}) sets nothing here") == lines


def metrics_of(directory: Path, max_tokens: int | None = None, **settings: Any) -> dict[str, float]:
    """The evaluation after one step."""
    found: dict[str, float] = {}
    variant = Variant("run", {"max_steps": 1, "eval_strategy": "steps", **settings}, max_tokens=max_tokens)
    job = job_of(variant, directory, tokenized(8))
    train_rank(replace(job, eval_sets={"": TokenizedSet.from_rows(tokenized(20))}), found.update)
    return {
        name: value
        for name, value in found.items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
    }


def test_evaluation_depends_on_neither_of_the_two_sizes(tmp_path: Path) -> None:
    whole = metrics_of(tmp_path / "whole")
    assert whole["eval_accuracy"] > 0
    # Sums in another order: 1e-7 of a loss near 1.
    by_one = metrics_of(tmp_path / "rows", per_device_eval_batch_size=1)
    assert by_one == pytest.approx(whole, rel=1e-5, abs=1e-6)
    by_few_tokens = metrics_of(tmp_path / "tokens", max_tokens=1)
    assert by_few_tokens == pytest.approx(whole, rel=1e-5, abs=1e-6)


ELSEWHERE = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    "ADALORA": lambda: peft.AdaLoraConfig(task_type="SEQ_CLS", total_step=9, tinit=1, tfinal=1),
    "XLORA": lambda: peft.XLoraConfig(task_type="SEQ_CLS", hidden_size=8, adapters={"a": "b"}),
    "LORA": lambda: peft.LoraConfig(task_type="SEQ_CLS", alora_invocation_tokens=[3]),
}
LAYERS = {
    "DORA": lambda: peft.LoraConfig(task_type="SEQ_CLS", use_dora=True),
    "IA3": lambda: peft.IA3Config(task_type="SEQ_CLS"),
    "LOHA": lambda: peft.LoHaConfig(task_type="SEQ_CLS"),
    "ADAMSS": lambda: peft.AdamssConfig(task_type="SEQ_CLS"),
}


@pytest.mark.filterwarnings("ignore:aLoRA is currently")
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_peft_method_that_the_packed_step_would_not_carry_out_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"`peft_config`: {kind} .*it would train wrongly here"):
        check_source(ModelSource(tiny_model(), ELSEWHERE[kind]()), RewardConfig())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_peft_method_that_changes_layers_is_taken(kind: str) -> None:
    check_source(ModelSource(tiny_model(), LAYERS[kind]()), RewardConfig())


def test_the_method_of_a_given_adapter_is_looked_at_too() -> None:
    given: Any = peft.get_peft_model(tiny_model(), ELSEWHERE["PROMPT_TUNING"]())
    with pytest.raises(ConfigError, match="the model's adapter `default`: PROMPT_TUNING"):
        check_source(ModelSource(given), RewardConfig())
    of_transformers: Any = tiny_model()
    of_transformers.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="saves no reward head"):
        check_source(ModelSource(of_transformers), RewardConfig())


def test_a_model_of_which_nothing_is_trained_is_refused() -> None:
    frozen = tiny_model().requires_grad_(False)
    with pytest.raises(ModelError, match="Load an adapter with `is_trainable=True`"):
        check_source(ModelSource(frozen), RewardConfig())
    check_source(ModelSource(frozen, adapter()), RewardConfig())


def test_the_auxiliary_loss_of_routers_is_refused_and_its_coefficient_alone_is_not(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.router_aux_loss_coef = 0.001
    model.save_pretrained(tmp_path)
    check_source(ModelSource(model), RewardConfig())
    check_source(ModelSource(str(tmp_path)), RewardConfig())
    asked = RewardConfig(model_init_kwargs={"output_router_logits": True})
    with pytest.raises(ModelError, match=r"`router_aux_loss_coef=0.001`"):
        check_source(ModelSource(str(tmp_path)), asked)
    model.config.output_router_logits = True
    with pytest.raises(ModelError, match=r"`output_router_logits=True`"):
        check_source(ModelSource(model), RewardConfig())
    model.config.router_aux_loss_coef = 0.0
    check_source(ModelSource(model), RewardConfig())


@pytest.mark.parametrize(
    ("init", "against"),
    [({"dtype": "bfloat16"}, "parts are float32"), ({"gguf_file": "a.gguf"}, "`gguf_file`")],
)
def test_a_model_that_cannot_be_loaded_in_parts_is_refused_where_it_was_asked_for(
    tmp_path: Path, init: dict[str, Any], against: str
) -> None:
    config = RewardConfig(zero_stage=3, zero_init=True, model_init_kwargs=init)
    with pytest.raises(
        ConfigError, match=rf"`zero_init` \(True\) cannot load this model: .*{against}.*Leave"
    ):
        check_source(ModelSource(str(tmp_path)), config)
    with pytest.raises(ConfigError, match="it is in memory already"):
        check_source(ModelSource(tiny_model()), RewardConfig(zero_stage=3, zero_init=True))
    check_source(ModelSource(tiny_model()), RewardConfig(zero_stage=3))


def test_tokens_of_an_adapter_are_made_in_parts_on_gpus_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = str(save_tiny(tmp_path / "base")), tiny_tokenizer()
    parts = RewardConfig(zero_stage=3, zero_init=True)
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    scaling = SimpleNamespace(num_workers=2, use_gpu=False)

    def check(source: ModelSource, config: RewardConfig = parts, **changes: Any) -> None:
        check_tokens(source, config, tokenizer, SimpleNamespace(**{**vars(scaling), **changes}))

    check(ModelSource(base, lora))
    new = ModelSource(base, lora, new_tokens=(400,))
    listed = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], trainable_token_indices=[5])
    for source in (new, ModelSource(base, listed)):
        with pytest.raises(ConfigError, match=r"on GPUs only\. Leave `zero_init` out"):
            check(source)
    check(new, use_gpu=True)
    check(new, num_workers=1)
    check(new, RewardConfig(zero_stage=3))
    check(ModelSource(base, new_tokens=(400,)))
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match="on GPUs only"):
        check(ModelSource(base, lora))
    # Where nobody asked for parts, and memory would: whole on each worker.
    monkeypatch.setattr(zero_init, "available_memory", lambda: 1)
    ranks = Rank(0, 2, torch.device("cpu")), Hosts(), [].append
    assert builds_in_parts(base, RewardConfig(zero_stage=3), *ranks)
    assert not builds_in_parts(base, RewardConfig(zero_stage=3), *ranks, trains_tokens=True)


def test_parts_are_for_stage_3() -> None:
    with pytest.raises(ConfigError, match=r"`zero_init` \(True\) is for ZeRO stage 3.*the stage is 2"):
        RewardConfig(zero_stage=2, zero_init=True)
