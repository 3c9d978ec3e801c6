"""Kill a training run again and again, and see that it is the run that nobody killed.

    python jobs/soak.py --minutes 45
    python jobs/soak.py --configurations zero2-indexed --worker-kills 5 --driver-kills 1 --other-workers 1

Each configuration (ZeRO 0, 1, 2, 3, and LoRA under ZeRO-2; data indexed and streaming) is trained by `rayrm
train` on two workers, once whole and once with kills: SIGKILL to a worker, whose run goes on within
`max_failures`, and to the driver, whose command is typed again. Moments and victims are drawn from `--seed`.
A kill counts where training went on from an earlier step after it. Afterwards every logged metric that is no
clock's and the saved weights must be the same bits, and the row logs must show each pair exactly once in each
epoch, in the same steps. `--other-workers N` goes on from a killed driver's last
checkpoint with N workers instead: losses and gradient norms within 1e-5.

With time left of `--minutes` configurations get further rounds with other moments. The last line printed is
the result as JSON; the status is 1 where a run differed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rayrm.train.checkpoint import checkpoints, step_of
from rayrm.train.records import PROGRESS, read_progress, read_records
from rayrm.train.row_log import read_row_log

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "lora": 2}
MODES = ("indexed", "streaming")
CONFIGURATIONS = [f"{stage}-{mode}" for mode in MODES for stage in STAGES]
ROWS_PER_STEP, NUM_PAIRS, NUM_STEPS, SAVE_EVERY = 16, 480, 60, 7
CLOCKED = ("per_second", "runtime", "_s")
TOLERANCE = 1e-5
LEARNING_RATE = 1e-4
"""A training amplifies rounding, which another number of workers does otherwise: in 60 steps from 1e-7 to
1e-5 at 2e-4, to 1e-1 at 1e-3, killed or not."""
START_LIMIT_S, RUN_LIMIT_S = 300.0, 900.0


@dataclass(slots=True)
class Outcome:
    """What a configuration's rounds came to."""

    configuration: str
    worker_kills: int = 0
    driver_kills: int = 0
    problems: list[str] = field(default_factory=list)
    other_workers_delta: float | None = None


def prepare(home: Path, seed: int = 0) -> Path:
    """A small model with random weights, and shards of the demo's preferences; returns the run file."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    from rayrm.demo.preferences import make_preferences

    rows, _ = make_preferences(2400, 0)
    rows = rows[:NUM_PAIRS]
    shards = home / "pairs"
    shards.mkdir(parents=True)
    for number in range(8):
        mine = rows[number::8]
        (shards / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine), "utf-8")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator((json.dumps(row) for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=320, intermediate_size=800, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(shape).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    file = home / "run.toml"
    file.write_text(
        f"""
        [model]
        name = {json.dumps(str(home / "base"))}
        [data]
        train = {json.dumps(str(shards))}
        shuffle_window = 64
        [reward]
        max_steps = {NUM_STEPS}
        learning_rate = {LEARNING_RATE}
        per_device_train_batch_size = {ROWS_PER_STEP // 2}
        max_length = 512
        bf16 = false
        use_cpu = true
        gradient_checkpointing = false
        logging_steps = 1
        save_steps = {SAVE_EVERY}
        save_total_limit = 2
        log_rows = true
        disable_tqdm = true
        [cluster]
        num_workers = 2
        max_failures = 50
        """
    )
    return file


def words_of(configuration: str) -> list[str]:
    """What of a run file makes the configuration."""
    stage, _, mode = configuration.partition("-")
    return [
        f"zero_stage={STAGES[stage]}",
        f"data.mode={mode}",
        *(["model.lora.r=4"] if stage == "lora" else []),
    ]


class Run:
    """`rayrm train` in a process of its own, typed again when its driver was killed."""

    def __init__(self, file: Path, output_dir: Path, words: Sequence[str]) -> None:
        self.output_dir = output_dir
        self._command = [
            sys.executable, "-m", "rayrm.cli", "train", str(file), f"output_dir={output_dir}", *words,
        ]  # fmt: skip
        self._log = output_dir.with_suffix(".log")
        self.start()

    def start(self, *more: str) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([*self._command, *more], stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        """Until the run ends; anything but success is an error with its last lines."""
        try:
            status = self.process.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill_driver()
            raise SystemExit(
                f"{self.output_dir} did not end in {RUN_LIMIT_S:.0f} s:\n{self.tail()}"
            ) from None
        if status:
            raise SystemExit(f"{self.output_dir} ended with status {status}:\n{self.tail()}")

    def wait_for_step(self, step: int, since: float) -> bool:
        """Until training stands at `step`, or beyond, and has said so after `since`; False where it ended."""

        def stands() -> int:
            file = self.output_dir / PROGRESS
            fresh = file.exists() and file.stat().st_mtime > since
            return int(read_progress(self.output_dir).get("step", -1)) if fresh else -1

        return self._wait_for(stands, step, "step")

    def wait_for_checkpoint(self) -> bool:
        """Until the run has a whole one; False where it ended before."""
        return self._wait_for(lambda: len(checkpoints(self.output_dir)), 1, "checkpoint")

    def _wait_for(self, stands: Callable[[], int], at: int, what: str) -> bool:
        deadline = time.monotonic() + START_LIMIT_S
        while stands() < at:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.output_dir} does not come to {what} {at}:\n{self.tail()}")
            time.sleep(0.05)
        return self.process.poll() is None

    def workers(self) -> list[psutil.Process]:
        """The training workers of this run: of the driver's descendants those that Ray calls so."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_worker(self, draw: random.Random) -> bool:
        """SIGKILL to one of them, as soon as there is one; False where the run ended before."""
        while self.process.poll() is None:
            workers = sorted(self.workers(), key=lambda process: process.pid)
            if workers:
                draw.choice(workers).kill()
                return True
            time.sleep(0.1)
        return False

    def kill_driver(self) -> None:
        """SIGKILL to the driver and to all that it started, as where a machine goes.

        Its workers alone would live on for seconds, and many steps of a run as short as these.
        """
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(started, timeout=60)

    def tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])


