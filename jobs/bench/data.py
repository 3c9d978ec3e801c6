"""Reading, tokenizing and planning: time to the first batch, speed, memory, resume, waiting in a training.

    python jobs/bench/data.py --model DIR
    python jobs/bench/data.py --model DIR --pairs 100000 --parts first,speed

`--model` is a directory with a tokenizer (SmolLM2's, by `jobs/prepare_model.py`). Pairs are generated:
dialogues of one turn from a vocabulary of English words, seed 0, in jsonl shards of 10,000 pairs. Parts, each
alone with `--parts`:

    first    streaming: seconds from a running Ray to the first packed batch, of 10,000 pairs and of
             `--pairs`, taking turns; `first_batch_ratio` is many over few. Beside it: how long TRL's
             `RewardTrainer` prepares 10,000 and 100,000 pairs before its first step.
    speed    one core: pairs/s from lines to planned micro-batches; `ratio` is that over the bare tokenizer's
             batch call on the same rendered texts, taking turns.
    memory   streaming one epoch to two ranks: the most memory (USS: what a process holds by itself, the
             object store not counted) of driver, dispatcher, ranks and tasks, of a tenth of `--pairs` and
             of all.
    resume   indexed, with a token cache: seconds to the first batch at 0% and at 90% of an epoch.
    wait     the demo's training in streaming mode: seconds waiting for data in 100 steps, and their share.

Each part runs in processes of its own. Timings mean something only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import SEED, machine, run_bench, shown, spread

FEW = 10_000
PAIRS_PER_SHARD = 10_000
PARTS = ("first", "speed", "memory", "resume", "wait")
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community "
    "name team the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by but not what all were we when your can said there use an each which she do how their if "
    "will up other about out many then them these so some her would make like him into has look two more "
    "write go see no Paris 1984 42% e.g. don't however, therefore; (perhaps) algorithm photosynthesis — "
    "naïve café "
)


def write_pairs(directory: Path, count: int) -> Path:
    """Shards of generated pairs; a directory that has them already is left as it is."""
    done = directory / ".whole"
    if done.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    draw, words = random.Random(SEED), WORDS.split()

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    for shard in range(-(-count // PAIRS_PER_SHARD)):
        with (directory / f"pairs-{shard:05}.jsonl").open("w", encoding="utf-8") as out:
            for _ in range(min(PAIRS_PER_SHARD, count - shard * PAIRS_PER_SHARD)):
                opening = text(2, 20)
                row = {
                    "prompt": [{"role": "user", "content": text(10, 60)}],
                    "chosen": [{"role": "assistant", "content": f"{opening} {text(10, 80)}"}],
                    "rejected": [{"role": "assistant", "content": f"{opening} {text(10, 80)}"}],
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    done.touch()
    return directory


def run_part(part: str, *words: object) -> Any:
    """What `data_parts.py` prints last for a part, run in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("data_parts.py")), part, *map(str, words)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        raise SystemExit(f"the part `{part}` failed with status {ran.returncode}; its messages stand above")
    return json.loads(ran.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"--parts: no part is called {unknown[0]!r}; they are {', '.join(PARTS)}")
    home = Path(arguments.work or tempfile.mkdtemp(prefix="rayrm-bench-data-")).absolute()
    model = str(Path(arguments.model).absolute())
    result: dict[str, Any] = {"bench": "data", "pairs": arguments.pairs, **machine(torch.device("cpu"))}

    def pairs(count: int) -> Path:
        return write_pairs(home / f"pairs-{count}", count)

    if "first" in parts:
        few, many = pairs(FEW), pairs(arguments.pairs)
        found = run_part("first", model, few, many, arguments.rounds)
        result |= {f"first_batch_{name}_s": spread(times) for name, times in found.items()}
        result["first_batch_ratio"] = median(found["many"]) / median(found["few"])
        for count in (FEW, 10 * FEW) if arguments.trl else ():
            result[f"trl_prepares_{count}_s"] = run_part("trl", model, pairs(count))
    if "speed" in parts:
        found = run_part("speed", model, pairs(FEW), arguments.rounds)
        ratios = [ours / bare for ours, bare in zip(found["ours"], found["bare"], strict=True)]
        result |= {"pairs_per_s_core": spread(found["ours"]), "tokenizer_pairs_per_s": spread(found["bare"])}
        result |= {"ratio": median(ratios), "ratio_spread": spread(ratios)}
    if "memory" in parts:
        for name, count in (("tenth", arguments.pairs // 10), ("all", arguments.pairs)):
            found = run_part("memory", model, pairs(count))
            result |= {f"memory_{name}_mib": found["mib"], f"stream_{name}_pairs_per_s": found["pairs_per_s"]}
        tenth, whole = result["memory_tenth_mib"], result["memory_all_mib"]
        result["memory_ratio"] = {name: whole[name] / tenth[name] for name in tenth}
    if "resume" in parts:
        found = run_part("resume", model, pairs(arguments.pairs), home / "cache")
        result |= {f"indexed_{name}_s": value for name, value in found.items()}
    if "wait" in parts:
        result |= {f"demo_{name}": value for name, value in run_part("wait", home).items()}
    return result


def report(result: dict[str, Any]) -> None:
    if "first_batch_ratio" in result:
        few, many = (shown(list(result[f"first_batch_{name}_s"].values())) for name in ("few", "many"))
        print(f"first batch: {few} s of {FEW:,} pairs, {many} s of {result['pairs']:,}: ", end="")
        print(f"ratio {result['first_batch_ratio']:.2f}")
        for count in (FEW, 10 * FEW):
            if f"trl_prepares_{count}_s" in result:
                print(f"  TRL prepares {count:,} pairs in {result[f'trl_prepares_{count}_s']:.1f} s")
    if "ratio" in result:
        speed = shown(list(result["pairs_per_s_core"].values()), 0)
        print(f"one core: {speed} pairs/s, {result['ratio']:.2f} of the bare tokenizer")
    if "memory_ratio" in result:
        for name, ratio in result["memory_ratio"].items():
            tenth, whole = (result[f"memory_{size}_mib"][name] for size in ("tenth", "all"))
            print(f"memory of {name}: {tenth:.0f} MiB of a tenth, {whole:.0f} of all: ratio {ratio:.2f}")
        print(f"  streamed {result['stream_all_pairs_per_s']:.0f} pairs/s with all cores")
    if "indexed_begin_s" in result:
        begin, later = result["indexed_begin_s"], result["indexed_at_90_percent_s"]
        print(f"indexed: first batch after {begin:.1f} s at 0%, {later:.1f} s at 90%", end="")
        print(f" (the cache was filled in {result['indexed_fill_s']:.0f} s)")
    if "demo_wait_share" in result:
        print(
            f"the demo's training waits {result['demo_wait_s']:.3f} s for data in {result['demo_steps']:.0f}"
        )
        print(f"  steps: {result['demo_wait_share']:.2%} of their time")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory with a tokenizer")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="how many are many (default: a million)")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="how often what is compared takes turns")
    parser.add_argument(
        "--work", type=Path, help="keep generated pairs here (default: a temporary directory)"
    )
    parser.add_argument("--no-trl", dest="trl", action="store_false", help="leave TRL's preparation out")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result here too")
    run_bench(parser.parse_args(), measure, report)


if __name__ == "__main__":
    main()
