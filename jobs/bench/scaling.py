"""Weak scaling on CPUs: as many pairs for each worker, one thread each; two workers beside one.

    python jobs/bench/scaling.py --model DIR --data FILE
    python jobs/bench/scaling.py --model DIR --data FILE --zero-stage 2

One worker and two take turns, `--rounds` times, each in fresh processes that run what a worker of `rayrm
train` runs (`train_rank`), without Ray around it, over gloo. Every turn trains on the same pairs in the same
order: two workers take 64 a step where one takes 32, so one makes twice the steps. The pairs of the first two
steps of two are a warm-up: there memory is mapped that later steps use again. `ratio` is the pairs/s of two
over one, of a step from forward to optimizer, the wait for data and the step's log line included; the median
of the rounds' ratios.

`collectives_s_per_step` is what a rank spends in collectives between forward and optimizer: `least` of the
two is about the reduction itself, what `most` is above it is waiting for the slower rank. The two ranks also
share the machine's memory bandwidth, which no count of collectives shows: the rest of what is lost.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from measuring import (
    bench_parser,
    check_dtype,
    compared,
    machine,
    open_model,
    open_tokenizer,
    run_bench,
    shown,
    shuffled_rows,
    spread,
)

from rayrm import RewardConfig
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.train import loop
from rayrm.train.build import ModelSource
from rayrm.train.evaluation import DEFAULT_TOKEN_BUDGET
from rayrm.train.worker import TrainJob, train_rank

WORKERS = 2
WARM_UP_STEPS = 2  # of two workers
LEARNING_RATE = 1e-5
# What torch's engine and DeepSpeed's stages call; DeepSpeed looks them up here too.
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "barrier",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "reduce_scatter",
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One training of all pairs: speed after the warm-up, seconds in collectives a step for each rank."""

    pairs_per_s: float
    collectives_s: list[float]
    tokens_computed: int


class CollectiveClock:
    """The seconds that this process's blocking collectives take in each step of `train_rank`."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._seconds = 0.0
        self._depth = 0
        for name in COLLECTIVES:
            setattr(dist, name, self._timed(getattr(dist, name)))
        self._train_step = loop.train_step
        loop.train_step = self._step

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return collective(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:  # one that is made of others counts once
                    self._seconds += time.perf_counter() - began

        return timed

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        self._seconds = 0.0
        totals = self._train_step(*args, **kwargs)
        self.steps.append(self._seconds)
        return totals


def job_of(arguments: argparse.Namespace, output_dir: Path, rows: Sequence[TokenizedRow]) -> TrainJob:
    """The turn as a rank is given it."""
    return TrainJob(
        config=RewardConfig(
            str(output_dir),
            per_device_train_batch_size=arguments.pairs_per_worker,
            max_length=arguments.max_length,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            num_train_epochs=1,
            gradient_checkpointing=False,
            bf16=arguments.dtype == "bf16",
            use_cpu=True,
            shuffle=False,
            logging_steps=1,
            save_strategy="no",
            zero_stage=arguments.zero_stage,
        ),
        source=ModelSource(open_model(arguments)),
        tokenizer=open_tokenizer(arguments),
        text_form="standard",
        train_set=TokenizedSet.from_rows(rows),
        eval_sets={},
        output_dir=output_dir,
        max_tokens=arguments.max_tokens,
    )


def rank_main(
    rank: int,
    num_workers: int,
    arguments: argparse.Namespace,
    output_dir: Path,
    rows: Sequence[TokenizedRow],
) -> None:
    """One worker's process."""
    torch.set_num_threads(arguments.threads)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["DS_ACCELERATOR"] = "cpu"
    job = job_of(arguments, output_dir, rows)
    if num_workers > 1:
        store = dist.FileStore(str(output_dir) + ".store", num_workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_workers)
    clock = CollectiveClock()
    train_rank(job, lambda record: None)
    (output_dir / f"collectives-{rank}.json").write_text(json.dumps(clock.steps))
    if num_workers > 1:
        dist.destroy_process_group()


