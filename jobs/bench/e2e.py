"""The product beside its own step, and its whole wall time beside TRL's.

    python jobs/bench/e2e.py --model DIR --data FILE --pairs 1000

`rayrm train` runs in a process of its own with one Ray Train worker, on a file of pairs; the bare step
(`OurStep` of steps.py) runs in this process: the same weights, pairs, order, settings and number of threads
(the worker is given as many CPUs, and Ray sets its threads by them). They take turns, `--rounds` times, over
the first three logging intervals of the pairs: short turns, and the product's each between two of the bare
step's, since a machine's clock may drift by half within minutes. `ratio` is the product's steady pairs/s,
from its own `metrics.jsonl` without the first logging interval, over the bare step's over the same steps in
the turns before and after; the median of the rounds' ratios. `max_loss_delta` is between the two losses of
each logging interval.

`wall_s` is of one more run on all pairs, from the start of the process to the saved model: Ray's start,
reading and tokenizing included. `trl_wall_s` is that of a plain TRL script (trl_train.py) on the same file,
with the same settings; `wall_ratio` = TRL's over ours. Needs ray and trl.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w
import torch
from measuring import (
    bench_parser,
    compared,
    device_of,
    machine,
    open_model,
    open_tokenizer,
    run_bench,
    shown,
    shuffled_pairs,
)
from steps import OurStep, TimedStep, add_step_arguments, in_steps, settings_of

from rayrm.data.preference import PreferenceRow
from rayrm.train.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]
LOGGING_STEPS = 10
INTERVALS = 3  # of a round; the first is dropped


@dataclass(frozen=True, slots=True)
class ProductRun:
    """One `rayrm train`: its seconds from start to saved model, and its records of logging intervals."""

    wall_s: float
    records: list[dict[str, float]]


def write_pairs(path: Path, pairs: Sequence[PreferenceRow]) -> None:
    """The pairs as both trainers read them."""
    with path.open("w", encoding="utf-8") as out:
        for pair in pairs:
            chosen, rejected = (
                pair.completions[place] for place in sorted((0, 1), key=pair.ranks.__getitem__)
            )
            row = {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
            out.write(json.dumps({key: text for key, text in row.items() if text is not None}) + "\n")


def timed_process(command: Sequence[str], *, threads: int, threads_by_ray: bool) -> float:
    """Seconds of a process that must succeed."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("OMP_NUM_THREADS", None)
    if not threads_by_ray:
        environment["OMP_NUM_THREADS"] = str(threads)
    began = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            process.terminate()  # not killed, as `subprocess.run` does: it has a Ray cluster to end
            raise
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{said}")
    return seconds


def run_product(
    arguments: argparse.Namespace, home: Path, settings: dict[str, Any], pairs: str, name: str, threads: int
) -> ProductRun:
    """`rayrm train` with one worker on a file of pairs."""
    gpu = not settings["use_cpu"]
    output_dir = home / name
    run = {
        "model": {"name": str(home / "base")},
        "data": {"train": str(home / pairs)},
        "reward": {
            "output_dir": str(output_dir),
            "shuffle": False,
            "logging_steps": LOGGING_STEPS,
            "max_tokens_per_microbatch": arguments.max_tokens,
            **settings,
        },
        "cluster": {
            "num_workers": 1,
            "use_gpu": gpu,
            "resources_per_worker": {"CPU": threads, **({"GPU": 1} if gpu else {})},
        },
    }
    file = home / f"{name}.toml"
    file.write_text(tomli_w.dumps(run), encoding="utf-8")
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), str(file)]
    wall_s = timed_process(command, threads=threads, threads_by_ray=True)
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return ProductRun(wall_s, [record for record in lines if "pairs_per_second" in record])


def steady(records: Sequence[dict[str, float]], batch: int) -> float:
    """Pairs/s over all logging intervals but the first."""
    kept = records[1:]
    pairs = LOGGING_STEPS * batch
    return pairs * len(kept) / sum(pairs / record["pairs_per_second"] for record in kept)


def steady_step(turns: Sequence[Sequence[TimedStep]], num_intervals: int, batch: int) -> float:
    """The bare step's pairs/s over the same steps, in these turns together."""
    kept = [step for timed in turns for step in timed[LOGGING_STEPS : LOGGING_STEPS * num_intervals]]
    return batch * len(kept) / sum(step.seconds for step in kept)