def untimed(output_dir: Path) -> list[dict[str, Any]]:
    """A run's records, without what a clock measured."""
    return [
        {key: value for key, value in record.items() if not key.endswith(CLOCKED)}
        for record in read_records(output_dir)
    ]


def differences(whole: Path, killed: Path) -> Iterator[str]:
    """What of the killed run is not as in the whole one."""
    ours, theirs = untimed(killed), untimed(whole)
    if not NUM_STEPS < len(ours) == len(theirs):
        yield f"{len(ours)} records, {len(theirs)} in the whole run"
    for mine, other in zip(ours, theirs, strict=False):
        names = [name for name in {**other, **mine} if mine.get(name) != other.get(name)]
        if names:
            found, wanted = mine.get(names[0]), other.get(names[0])
            yield f"step {other['step']}: {names[0]} is {found}, {wanted} in the whole run"
            break
    yield from not_once(killed)
    if rows_by_step(killed) != rows_by_step(whole):
        yield "a step was made of other rows than in the whole run"
    if weights_of(killed) != weights_of(whole):
        yield "the saved weights are not those of the whole run"


def weights_of(output_dir: Path) -> dict[str, str]:
    """The hash of each file of weights that the run ended with."""
    files = sorted(output_dir.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{output_dir} has saved no weights")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rows_by_step(output_dir: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for line in read_row_log(output_dir):
        found.setdefault(line["step"], []).extend(line["rows"])
    return {step: sorted(rows) for step, rows in found.items()}


def not_once(output_dir: Path) -> Iterator[str]:
    """Rows that a whole epoch has not exactly once, by the logs of what was packed."""
    epochs: dict[int, Counter[str]] = {}
    for line in read_row_log(output_dir):
        epochs.setdefault(line["epoch"], Counter()).update(line["rows"])
    for epoch in range(NUM_STEPS * ROWS_PER_STEP // NUM_PAIRS):
        seen = epochs.get(epoch, Counter())
        if len(seen) != NUM_PAIRS or set(seen.values()) != {1}:
            most = max(seen.values(), default=0)
            yield f"epoch {epoch}: {len(seen)} of {NUM_PAIRS} pairs, at most {most} times"


def survive(run: Run, outcome: Outcome, worker_kills: int, driver_kills: int, draw: random.Random) -> None:
    """Let a run come to its end through the kills."""
    kinds = ["worker"] * worker_kills + ["driver"] * driver_kills
    draw.shuffle(kinds)
    steps = sorted(draw.sample(range(2, NUM_STEPS - 12), len(kinds)))
    since = 0.0
    for kind, step in zip(kinds, steps, strict=True):
        interrupted = run.wait_for_step(step, since)
        if interrupted:
            time.sleep(draw.uniform(0, 0.4))
            if kind == "worker":
                run.kill_worker(draw)
            else:
                run.kill_driver()
                run.start()
            # The other worker may still have been within a step.
            time.sleep(1.0)
            since = time.time()
            interrupted = run.wait_for_step(0, since) and read_progress(run.output_dir)["step"] < NUM_STEPS
        if not interrupted:
            outcome.problems.append(f"a {kind} was to be killed at step {step}, and the run had ended")
            break
        if kind == "worker":
            outcome.worker_kills += 1
        else:
            outcome.driver_kills += 1
        print(f"  killed a {kind} at step {step} or a little later", file=sys.stderr, flush=True)
    run.wait()


def on_other_workers(file: Path, home: Path, outcome: Outcome, workers: int, whole: Path) -> None:
    """Kill a run as a machine that goes does, after the first checkpoint; go on with other workers."""
    run = Run(file, home / "other", words_of(outcome.configuration))
    if not run.wait_for_checkpoint():
        raise SystemExit(f"{run.output_dir} ended before it was killed:\n{run.tail()}")
    run.kill_driver()
    outcome.driver_kills += 1
    begun = step_of(checkpoints(run.output_dir)[-1])
    if begun > NUM_STEPS // 2:
        outcome.problems.append(f"the driver was killed too late, at step {begun}: other workers had no part")
    run.start(f"cluster.num_workers={workers}", f"per_device_train_batch_size={ROWS_PER_STEP // workers}")
    run.wait()
    delta = 0.0
    for mine, other in zip(untimed(run.output_dir), untimed(whole), strict=True):
        for name in {"loss", "grad_norm"} & other.keys():
            delta = max(delta, abs(mine[name] - other[name]) / max(1.0, abs(other[name])))
    outcome.other_workers_delta = delta
    if delta > TOLERANCE:
        outcome.problems.append(f"on {workers} worker(s) a loss or norm differs by {delta:.1e}")
    outcome.problems += not_once(run.output_dir)


def soak(arguments: argparse.Namespace, home: Path) -> list[Outcome]:
    began = time.monotonic()
    names = arguments.configurations.split(",") if arguments.configurations else CONFIGURATIONS
    if unknown := [name for name in names if name not in CONFIGURATIONS]:
        raise SystemExit(f"--configurations: {unknown[0]!r} is none of {', '.join(CONFIGURATIONS)}")
    file = prepare(home)
    outcomes = {name: Outcome(name) for name in names}
    turn = 0
    while turn == 0 or time.monotonic() - began < 60 * arguments.minutes:
        for name, outcome in outcomes.items():
            if turn and time.monotonic() - began > 60 * arguments.minutes:
                break
            whole = home / f"{name}-whole"
            print(f"{name}: round {turn + 1}", file=sys.stderr, flush=True)
            if not whole.exists():
                Run(file, whole, words_of(name)).wait()
                outcome.problems += not_once(whole)
            draw = random.Random(f"{arguments.seed} {name} {turn}")
            run = Run(file, home / f"{name}-killed-{turn}", words_of(name))
            survive(run, outcome, arguments.worker_kills, arguments.driver_kills, draw)
            outcome.problems += differences(whole, run.output_dir)
            shutil.rmtree(run.output_dir)
            if arguments.other_workers and not turn:
                on_other_workers(file, home, outcome, arguments.other_workers, whole)
                shutil.rmtree(home / "other")
        turn += 1
        if not arguments.minutes:
            break
    return list(outcomes.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=0, help="go on with further rounds so long (one round)"
    )
    parser.add_argument("--configurations", help=f"some of {','.join(CONFIGURATIONS)} (all)")
    parser.add_argument("--worker-kills", type=int, default=2, help="a round and configuration (2)")
    parser.add_argument("--driver-kills", type=int, default=1, help="a round and configuration (1)")
    parser.add_argument("--other-workers", type=int, default=0, help="also go on with so many workers")
    parser.add_argument("--seed", type=int, default=0, help="draws moments and victims (0)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayrm-soak-") as home:
        outcomes = soak(arguments, Path(home))
    for outcome in outcomes:
        kills = f"{outcome.worker_kills} workers and {outcome.driver_kills} drivers killed"
        verdict = "; ".join(dict.fromkeys(outcome.problems)) or "the same run"
        print(f"{outcome.configuration:<16} {kills}: {verdict}")
    result = {
        "soak": {
            outcome.configuration: {
                "worker_kills": outcome.worker_kills,
                "driver_kills": outcome.driver_kills,
                "problems": outcome.problems,
                "other_workers_delta": outcome.other_workers_delta,
            }
            for outcome in outcomes
        },
        "kills": sum(outcome.worker_kills + outcome.driver_kills for outcome in outcomes),
        "same": not any(outcome.problems for outcome in outcomes),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if result["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
