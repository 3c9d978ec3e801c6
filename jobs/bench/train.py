"""The optimizer step beside TRL's, or beside our own without sharing.

    python jobs/bench/train.py --model DIR --data FILE --pairs 128 --batch 8 --against trl

Both take turns, `--rounds` times, from the same weights, over the same pairs in the same order (the first N
of a seed-0 shuffle that fit `--max-length`), with the same AdamW (fused, constant lr 1e-5) and clipping at
1.0. Each has a process of its own, which waits while the other computes: in one process either would compute
in a heap that the other has shaped (TRL's step was a quarter slower in ours). Timed are whole steps from
forward to optimizer, two warm-up steps a round dropped: ours with its planning and packing; TRL's is its own
`RewardTrainer.train()`, timed from `on_step_begin` to `on_optimizer_step`, so that its collation is not
counted. Tokenization is counted for neither.

`ratio` is our pairs/s over the baseline's, the median of the rounds' ratios. `max_loss_delta` and
`max_grad_norm_delta` (relative, before clipping) are over all steps of all rounds. `mfu` = (6 x non-embedding
parameters x the step's distinct tokens + attention over the (query, key) pairs computed) / time / peak, where
peak is the best of the matmuls right before and after the round, in the same process and threads (2048 cubed;
8192 cubed on a GPU), since a machine's clock drifts; it means something without gradient checkpointing only.
`mfu_executed` counts only FLOPs that are executed: the last layer's queries and MLP at the pooled tokens.
No GPU has been measured yet: `--shape qwen2.5-0.5b --tokenizer DIR --dtype bf16 --attn varlen` (or `flex`).
Neither ray nor deepspeed is needed, trl only for `--against trl`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, get_args

from measuring import (
    ModelCost,
    bench_parser,
    compared,
    device_of,
    machine,
    matmul_peak,
    open_model,
    open_tokenizer,
    peak_memory,
    run_bench,
    shown,
    shuffled_rows,
    spread,
)
from steps import OurStep, TimedStep, TrlStep, add_step_arguments, in_steps

from rayrm.data.packing import PackedBatch
from rayrm.data.tokenize import TokenizedRow
from rayrm.model.attention import AttentionPath
from rayrm.train.allocator import keep_freed_memory

WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class Turn:
    """One round of one side: all steps from the initial weights, and the matmul peak around them."""

    steps: list[TimedStep]
    peak_flops: float
    peak_memory_gib: list[float]


class Side:
    """One of the two that are compared ("ours", "packed" or "trl"), in a process of its own."""

    def __init__(self, name: str, arguments: argparse.Namespace, rows: Sequence[TokenizedRow]) -> None:
        self.name = name
        self.turns: list[Turn] = []
        self._process = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_end_with_the_benchmark
        )
        self._process.submit(_open, name, arguments, rows).result()

    def take_turn(self) -> None:
        self.turns.append(self._process.submit(_take_turn).result())


def _end_with_the_benchmark() -> None:
    """A pool's process outlives a parent that is killed, and waits for work with gigabytes of memory."""
    benchmark = parent_process()
    assert benchmark is not None

    def wait() -> None:
        benchmark.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


_turn: Callable[[], Turn]
"""What a side's process does when it is its turn."""
_kept = ExitStack()
"""What is in force as long as a side's process lives."""


def _open(name: str, arguments: argparse.Namespace, rows: Sequence[TokenizedRow]) -> None:
    global _turn
    device, tokenizer, model = device_of(arguments), open_tokenizer(arguments), open_model(arguments)
    run: Callable[[], list[TimedStep]]
    if name == "trl":
        run = TrlStep(model, tokenizer, arguments, rows).run
    else:
        step = OurStep(model, tokenizer, arguments, share=name == "ours", path=arguments.attn)
        run = partial(step.run, in_steps(rows, arguments.batch))
        # As in training, where memory is mapped in the first steps and then stays.
        _kept.enter_context(keep_freed_memory(device))

    def turn() -> Turn:
        memory: list[float] = []
        before = matmul_peak(device, arguments.dtype)
        with peak_memory(device, memory):
            steps = run()
        return Turn(steps, max(before, matmul_peak(device, arguments.dtype)), memory)

    _turn = turn


def _take_turn() -> Turn:
    return _turn()


def padded_tokens(steps: Sequence[Sequence[TokenizedRow]]) -> int:
    """What right padding to each step's longest side makes of its 2B sides."""
    return sum(2 * len(rows) * max(max(row.lengths) for row in rows) for rows in steps)


def pairs_per_s(timed: Sequence[TimedStep], batch: int) -> float:
    kept = timed[WARM_UP_STEPS:]
    return batch * len(kept) / sum(step.seconds for step in kept)


