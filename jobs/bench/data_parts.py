"""The parts of `data.py`, each run in a process of its own; the last line printed is its result, as JSON.

python jobs/bench/data_parts.py PART ...
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rayrm.data.blocks import index_of, tokenized_tables
from rayrm.data.ingest import ingest
from rayrm.data.order import Cursor, Order
from rayrm.data.packing import pack_rows
from rayrm.data.planning import plan_step
from rayrm.data.preference import parse_row
from rayrm.data.sources import plan_sources, read_work
from rayrm.data.steps import IndexedSteps, Step
from rayrm.data.streaming import open_stream
from rayrm.data.tokenize import prepare_tokenizer
from rayrm.model.reward_model import load_tokenizer
from rayrm.own_ray import ensure_ray

MAX_LENGTH, ROWS_PER_STEP, WINDOW, MAX_TOKENS = 1024, 64, 4096, 8192
SPEED_PAIRS = 4096


def tokenizer_of(model: str) -> Any:
    return prepare_tokenizer(load_tokenizer(model), eos_token=None, pad_token=None, chat_template_path=None)


def packed(step: Step, rank: int, num_ranks: int) -> int:
    """Plan a step and pack a rank's share, as a training worker does; the rows packed."""
    plan = plan_step(step.index.costs(share=True), num_ranks=num_ranks, max_tokens=MAX_TOKENS)
    count = 0
    for microbatch in plan[rank]:
        pack_rows(step.fetch(microbatch.rows), 0, share=True, weights=microbatch.weights)
        count += len(microbatch.rows)
    return count


@contextmanager
def streamed(model: str, pairs: str, num_ranks: int) -> Iterator[Any]:
    source = open_stream(pairs, tokenizer_of(model), max_length=MAX_LENGTH)
    with source.started(
        rows_per_step=ROWS_PER_STEP,
        num_ranks=num_ranks,
        seed=0,
        window=WINDOW,
        shuffle=True,
        drop_last=False,
        quarantine_path=Path(os.devnull),
        max_bad_row_fraction=0.01,
        max_tasks=None,
    ) as steps:
        yield steps


def first(model: str, few: str, many: str, rounds: str) -> dict[str, list[float]]:
    """Seconds to the first packed batch; a round before the first, uncounted, starts Ray's processes."""
    ensure_ray()
    found: dict[str, list[float]] = {"few": [], "many": []}
    for turn in range(int(rounds) + 1):
        for name, pairs in (("few", few), ("many", many)):
            began = time.perf_counter()
            with streamed(model, pairs, 1) as steps:
                packed(next(steps.steps(Cursor())), 0, 1)
                if turn:
                    found[name].append(time.perf_counter() - began)
    return found


def speed(model: str, pairs: str, rounds: str) -> dict[str, list[float]]:
    """Pairs/s of one core: lines to planned micro-batches, and the bare tokenizer on the same texts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizer_of(model)
    (shard,) = islice(sorted(Path(pairs).glob("*.jsonl")), 1)
    lines = shard.read_text("utf-8").splitlines(keepends=True)[:SPEED_PAIRS]
    file = shard.with_name(".speed.jsonl")
    file.write_text("".join(lines), "utf-8")
    rows = [parse_row(json.loads(line)) for line in lines]
    texts = [
        tokenizer.apply_chat_template([*row.prompt, *completion], tokenize=False)
        for row in rows
        for completion in row.completions
    ]
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(int(rounds) + 1):
        began = time.perf_counter()
        for piece in plan_sources(str(file), max_rows=None, name="pairs").work:
            for table in tokenized_tables(read_work(piece), tokenizer, MAX_LENGTH):
                index = index_of(table).rows
                for begin in range(0, index.num_rows, ROWS_PER_STEP):
                    rows_of = np.arange(begin, min(begin + ROWS_PER_STEP, index.num_rows))
                    plan_step(index.take(rows_of).costs(share=True), num_ranks=1, max_tokens=MAX_TOKENS)
        middle = time.perf_counter()
        for begin in range(0, len(texts), 1024):
            tokenizer(texts[begin : begin + 1024], add_special_tokens=False)
        end = time.perf_counter()
        if turn:
            found["ours"].append(len(rows) / (middle - began))
            found["bare"].append(len(rows) / (end - middle))
    file.unlink()
    return found


class Memory(threading.Thread):
    """The most memory of this process and of those it started, by what they are, seen four times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, float] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.ended.wait(0.25):
            sums: dict[str, float] = {"driver": me.memory_full_info().uss}
            for process in me.children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    kind = next((k for k in ("Dispatcher", "Rank", "MapBatches") if k in title), None)
                    if kind is not None:
                        name = {"Dispatcher": "dispatcher", "Rank": "ranks", "MapBatches": "tasks"}[kind]
                        uss = process.memory_full_info().uss
                        # Of the tasks' processes, which come and go, the largest.
                        sums[name] = max(sums.get(name, 0.0), uss)
                except psutil.Error:
                    continue
            for name, size in sums.items():
                self.peaks[name] = max(self.peaks.get(name, 0.0), size)


