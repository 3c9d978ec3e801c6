"""What the benchmarks share: real rows and models, clocks, the matmul peak, FLOPs, medians, the JSON line.

No ray and no deepspeed: a bare machine with torch and transformers runs them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, set_seed

from rayrm.data.packing import PackedBatch
from rayrm.data.preference import PreferenceRow, parse_row
from rayrm.data.sources import plan_sources, read_work
from rayrm.data.tokenize import TokenizedRow, prepare_tokenizer, tokenize_rows
from rayrm.errors import RayrmError, RowError
from rayrm.model.cost import head_sizes
from rayrm.model.precision import bf16_usable
from rayrm.model.reward_model import load_model, load_tokenizer

SEED = 0
_PAIRS_PER_CALL = 256

# Published shapes, built with random weights: speed does not depend on what a model has learnt.
SHAPES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
}


def bench_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser of what every benchmark can be told; `doc` is the benchmark's own."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", help="a model directory; one with a config.json only gets random weights")
    where.add_argument("--shape", choices=sorted(SHAPES), help="a published shape with random weights")
    parser.add_argument("--tokenizer", help="a tokenizer directory (default: the model's)")
    parser.add_argument("--data", required=True, help="preference pairs: jsonl, jsonl.gz or parquet")
    parser.add_argument("--max-length", type=int, default=1024, help="longer pairs are left out (tokens)")
    parser.add_argument("--rounds", type=int, default=3, help="how often ours and the baseline take turns")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast over fp32")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result here too")
    return parser


def device_of(arguments: argparse.Namespace) -> torch.device:
    """The GPU if there is one; sets the number of threads on the way, and refuses what it cannot do."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_dtype(arguments, device)
    if device.type == "cpu" and getattr(arguments, "attn", None) == "varlen":
        raise SystemExit("--attn varlen needs a GPU: torch has no such kernel for CPUs. Leave --attn out")
    return device


def check_dtype(arguments: argparse.Namespace, device: torch.device) -> None:
    """Training would fall back to fp32 where bf16 is slow, and be compared with what does not."""
    if arguments.dtype == "bf16":
        usable, why = bf16_usable(use_cpu=device.type == "cpu")
        if not usable:
            raise SystemExit(f"--dtype bf16 means nothing here: {why}. Leave it out")


def open_tokenizer(arguments: argparse.Namespace) -> Any:
    name = arguments.tokenizer or arguments.model
    if name is None:
        raise SystemExit("--shape has no tokenizer of its own: name one with --tokenizer DIR")
    return prepare_tokenizer(load_tokenizer(name), eos_token=None, pad_token=None, chat_template_path=None)


def open_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model in float32 on the CPU; what its directory lacks (the head, or all weights) is seeded."""
    set_seed(SEED)
    if arguments.shape is not None:
        shape = dict(SHAPES[arguments.shape])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape, num_labels=1)
    elif any(Path(arguments.model).glob("*.safetensors")):
        return load_model(arguments.model)
    else:
        config = AutoConfig.from_pretrained(arguments.model, num_labels=1)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return model


def read_pairs(source: str) -> list[PreferenceRow]:
    """Every row of preferences in a source, in its own order; rows that are none are passed over."""
    pairs = []
    for work in plan_sources(source, max_rows=None, name="--data", contiguous=True).work:
        for row in read_work(work):
            try:
                if not isinstance(row.content, RowError):
                    pairs.append(parse_row(row.content))
            except RowError:
                continue
    return pairs


def shuffled_pairs(
    source: str, tokenizer: Any, *, count: int, max_length: int
) -> list[tuple[PreferenceRow, TokenizedRow]]:
    """The first `count` pairs of a seed-0 shuffle that fit `max_length`, as they are read and tokenized.

    Rankings are passed over: TRL has no such rows.
    """
    pairs = [row for row in read_pairs(source) if row.ranks == (0, 1)]
    random.Random(SEED).shuffle(pairs)
    found: list[tuple[PreferenceRow, TokenizedRow]] = []
    for begin in range(0, len(pairs), _PAIRS_PER_CALL):
        if len(found) >= count:
            break
        part = pairs[begin : begin + _PAIRS_PER_CALL]
        made = zip(part, tokenize_rows(tokenizer, part, max_length), strict=True)
        found.extend((pair, row) for pair, row in made if not isinstance(row, RowError))
    if len(found) < count:
        raise SystemExit(
            f"--pairs ({count}): {source} has {len(found)} pairs of at most {max_length} tokens (of "
            f"{len(pairs)}; rankings do not count). Lower --pairs, raise --max-length, or name other --data"
        )
    return found[:count]


def shuffled_rows(source: str, tokenizer: Any, *, count: int, max_length: int) -> list[TokenizedRow]:
    """The same pairs, tokenized."""
    return [row for _, row in shuffled_pairs(source, tokenizer, count=count, max_length=max_length)]


class Stopwatch:
    """Seconds from `start` to `stop`: the device's own clock on a GPU, which must be idle at the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()
        else:
            self._began = time.perf_counter()

    def stop(self) -> float:
        if self._device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            end.synchronize()
            return float(self._begin.elapsed_time(end)) / 1000
        return time.perf_counter() - self._began


