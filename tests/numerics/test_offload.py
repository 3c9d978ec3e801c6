"""Law 1 with optimizer or parameters offloaded and with ZeRO++'s partition: where state lies changes nothing.

Each run saves checkpoints, and is run once more, stopped in the middle and resumed, which gives its bits.
Offload to a disk needs libaio's headers and a compiler; without them its tests are skipped.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrm.errors import ConfigError
from rayrm.train.worker import train_rank
from rayrm.train.zero import DeepSpeedEngine, keeping_types, process_group
from tests.cells import cells_of
from tests.numerics.ranks import (
    GATHERED,
    Variant,
    _rank_main,
    job_of,
    outcome_of,
    run_variants,
    tokenized,
)
from tests.numerics.test_same_gradients import differences, untimed
from tests.tiny import save_tiny

# Training and its repetition for all forms in one fixture.
pytestmark = pytest.mark.timeout(1200)
CPU = {"device": "cpu"}
THREE = GATHERED["deepspeed"]["zero_optimization"]
EVERY_FORM: dict[str, dict[str, Any]] = {
    "optimizer_1": {"stage": 1, "offload_optimizer": CPU},
    "optimizer_2": {"stage": 2, "offload_optimizer": CPU},
    "optimizer_3": {**THREE, "offload_optimizer": CPU},
    "parameters": {**THREE, "offload_param": CPU},
    "all": {**THREE, "offload_optimizer": CPU, "offload_param": CPU},
    "hpz": {**THREE, "zero_hpz_partition_size": 2},
}
FORMS = {form: EVERY_FORM[form] for form in cells_of(EVERY_FORM, ["optimizer_2", "all", "hpz"])}
RESUMED = cells_of(["optimizer_1", "optimizer_2", "all", "hpz"], ["optimizer_2", "all"])
NUM_STEPS = 11
# AdamW has state to lose; the norm before clipping tells a gradient that is wrong by a factor.
STEP: dict[str, Any] = {
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "max_steps": NUM_STEPS,
    "save_strategy": "steps",
    "save_steps": 3,
}


def forms(rows: list[Any]) -> list[Variant]:
    longest = max(len(row.ids) for row in rows)
    whole = [
        Variant(
            form,
            {**STEP, "deepspeed": {"zero_optimization": zero}},
            max_tokens=longest,
            num_ranks=2,
            lora=form == "optimizer_2",
        )
        for form, zero in FORMS.items()
    ]
    again = [variant for variant in whole if variant.name in RESUMED]
    return whole + [replace(variant, name=f"{variant.name}_resumed", stop_in=8) for variant in again]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    rows = tokenized(38)
    reference = Variant("reference", {**STEP, "per_device_train_batch_size": 4}, padded=True)
    run_variants([reference, replace(reference, name="lora", lora=True), *forms(rows)], root, rows)
    return root


@pytest.mark.parametrize("form", FORMS)
def test_where_state_lies_does_not_change_the_trajectory(runs: Path, form: str) -> None:
    outcome = outcome_of(runs / form)
    assert len(outcome.losses) == NUM_STEPS
    reference = outcome_of(runs / ("lora" if form == "optimizer_2" else "reference"))
    assert differences(outcome, reference) == []


@pytest.mark.parametrize("form", RESUMED)
def test_a_resumed_run_gives_the_bits_of_one_that_was_not_interrupted(runs: Path, form: str) -> None:
    assert untimed(runs / form) == untimed(runs / f"{form}_resumed")
    whole, resumed = outcome_of(runs / form).weights, outcome_of(runs / f"{form}_resumed").weights
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_offloaded_optimizer_keeps_copies_and_its_state_apart_from_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    step = DeepSpeedEngine.step

    def watched(engine: Any) -> torch.Tensor:
        zero = engine._engine.optimizer
        seen.append(bool(zero.cpu_offload) and type(zero.optimizer) is torch.optim.AdamW)
        return step(engine)

    monkeypatch.setattr(DeepSpeedEngine, "step", watched)
    settings = {**STEP, "max_steps": 1, "deepspeed": {"zero_optimization": FORMS["optimizer_2"]}}
    train_rank(job_of(Variant("run", settings), tmp_path, tokenized(8)), lambda record: None)
    assert seen == [True]


def has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


needs_libaio = pytest.mark.skipif(not has_libaio(), reason="libaio's headers are not installed (libaio-dev)")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's partitions go to the disk, where DeepSpeed begins with 1 MiB."""
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    for module in (optimizer_utils, partitioned_param_swapper):
        monkeypatch.setattr(module, "MIN_AIO_BYTES", 1024)