def memory(model: str, pairs: str) -> dict[str, Any]:
    """One epoch to two ranks; the most memory of each kind of process, in MiB."""
    import ray

    ensure_ray()

    class Rank:
        def drain(self, steps: Any, rank: int) -> int:
            count = 0
            for step in steps.steps(Cursor()):
                count += packed(step, rank, 2)
                if step.after.epoch:
                    return count
            raise AssertionError

    watch = Memory()
    with streamed(model, pairs, 2) as steps:
        ranks = [ray.remote(num_cpus=1)(Rank).remote() for _ in range(2)]
        watch.start()
        began = time.perf_counter()
        counts = ray.get([actor.drain.remote(steps, rank) for rank, actor in enumerate(ranks)])
        elapsed = time.perf_counter() - began
        watch.ended.set()
        watch.join()
    mib = {name: size / 2**20 for name, size in watch.peaks.items()}
    return {"mib": mib, "pairs_per_s": sum(counts) / elapsed}


def resume(model: str, pairs: str, cache: str) -> dict[str, float]:
    """Indexed: fill the cache, then start anew at 0% and at 90% of an epoch, each to its first batch."""
    ensure_ray()
    tokenizer = tokenizer_of(model)

    def begin(share: float) -> float:
        began = time.perf_counter()
        rows = ingest(pairs, tokenizer, max_length=MAX_LENGTH, token_cache=cache)
        steps = IndexedSteps(rows, Order(rows.num_rows, ROWS_PER_STEP, seed=0))
        packed(next(steps.steps(Cursor(0, int(share * steps.steps_per_epoch)))), 0, 1)
        return time.perf_counter() - began

    return {"fill": begin(0.0), "begin": begin(0.0), "at_90_percent": begin(0.9)}


def wait(home: str) -> dict[str, float]:
    """The demo's training, streamed: seconds waiting for data in 100 steps, and their share of the time."""
    from peft import LoraConfig
    from ray.train import ScalingConfig

    from rayrm import DataConfig, RewardTrainer
    from rayrm.demo.base_model import prepare_model
    from rayrm.demo.preferences import write_preferences
    from rayrm.demo.story import LAYERS, NUM_PAIRS, TARGETS, recipe

    base = Path(home) / f"smollm2-{LAYERS}"
    if not (base / "config.json").exists():
        prepare_model(base, LAYERS, system_turn=False)
    train_file, _ = write_preferences(Path(home) / "demo-data", NUM_PAIRS, 0)
    output_dir = Path(home) / f"demo-run-{os.getpid()}"
    args = recipe(output_dir, 100)
    args.eval_on_start = False
    trainer = RewardTrainer(
        str(base),
        args,
        train_dataset=str(train_file),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="SEQ_CLS"),
        scaling_config=ScalingConfig(num_workers=2),
        data_config=DataConfig(mode="streaming"),
    )
    trainer.train()
    records = [record for record in trainer.state.log_history if "data_wait_s" in record]
    per_step = args.per_device_train_batch_size * 2
    seconds = sum(args.logging_steps * per_step / record["pairs_per_second"] for record in records)
    waited = sum(record["data_wait_s"] for record in records)
    return {"steps": float(records[-1]["step"]), "wait_s": waited, "wait_share": waited / seconds}


def trl(model: str, pairs: str) -> float:
    """Seconds in which TRL's trainer prepares the pairs of a directory, before its first step."""
    import torch
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1,
    )  # fmt: skip
    tiny = LlamaForSequenceClassification(shape).to(torch.float32)
    disable_progress_bars()
    began = time.perf_counter()
    rows = load_dataset("json", data_files=str(Path(pairs) / "*.jsonl"), split="train")
    args = RewardConfig(f"{pairs}-trl", max_length=MAX_LENGTH, bf16=False, report_to="none")
    RewardTrainer(model=tiny, args=args, train_dataset=rows, processing_class=tokenizer)
    return time.perf_counter() - began


if __name__ == "__main__":
    part, *words = sys.argv[1:]
    print(json.dumps(globals()[part](*words)), flush=True)