def loss_delta(records: Sequence[dict[str, float]], timed: Sequence[TimedStep]) -> float:
    """The largest difference between the mean losses of a logging interval."""
    deltas = []
    for number, record in enumerate(records):
        steps = timed[LOGGING_STEPS * number : LOGGING_STEPS * (number + 1)]
        deltas.append(abs(record["loss"] - sum(step.loss for step in steps) / len(steps)))
    return max(deltas)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds, TRL's run, and the result."""
    least = 2 * LOGGING_STEPS * arguments.batch
    if arguments.pairs < least or arguments.pairs % arguments.batch:
        raise SystemExit(
            f"--pairs ({arguments.pairs}) must be a multiple of --batch ({arguments.batch}) and at least "
            f"{least}, two logging intervals: the first is dropped"
        )
    device = device_of(arguments)
    threads = torch.get_num_threads()
    tokenizer, model = open_tokenizer(arguments), open_model(arguments)
    settings = settings_of(arguments, device)
    pairs, rows = zip(
        *shuffled_pairs(arguments.data, tokenizer, count=arguments.pairs, max_length=arguments.max_length),
        strict=True,
    )
    short = min(len(rows), INTERVALS * LOGGING_STEPS * arguments.batch)
    steps = in_steps(rows[:short], arguments.batch)
    products: list[ProductRun] = []
    # Kept over all rounds: memory that is mapped anew in each would be the bare step's alone to pay for.
    with tempfile.TemporaryDirectory() as scratch, keep_freed_memory(device):
        home = Path(scratch)
        write_pairs(home / "pairs.jsonl", pairs)
        write_pairs(home / "short.jsonl", pairs[:short])
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(home / "base")
        tokenizer.save_pretrained(home / "base")
        step = OurStep(model, tokenizer, arguments, share=True)
        bare = [step.run(steps)]
        for number in range(arguments.rounds):
            products.append(
                run_product(arguments, home, settings, "short.jsonl", f"round-{number + 1}", threads)
            )
            bare.append(step.run(steps))
            (fast,), (alone,) = speeds(arguments, products[-1:], bare[-2:])
            print(
                f"round {number + 1}: product {fast:.2f} pairs/s, bare step {alone:.2f}, ratio "
                f"{fast / alone:.3f}",
                flush=True,
            )
        whole = run_product(arguments, home, settings, "pairs.jsonl", "whole", threads)
        print(f"all {len(pairs)} pairs: {whole.wall_s:.1f} s from start to saved model", flush=True)
        script = str(Path(__file__).with_name("trl_train.py"))
        told = [str(home / "base"), str(home / "pairs.jsonl"), str(home / "trl"), json.dumps(settings)]
        trl_wall_s = timed_process([sys.executable, script, *told], threads=threads, threads_by_ray=False)
    return compare(arguments, products, bare, whole, trl_wall_s) | {"machine": machine(device)}


def speeds(
    arguments: argparse.Namespace, products: Sequence[ProductRun], bare: Sequence[Sequence[TimedStep]]
) -> tuple[list[float], list[float]]:
    """Each round's steady pairs/s of the product, and of the bare step before and after it."""
    return [steady(run.records, arguments.batch) for run in products], [
        steady_step(around, len(run.records), arguments.batch)
        for around, run in zip(pairwise(bare), products, strict=True)
    ]


def compare(
    arguments: argparse.Namespace,
    products: list[ProductRun],
    bare: list[list[TimedStep]],
    whole: ProductRun,
    trl_wall_s: float,
) -> dict[str, Any]:
    """Speeds, ratios, wall times."""
    waits = [record["data_wait_s"] for run in [*products, whole] for record in run.records[1:]]
    return compared("e2e", arguments, "pairs_per_s", *speeds(arguments, products, bare)) | {
        "pairs": arguments.pairs,
        "batch": arguments.batch,
        "max_tokens": arguments.max_tokens,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "data_wait_s_per_interval": max(waits),
        "max_loss_delta": max(
            loss_delta(run.records, timed) for run, timed in zip(products, bare[1:], strict=True)
        ),
        "wall_s": whole.wall_s,
        "trl_wall_s": trl_wall_s,
        "wall_ratio": trl_wall_s / whole.wall_s,
    }


def report(result: dict[str, Any]) -> None:
    """The result in words."""
    print(
        f"product {result['pairs_per_s']:.2f} pairs/s, bare step {result['baseline_pairs_per_s']:.2f}: ratio "
        f"{shown(list(result['ratio_spread'].values()), 3)}; waits for data at most "
        f"{result['data_wait_s_per_interval']:.3f} s an interval of {LOGGING_STEPS} steps\n"
        f"start to saved model: {result['wall_s']:.1f} s, TRL {result['trl_wall_s']:.1f} s "
        f"({result['wall_ratio']:.2f} times)\n"
        f"max loss delta {result['max_loss_delta']:.1e}"
    )


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=1000, help="the first so many of a shuffle")
    add_step_arguments(parser)
    return parser.parse_args(words)


if __name__ == "__main__":
    # Terminated, it ends by an exception: the training that it waits for ends too, and its files go.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    run_bench(parse_arguments(), measure, report)