def deltas(ours: Sequence[TimedStep], theirs: Sequence[TimedStep]) -> tuple[float, float]:
    """The largest difference in loss, and the largest relative one in gradient norm."""
    loss = max(abs(a.loss - b.loss) for a, b in zip(ours, theirs, strict=True))
    norm = max(abs(a.grad_norm / b.grad_norm - 1) for a, b in zip(ours, theirs, strict=True))
    return loss, norm


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and the result."""
    if arguments.pairs % arguments.batch or arguments.pairs // arguments.batch <= WARM_UP_STEPS:
        raise SystemExit(
            f"--pairs ({arguments.pairs}) must be a multiple of --batch ({arguments.batch}), more than "
            f"{WARM_UP_STEPS} times it: the first {WARM_UP_STEPS} steps are dropped"
        )
    device = device_of(arguments)
    tokenizer = open_tokenizer(arguments)
    model = open_model(arguments)
    rows = shuffled_rows(arguments.data, tokenizer, count=arguments.pairs, max_length=arguments.max_length)
    steps = in_steps(rows, arguments.batch)
    cost = ModelCost.of(model)
    counted = OurStep(model, tokenizer, arguments, share=True, path=arguments.attn)  # it never runs here
    sides = [Side(name, arguments, rows) for name in ("ours", arguments.against)]
    ours, baseline = sides
    for number in range(arguments.rounds):
        for side in sides:
            side.take_turn()
        fast, slow = (pairs_per_s(side.turns[-1].steps, arguments.batch) for side in sides)
        print(
            f"round {number + 1}: ours {fast:.2f} pairs/s, {baseline.name} {slow:.2f}, "
            f"ratio {fast / slow:.2f}, matmul peak {ours.turns[-1].peak_flops / 1e9:.0f} GFLOP/s",
            flush=True,
        )
    prepared = [counted.prepare(step, counted.index(step)) for step in steps]
    result = compare(arguments, *([turn.steps for turn in side.turns] for side in sides))
    result["attn"] = counted.path
    result["tokens"] = count_tokens(rows, steps, prepared)
    result |= utilisation(cost, prepared, counted, steps, ours.turns)
    if device.type == "cuda":
        result["peak_memory_gib"] = {
            side.name: max(gib for turn in side.turns for gib in turn.peak_memory_gib) for side in sides
        }
    return result | {"machine": machine(device)}


def compare(
    arguments: argparse.Namespace, ours: list[list[TimedStep]], theirs: list[list[TimedStep]]
) -> dict[str, Any]:
    """Speeds, ratio and how far apart the two trajectories are."""
    fast = [pairs_per_s(timed, arguments.batch) for timed in ours]
    slow = [pairs_per_s(timed, arguments.batch) for timed in theirs]
    apart = [deltas(a, b) for a, b in zip(ours, theirs, strict=True)]
    return compared("train", arguments, "pairs_per_s", fast, slow) | {
        "against": arguments.against,
        "pairs": arguments.pairs,
        "batch": arguments.batch,
        "max_tokens": arguments.max_tokens,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "max_loss_delta": max(loss for loss, _ in apart),
        "max_grad_norm_delta": max(norm for _, norm in apart),
    }


def count_tokens(
    rows: Sequence[TokenizedRow],
    steps: Sequence[Sequence[TokenizedRow]],
    prepared: Sequence[Sequence[PackedBatch]],
) -> dict[str, int]:
    """Of all steps: as TRL pads them, without padding, and as we compute them."""
    return {
        "padded": padded_tokens(steps),
        "unpadded": sum(sum(row.lengths) for row in rows),
        "shared": sum(batch.num_tokens for batches in prepared for batch in batches),
        "microbatches": sum(len(batches) for batches in prepared),
    }


def utilisation(
    cost: ModelCost,
    prepared: Sequence[Sequence[PackedBatch]],
    counted: OurStep,
    steps: Sequence[Sequence[TokenizedRow]],
    turns: Sequence[Turn],
) -> dict[str, Any]:
    """Our share of the matmul peak, by the definition and by the FLOPs executed: each round's of its peak."""
    kept = list(zip(prepared, steps, strict=True))[WARM_UP_STEPS:]
    defined = sum(cost.training(batches, counted.distinct_tokens(rows)) for batches, rows in kept)
    executed = sum(cost.executed(batches) for batches, _ in kept)
    at_peak = [sum(step.seconds for step in turn.steps[WARM_UP_STEPS:]) * turn.peak_flops for turn in turns]
    peaks = [turn.peak_flops / 1e9 for turn in turns]
    return {
        "mfu": spread([defined / flops for flops in at_peak])["median"],
        "mfu_spread": spread([defined / flops for flops in at_peak]),
        "mfu_executed": spread([executed / flops for flops in at_peak])["median"],
        "flops_a_step": defined / len(kept),
        "peak_gflops": {"best": max(peaks), "median": spread(peaks)["median"]},
    }


def report(result: dict[str, Any]) -> None:
    """The result in words."""
    tokens = result["tokens"]
    print(
        f"ours {result['pairs_per_s']:.2f} pairs/s, {result['against']} "
        f"{result['baseline_pairs_per_s']:.2f}: "
        f"ratio {shown(list(result['ratio_spread'].values()))}\n"
        f"tokens: padded {tokens['padded']}, unpadded {tokens['unpadded']}, shared {tokens['shared']} "
        f"(bound {tokens['padded'] / tokens['shared']:.2f}); {tokens['microbatches']} micro-batches\n"
        f"max loss delta {result['max_loss_delta']:.1e}, max gradient norm delta "
        f"{result['max_grad_norm_delta']:.1e} (relative)\n"
        f"MFU {result['mfu']:.2f}, of executed FLOPs {result['mfu_executed']:.2f}, of a matmul peak of "
        f"{result['peak_gflops']['best']:.0f} GFLOP/s"
    )


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=128, help="the first so many of a shuffle")
    parser.add_argument("--against", choices=("trl", "packed"), default="trl")
    add_step_arguments(parser)
    parser.add_argument("--attn", choices=get_args(AttentionPath), help="attention path (default: as chosen)")
    return parser.parse_args(words)


if __name__ == "__main__":
    run_bench(parse_arguments(), measure, report)