NVME: dict[str, Any] = {"device": "nvme", "pin_memory": False}
SECTIONS: dict[str, dict[str, Any]] = {
    "optimizer": {"offload_optimizer": NVME},
    "parameters": {"offload_param": {**NVME, "buffer_size": 100_000}},
    "both": {
        "offload_optimizer": {**NVME, "pipeline_read": True, "pipeline_write": True, "buffer_count": 10},
        "offload_param": {**NVME, "buffer_size": 100_000},
    },
}


def on_disk(disk: Path, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    placed = {name: {**section, "nvme_path": str(disk)} for name, section in sections.items()}
    # Several groups of parameters, each read and written by itself.
    zero = {**THREE, "sub_group_size": 20_000, **placed}
    return {**STEP, "deepspeed": {"zero_optimization": zero, "aio": {"block_size": 1024}}}


@needs_libaio
@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("sections", SECTIONS)
def test_state_on_a_disk_is_trained_saved_and_resumed_as_state_in_memory(
    tmp_path: Path, sections: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, rows = tmp_path / "disk", tokenized(38)
    budget = 2 * max(len(row.ids) for row in rows)
    plain = Variant("plain", {**STEP, "per_device_train_batch_size": 4}, max_tokens=budget)
    settings = {**on_disk(disk, SECTIONS[sections]), "per_device_train_batch_size": 4}
    whole = Variant("whole", settings, max_tokens=budget)
    resumed = replace(whole, name="resumed", stop_in=8)
    moved = replace(whole, name="moved", stop_in=8, left=True)
    files = written(monkeypatch)
    run_variants([plain, whole, resumed, moved, replace(plain, name="moved")], tmp_path, rows)
    assert {file.split("/")[0] for file in files} == {"zero_stage_3"}
    kinds = {"optimizer" if "/optimizer/" in file else "parameters" for file in files}
    assert kinds == ({"optimizer", "parameters"} if sections == "both" else {sections})
    outcome = outcome_of(tmp_path / "whole")
    for name in ("plain", "moved"):
        assert differences(outcome_of(tmp_path / name), outcome) == []
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "resumed")
    again = outcome_of(tmp_path / "resumed").weights
    assert all(torch.equal(weight, again[name]) for name, weight in outcome.weights.items())
    assert list(disk.iterdir()) == []


def _rank_of_small_files(*spawned: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

        for module in (optimizer_utils, partitioned_param_swapper):
            patch.setattr(module, "MIN_AIO_BYTES", 1024)
        _rank_main(*spawned)


@needs_libaio
def test_ranks_that_load_parts_of_a_model_keep_them_on_a_disk(tmp_path: Path) -> None:
    base, disk, rows = save_tiny(tmp_path / "base", seed=1), tmp_path / "disk", tokenized(38)
    reference = Variant("reference", {**STEP, "per_device_train_batch_size": 4}, loaded=base)
    settings = {**on_disk(disk, SECTIONS["both"]), "zero_init": True}
    parts = Variant("parts", settings, num_ranks=2, loaded=base)
    run_variants([reference], tmp_path, rows)
    spawned = (2, tmp_path / "store", [parts], tmp_path, rows)
    torch.multiprocessing.spawn(_rank_of_small_files, spawned, nprocs=2)
    assert differences(outcome_of(tmp_path / "parts"), outcome_of(tmp_path / "reference")) == []
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) == 2
    assert list(disk.iterdir()) == []


def written(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files that runs from here on leave in their folders on the disk, just before they are deleted."""
    found: set[str] = set()
    delete = shutil.rmtree

    def look(folder: Any, **options: Any) -> None:
        found.update(str(file.relative_to(folder)) for file in Path(folder).rglob("*.swp"))
        delete(folder, **options)

    monkeypatch.setattr("rayrm.train.nvme.shutil.rmtree", look)
    return found


@needs_libaio
@pytest.mark.usefixtures("small_files")
def test_a_buffer_that_is_too_small_for_a_weight_is_refused_with_what_to_set(tmp_path: Path) -> None:
    sections = {"offload_param": {**NVME, "buffer_size": 300}}
    job = job_of(Variant("run", on_disk(tmp_path / "disk", sections)), tmp_path, tokenized(8))
    with pytest.raises(ConfigError, match=r"buffer size 300. Set `\S*offload_param.buffer_size` to"):
        train_rank(job, lambda record: None)
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("has_half", [True, False])
def test_weights_on_a_disk_have_their_own_type(has_half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import Init

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: has_half)
    monkeypatch.setenv("LOCAL_RANK", "0")
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with process_group(), keeping_types():
        parts = Init(module=torch.nn.Linear(4, 4), config_dict_or_path=settings, dtype=torch.float32)
    assert parts.dtype == torch.float32


def test_without_libaio_a_disk_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    job = job_of(Variant("run", on_disk(tmp_path / "disk", SECTIONS["optimizer"])), tmp_path, tokenized(8))
    with pytest.raises(ConfigError, match="apt-get install libaio-dev"):
        train_rank(job, lambda record: None)
    assert not (tmp_path / "disk").exists()


def test_an_operator_that_cannot_be_compiled_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def load(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[1/13] c++ -MMD\nx.cpp:3:1: error: no such\nmore")

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", load)
    job = job_of(Variant("run", on_disk(tmp_path / "disk", SECTIONS["optimizer"])), tmp_path, tokenized(8))
    with pytest.raises(ConfigError, match=r"`async_io`.* be: x.cpp:3:1: error: no such\. It needs"):
        train_rank(job, lambda record: None)


def test_zero_plus_plus_partitions_must_divide_the_workers(tmp_path: Path) -> None:
    settings = {**STEP, "deepspeed": {"zero_optimization": FORMS["hpz"]}}
    with pytest.raises(ConfigError, match=r"`.*zero_hpz_partition_size` \(2\) must divide"):
        train_rank(job_of(Variant("run", settings), tmp_path, tokenized(8)), lambda record: None)


def test_a_value_that_deepspeed_refuses_is_named(tmp_path: Path) -> None:
    settings = {**STEP, "deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}}
    said = r"`deepspeed` is refused by DeepSpeed: `reduce_bucket_size` \(-5\): should be greater than"
    with pytest.raises(ConfigError, match=said):
        train_rank(job_of(Variant("run", settings), tmp_path, tokenized(8)), lambda record: None)


QUANTIZED = {**THREE, "zero_quantized_weights": True, "zero_quantized_gradients": True}


def test_quantized_communication_is_refused_on_a_cpu_by_name() -> None:
    settings = {**STEP, "deepspeed": {"zero_optimization": QUANTIZED}}
    with pytest.raises(ConfigError, match=r"`.*zero_quantized_weights` \(true\) needs a GPU"):
        job_of(Variant("run", settings), Path("unused"), tokenized(8))


@pytest.mark.gpu
def test_quantized_communication_stays_near_the_trajectory_on_a_gpu(tmp_path: Path) -> None:
    """Weights in 8 bits, gradients in 4: law 1 does not hold, training does."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = tokenized(38)
    quantized = {"deepspeed": {"zero_optimization": QUANTIZED}, "use_cpu": False}
    variants = [Variant("plain", STEP), Variant("quantized", {**STEP, **quantized})]
    run_variants(variants, tmp_path, rows)
    losses, reference = outcome_of(tmp_path / "quantized").losses, outcome_of(tmp_path / "plain").losses
    assert abs(losses - reference).max() < 0.1
