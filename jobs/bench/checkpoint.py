"""What a checkpoint costs the steps: how long the loop waits, and how slow steps are beside its writing.

    python jobs/bench/checkpoint.py --model DIR --data FILE
    python jobs/bench/checkpoint.py --model DIR --data FILE --batch 32 --every 4

One process trains as a worker of `rayrm train` does (`train_rank`), without Ray around it. Two trainings of
the same pairs take turns, `--rounds` times: one saves a checkpoint every `--every` steps, the other none.

    wait_s           the loop's wait at a save: for what was written before, and for a copy in host memory
    wait_share       that over the median step of the training that saves none
    slower_beside    the step after a save, beside the writing, over the same step of the other training
    write_s          from the save to the whole checkpoint, and its size, `written_mib`
    ratio            pairs/s of the training that saves over those of the one that does not

The first save is left out: it gets the memory that all later copies use again. So is the one after the last
step, for which no step waits.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from measuring import (
    bench_parser,
    compared,
    device_of,
    machine,
    open_model,
    open_tokenizer,
    run_bench,
    shown,
    shuffled_rows,
    spread,
)
from steps import add_step_arguments, settings_of

from rayrm import RewardConfig
from rayrm.data.tokenize import TokenizedRow
from rayrm.data.tokenized_set import TokenizedSet
from rayrm.train import loop
from rayrm.train.build import ModelSource
from rayrm.train.checkpoint_writer import CheckpointWriter
from rayrm.train.worker import TrainJob, train_rank


@dataclass(slots=True)
class Turn:
    """When each step of a training began and ended, and each save: when the loop called it, went on, and when
    the checkpoint was whole."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    saves: list[tuple[float, float]] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def seconds(self) -> list[float]:
        return [end - begin for begin, end in self.steps]

    @property
    def whole_s(self) -> float:
        """From the first step to the end of the last, with the waits between."""
        return self.steps[-1][1] - self.steps[0][0]

    def after_saves(self) -> list[int]:
        """The numbers of the steps that follow a save, but the first and the last."""
        return [
            next(number for number, (begin, _) in enumerate(self.steps) if begin >= end)
            for _, end in self.saves[1:-1]
        ]


def clocked(function: Callable[..., Any], found: list[tuple[float, float]]) -> Callable[..., Any]:
    """The function, which notes when each call began and ended."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        found.append((began, time.perf_counter()))
        return result

    return call


def take_turn(
    arguments: argparse.Namespace, rows: Sequence[TokenizedRow], output_dir: Path, *, saves: bool
) -> Turn:
    """One training of all rows."""
    turn, device = Turn(), device_of(arguments)
    settings = settings_of(arguments, device) | {
        "save_strategy": "steps" if saves else "no",
        "save_steps": arguments.every,
        "save_total_limit": 1,
        "shuffle": False,
        "logging_steps": 1,
    }
    job = TrainJob(
        config=RewardConfig(str(output_dir), **settings),
        source=ModelSource(open_model(arguments)),
        tokenizer=open_tokenizer(arguments),
        text_form="standard",
        train_set=TokenizedSet.from_rows(rows),
        eval_sets={},
        output_dir=output_dir,
        max_tokens=arguments.max_tokens,
    )
    kept = loop.train_step, CheckpointWriter.save, CheckpointWriter._complete

    def complete(writer: CheckpointWriter, *given: Any) -> None:
        kept[2](writer, *given)
        turn.wholes.append(time.perf_counter())
        final = writer.output_dir / f"checkpoint-{writer._step}"
        turn.num_bytes = sum(file.stat().st_size for file in final.rglob("*") if file.is_file())

    loop.train_step = clocked(kept[0], turn.steps)
    CheckpointWriter.save = clocked(kept[1], turn.saves)  # type: ignore[method-assign]
    CheckpointWriter._complete = complete  # type: ignore[method-assign]
    try:
        train_rank(job, lambda record: None)
    finally:
        loop.train_step, CheckpointWriter.save, CheckpointWriter._complete = kept  # type: ignore[method-assign]
    return turn


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and the result."""
    device = device_of(arguments)
    num_steps = arguments.pairs // arguments.batch
    if num_steps < 3 * arguments.every:
        raise SystemExit(
            f"--every ({arguments.every}): {num_steps} steps ({arguments.pairs} pairs) have no three "
            "checkpoints. Lower it, or raise --pairs"
        )
    rows = shuffled_rows(
        arguments.data, open_tokenizer(arguments), count=arguments.pairs, max_length=arguments.max_length
    )
    saving: list[Turn] = []
    bare: list[Turn] = []
    with tempfile.TemporaryDirectory(dir=arguments.output) as scratch:
        for number in range(arguments.rounds):
            bare.append(take_turn(arguments, rows, Path(scratch) / f"bare-{number}", saves=False))
            saving.append(take_turn(arguments, rows, Path(scratch) / f"saving-{number}", saves=True))
    ours, baseline = ([arguments.pairs / turn.whole_s for turn in turns] for turns in (saving, bare))
    step_s = median(second for turn in bare for second in turn.seconds)
    # The last one is after the last step.
    waits = [end - begin for turn in saving for begin, end in turn.saves[1:-1]]
    written = [
        whole - end
        for turn in saving
        for (_, end), whole in zip(turn.saves[1:-1], turn.wholes[1:-1], strict=True)
    ]
    beside = [
        turn.seconds[number] / other.seconds[number]
        for turn, other in zip(saving, bare, strict=True)
        for number in turn.after_saves()
    ]
    return compared("checkpoint", arguments, "pairs_per_s", ours, baseline) | {
        "machine": machine(device),
        "pairs": arguments.pairs,
        "batch": arguments.batch,
        "every": arguments.every,
        "step_s": step_s,
        "num_saves": len(waits),
        "wait_s": spread(waits),
        "wait_share": median(waits) / step_s,
        "wait_share_high": max(waits) / step_s,
        "slower_beside": spread(beside),
        "write_s": spread(written),
        "written_mib": saving[0].num_bytes / 2**20,
    }


def report(result: dict[str, Any]) -> None:
    """The result in words."""
    waits = shown(list(result["wait_s"].values()), 3)
    print(
        f"a step of {result['batch']} pairs takes {result['step_s']:.2f} s and waits {waits} s for a "
        f"checkpoint: {result['wait_share']:.1%} of a step ({result['wait_share_high']:.1%} at most, of "
        f"{result['num_saves']})\n"
        f"{result['written_mib']:.0f} MiB are on the disk {shown(list(result['write_s'].values()))} s later"
    )
    slower = shown(list(result["slower_beside"].values()))
    print(f"the step beside the writing takes {slower} times as long")
    ratio = shown(list(result["ratio_spread"].values()))
    print(f"with a checkpoint every {result['every']} steps the training runs at {ratio} of its speed")


def main() -> None:
    parser = bench_parser(__doc__)
    add_step_arguments(parser)
    parser.add_argument("--pairs", type=int, default=320, help="pairs of each training")
    parser.add_argument("--every", type=int, default=8, help="steps from one checkpoint to the next")
    parser.add_argument("--output", type=Path, help="write here (default: the temporary directory)")
    run_bench(parser.parse_args(), measure, report)


if __name__ == "__main__":
    main()