@contextmanager
def peak_memory(device: torch.device, found: list[float]) -> Iterator[None]:
    """Appends the GPU memory that the body needed at most, in GiB; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield
    found.append(torch.cuda.max_memory_allocated(device) / 2**30)


def matmul_peak(device: torch.device, dtype: str, *, repeats: int = 8) -> float:
    """FLOP/s of the best of some matmuls: 2048 cubed on a CPU, 8192 cubed where that would be too small."""
    size = 8192 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    watch, best = Stopwatch(device), float("inf")
    left @ right
    for _ in range(repeats):
        watch.start()
        left @ right
        best = min(best, watch.stop())
    return 2 * size**3 / best


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a pass costs, in FLOPs: 6 a weight and token, 12 a (query, key) pair and channel.

    Forward is 2 FLOPs a weight and token, backward twice that. A (query, key) pair costs 4 a channel of all
    heads in forward (the logit, the weighted value), backward twice that; softmax, norms and activations
    count nothing. `weights` are all but the input embeddings; `last_*` those of the last layer that act on
    every token even where it is computed for pooled tokens alone: keys and values, and the queries' forward.
    """

    weights: int
    last_layer: int
    last_keys: int
    last_queries: int
    num_layers: int
    channels: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelCost:
        config = model.config.get_text_config()
        sizes_of_head = head_sizes(config)
        if sizes_of_head is None:
            raise SystemExit(f"{type(model).__name__} does not say how wide its attention is: no MFU")
        embeddings = model.get_input_embeddings()
        skipped = {id(parameter) for parameter in embeddings.parameters()}
        last = f"layers.{config.num_hidden_layers - 1}."
        sizes = {name: p.numel() for name, p in model.named_parameters() if id(p) not in skipped}

        def total(pattern: str) -> int:
            return sum(size for name, size in sizes.items() if last in name and re.search(pattern, name))

        return cls(
            weights=sum(sizes.values()),
            last_layer=total(""),
            last_keys=total(r"k_proj|v_proj|qkv|query_key_value"),
            last_queries=total(r"q_proj"),
            num_layers=config.num_hidden_layers,
            channels=config.num_attention_heads * sum(sizes_of_head) // 2,
        )

    def training(self, batches: Sequence[PackedBatch], distinct_tokens: int) -> float:
        """FLOPs of the definition: every distinct token through every weight, attention as computed."""
        attention = sum(self._attention(batch) for batch in batches)
        return 6.0 * self.weights * distinct_tokens + attention

    def scoring(self, batches: Sequence[PackedBatch], distinct_tokens: int) -> float:
        """The forward's third of `training`."""
        return self.training(batches, distinct_tokens) / 3

    def executed(self, batches: Sequence[PackedBatch]) -> float:
        """FLOPs really done where the last layer computes queries, output and MLP of pooled tokens alone."""
        total = 0.0
        for batch in batches:
            every = self.weights - self.last_layer + self.last_keys
            total += (6.0 * every + 2.0 * self.last_queries) * batch.num_tokens
            total += 6.0 * (self.last_layer - self.last_keys) * batch.num_scores
            total += self._attention(batch)
        return total

    def _attention(self, batch: PackedBatch) -> float:
        """A token sees all before it and itself; in the last layer the pooled ones alone ask."""
        depths = batch.positions + 1
        seen = (self.num_layers - 1) * int(depths.sum()) + int(depths[batch.pooled].sum())
        return 12.0 * self.channels * seen


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def shown(values: Sequence[float], digits: int = 2) -> str:
    """`median (low-high)`."""
    found = spread(values)
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f}-{found['high']:.{digits}f})"


def machine(device: torch.device) -> dict[str, Any]:
    """Where and when a figure was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
    }


def _cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def compared(
    bench: str, arguments: argparse.Namespace, unit: str, ours: Sequence[float], baseline: Sequence[float]
) -> dict[str, Any]:
    """What every result says: what ran, both speeds in `unit`, and ours over the baseline, round by round."""
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    result: dict[str, Any] = {
        "bench": bench,
        "model": arguments.model or arguments.shape,
        "data": arguments.data,
        "max_length": arguments.max_length,
        "dtype": arguments.dtype,
        "rounds": len(ratios),
    }
    for name, values in ((unit, ours), (f"baseline_{unit}", baseline), ("ratio", ratios)):
        result |= {name: spread(values)["median"], f"{name}_spread": spread(values)}
    return result


def run_bench(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Measure, and end with the result: in words, then as the last line of stdout and in `--json`."""
    try:
        result = measure(arguments)
    except RayrmError as error:
        raise SystemExit(str(error)) from None
    report(result)
    path: Path | None = arguments.json
    line = json.dumps(result)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n", encoding="utf-8")
    sys.stdout.flush()
    print(line, flush=True)
