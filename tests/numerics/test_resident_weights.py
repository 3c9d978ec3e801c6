"""How much of a model a worker holds: counted while it trains, beside what the system says of its memory."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaModel

from rayrm.data.tokenized_set import TokenizedSet
from rayrm.train import worker
from rayrm.train.host_memory import HostMemory
from rayrm.train.rank_model import RankModel, build_rank_model
from rayrm.train.sharded_export import ShardExport
from rayrm.train.worker import train_rank
from tests.numerics.ranks import Stopped, StoppingSet, Variant, job_of, tokenized

NUM_RANKS = 2
COMMON = {"optim": "sgd", "gradient_checkpointing": True, "per_device_train_batch_size": 2}
ENDS_IN_STEP = 3


@dataclass
class Held:
    """Elements of weights that one worker held at most while it trained, and what bounds them."""

    whole: int = 0
    largest_module: int = 0
    most: int = 0
    copies: int = 0
    most_at_export: int = 0
    exported: int = 0
    rss_anon_mib: float = 0.0


class _Count:
    """Looks before each module computes, and where it has gradients: what it needs is gathered then."""

    def __init__(self, built: RankModel) -> None:
        self.export, self._model = built.export, built.module.model
        self._parameters = list(built.module.parameters())
        self.held = Held(whole=sum(_whole(p) for p in self._parameters))
        self._zero = getattr(getattr(built.engine, "_engine", None), "optimizer", None)
        for module in built.module.modules():
            own = sum(_whole(p) for p in module.parameters(recurse=False))
            self.held.largest_module = max(self.held.largest_module, own)
            module.register_forward_pre_hook(self._look)
        for parameter in self._parameters:
            parameter.register_hook(self._look)

    def _look(self, *_: Any) -> None:
        self.held.most = max(self.held.most, self._resident())
        self.held.copies = max(self.held.copies, _copies(self._zero))
        status = Path("/proc/self/status").read_text()
        mib = int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024
        self.held.rss_anon_mib = max(self.held.rss_anon_mib, mib)

    def exports(self) -> None:
        """As for a checkpoint."""
        look = self._resident

        class Looking(HostMemory):
            most = held = 0

            def hold(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
                self.most, self.held = max(self.most, look()), self.held + tensor.numel()
                return super().hold(key, tensor)

        host = Looking()
        assert isinstance(self.export, ShardExport)
        self.export.take(self._model, host)
        self.held.most_at_export, self.held.exported = host.most, host.held

    def _resident(self) -> int:
        return sum(_resident(parameter) for parameter in self._parameters)


def _whole(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _resident(parameter: Any) -> int:
    if not hasattr(parameter, "ds_tensor"):
        return int(parameter.numel())
    # Also what is on its way counts: its memory is there.
    gathered = 0 if parameter.ds_status.name == "NOT_AVAILABLE" else parameter.ds_numel
    return int(parameter.ds_tensor.numel() + gathered)


def _copies(zero: Any) -> int:
    """Of this worker's part, what the optimizer steps over instead of the weights themselves."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        return 0
    pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True)
    return sum(master.numel() for master, weights in pairs if master.data_ptr() != weights.data_ptr())


def _rank_main(rank: int, store: Path, root: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), NUM_RANKS), rank=rank, world_size=NUM_RANKS
    )
    counts = []

    def counted(*given: Any) -> RankModel:
        built = build_rank_model(*given)
        counts.append(_Count(built))
        return built

    worker.build_rank_model = counted
    variant = Variant("run", settings, num_ranks=NUM_RANKS, loaded=root / "model", max_tokens=64)
    rows = tokenized(32)
    job = job_of(variant, root / f"{store.name}-run", rows)
    stopping: Any = StoppingSet(TokenizedSet.from_rows(rows), ENDS_IN_STEP)
    with pytest.raises(Stopped):
        train_rank(replace(job, train_set=stopping), lambda record: None)
    if isinstance(counts[0].export, ShardExport) and counts[0].held.whole < 10**8:
        counts[0].exports()
    (root / f"{store.name}-{rank}.json").write_text(json.dumps(asdict(counts[0].held)))
    dist.destroy_process_group()


def held_by_workers(root: Path, name: str, settings: dict[str, Any]) -> list[Held]:
    """Train the model `root/model` for two steps; what each worker held."""
    torch.multiprocessing.spawn(_rank_main, (root / name, root, settings), nprocs=NUM_RANKS)
    return [Held(**json.loads((root / f"{name}-{rank}.json").read_text())) for rank in range(NUM_RANKS)]


def save_random(directory: Path, **shape: int) -> None:
    """A Llama with random weights and no head."""
    config = LlamaConfig(num_key_value_heads=4, num_attention_heads=8, pad_token_id=0, **shape)
    torch.manual_seed(0)
    LlamaModel(config).save_pretrained(directory)


def held_in_parts(root: Path, *, live: int, **shape: int) -> list[Held]:
    """Under ZeRO-3 and zero.Init; `live`: the weights that DeepSpeed may keep gathered beside a module's."""
    save_random(root / "model", **shape)
    section = {
        "stage": 3,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "stage3_prefetch_bucket_size": live // 4,
        "reduce_bucket_size": live // 2,
        "stage3_param_persistence_threshold": 2048,  # norms stay whole, as of most models by default
    }
    parts = held_by_workers(
        root, "zero-3", {**COMMON, "deepspeed": {"zero_optimization": section}, "zero_init": True}
    )
    for one in parts:
        assert one.copies == 0
        assert one.most <= 0.5 * one.whole + one.largest_module + live
        assert one.most >= 0.5 * one.whole + one.largest_module  # it was looked at when most was there
        assert one.most_at_export <= 0.51 * one.whole + one.largest_module
        assert one.exported <= 0.51 * one.whole
    return parts


def show(capsys: pytest.CaptureFixture[str], name: str, held: list[Held]) -> None:
    with capsys.disabled():
        for rank, one in enumerate(held):
            print(
                f"\n{name}, worker {rank}: {one.most / 1e6:.1f}M of {one.whole / 1e6:.1f}M weights held at "
                f"most, RssAnon {one.rss_anon_mib:.0f} MiB",
                end="",
            )


def test_a_worker_holds_half_of_the_weights_and_what_it_computes_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = held_in_parts(
        tmp_path, live=500_000, vocab_size=4000, hidden_size=256, intermediate_size=1024, num_hidden_layers=8
    )
    assert parts[0].whole > 8_000_000
    show(capsys, "ZeRO-3, zero.Init", parts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_of_400_million_weights_is_held_in_halves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = held_in_parts(
        tmp_path,
        live=20_000_000,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=30,
    )
    assert parts[0].whole > 400_000_000
    show(capsys, "ZeRO-3, zero.Init", parts)
    whole = held_by_workers(tmp_path, "zero-0", {**COMMON, "zero_stage": 0})
    show(capsys, "ZeRO-0", whole)
    for one in whole:
        assert one.most == one.whole == parts[0].whole