def take_turn(
    arguments: argparse.Namespace, num_workers: int, rows: Sequence[TokenizedRow], output_dir: Path
) -> Turn:
    """Train in `num_workers` new processes."""
    torch.multiprocessing.spawn(
        rank_main, (num_workers, arguments, output_dir, rows), nprocs=num_workers, daemon=False
    )
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in lines if "pairs_per_second" in record]
    each = arguments.pairs_per_worker * num_workers
    warm_up = WARM_UP_STEPS * WORKERS // num_workers
    timed = steps[warm_up:]
    in_collectives = [
        mean(json.loads((output_dir / f"collectives-{rank}.json").read_text())[warm_up:])
        for rank in range(num_workers)
    ]
    return Turn(
        pairs_per_s=each * len(timed) / sum(each / record["pairs_per_second"] for record in timed),
        collectives_s=in_collectives,
        tokens_computed=int(steps[-1]["num_tokens_computed"]),
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and the result."""
    both = arguments.pairs_per_worker * WORKERS
    if arguments.pairs % both:
        raise SystemExit(
            f"--pairs ({arguments.pairs}) must be a multiple of {both}: one step of {WORKERS} workers"
        )
    check_dtype(arguments, torch.device("cpu"))
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # the workers inherit it
    torch.set_num_threads(arguments.threads)
    rows = shuffled_rows(
        arguments.data,
        open_tokenizer(arguments),
        count=WARM_UP_STEPS * both + arguments.pairs,
        max_length=arguments.max_length,
    )
    turns: dict[int, list[Turn]] = {1: [], WORKERS: []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            for num_workers, taken in turns.items():
                output_dir = Path(scratch) / f"round-{number}-workers-{num_workers}"
                taken.append(take_turn(arguments, num_workers, rows, output_dir))
            one, two = turns[1][-1], turns[WORKERS][-1]
            print(
                f"round {number + 1}: 1 worker {one.pairs_per_s:.2f} pairs/s, {WORKERS} workers "
                f"{two.pairs_per_s:.2f}, ratio {two.pairs_per_s / one.pairs_per_s:.2f}; seconds a step in "
                f"collectives: {', '.join(f'{seconds:.3f}' for seconds in two.collectives_s)}",
                flush=True,
            )
    return compare(arguments, turns[1], turns[WORKERS]) | {"machine": machine(torch.device("cpu"))}


def compare(arguments: argparse.Namespace, one: list[Turn], two: list[Turn]) -> dict[str, Any]:
    """Speeds and ratio, and where two workers spend what is lost."""
    slow, fast = [turn.pairs_per_s for turn in one], [turn.pairs_per_s for turn in two]
    return compared("scaling", arguments, "pairs_per_s", fast, slow) | {
        "pairs": arguments.pairs,
        "pairs_per_worker": arguments.pairs_per_worker,
        "max_tokens": arguments.max_tokens,
        "zero_stage": arguments.zero_stage,
        "step_s": spread([WORKERS * arguments.pairs_per_worker / speed for speed in fast])["median"],
        "collectives_s_per_step": {
            "least": spread([min(turn.collectives_s) for turn in two])["median"],
            "most": spread([max(turn.collectives_s) for turn in two])["median"],
        },
        "tokens": {"one": one[0].tokens_computed, "two": two[0].tokens_computed},
    }


def report(result: dict[str, Any]) -> None:
    """The result in words."""
    waits = result["collectives_s_per_step"]
    print(
        f"1 worker {result['baseline_pairs_per_s']:.2f} pairs/s, {WORKERS} workers "
        f"{result['pairs_per_s']:.2f}: ratio {shown(list(result['ratio_spread'].values()))}\n"
        f"in collectives {waits['least']:.3f} to {waits['most']:.3f} s of a step of {result['step_s']:.2f} s "
        f"(the slower rank waits least)\n"
        f"tokens computed: {result['tokens']['one']} by one, {result['tokens']['two']} by two"
    )


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--pairs", type=int, default=256, help="pairs timed in each turn")
    parser.add_argument("--pairs-per-worker", type=int, default=32, help="pairs a worker and step")
    parser.add_argument("--zero-stage", type=int, choices=range(4), help="DeepSpeed (default: torch)")
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_TOKEN_BUDGET, help="a micro-batch's budget")
    return parser.parse_args(words)


if __name__ == "__main__":
    run_bench(parse_arguments(), measure, report)
