"""What `rayrm evaluate` adds to the bare scorer: reading, Ray Data's tokenizing, measures, intervals, texts.

    python jobs/bench/evaluate.py --model DIR --data FILE --pairs 872

Bare: `RewardModel.score_ids` over the same texts, tokenized before, in one call. Ours: everything that
follows the loading of the model, from the file to the record on disk. Both take turns in this process,
`--rounds` times; Ray is started before, and its start told apart, since a job finds it running. `ratio` is
ours over bare in pairs/s, the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from measuring import bench_parser, device_of, machine, run_bench, spread

from rayrm.data.preference import form_of, parse_row
from rayrm.data.sources import plan_sources, read_work
from rayrm.data.tokenize import tokenize_rows
from rayrm.errors import RowError
from rayrm.evaluation.evaluate import evaluate_loaded, objective_of
from rayrm.evaluation.scoring import Scoring
from rayrm.model.reward_model import load_saved
from rayrm.own_ray import ensure_ray
from rayrm.serve.scorer import RewardModel
from rayrm.train.evaluation_record import EvaluationRecord, write_evaluation


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    device = device_of(arguments)
    loaded = load_saved(arguments.model)
    plan = plan_sources(arguments.data, max_rows=arguments.pairs, name="data")
    rows = [parse_row(row.content) for piece in plan.work for row in read_work(piece)]
    tokenized = tokenize_rows(loaded.tokenizer, rows, loaded.max_positions)
    sequences = [ids for row in tokenized if not isinstance(row, RowError) for ids in row.sequences]
    print(f"{len(rows)} {form_of(rows[0])} rows, {sum(map(len, sequences)):,} tokens", flush=True)
    began = time.perf_counter()
    ensure_ray()
    ray_start_s = time.perf_counter() - began
    bare, ours = [], []
    for number in range(arguments.rounds):
        model = RewardModel(loaded)
        model.score_ids(sequences[:32])
        began = time.perf_counter()
        model.score_ids(sequences)
        bare.append(len(rows) / (time.perf_counter() - began))
        model.release()
        with tempfile.TemporaryDirectory() as kept:
            began = time.perf_counter()
            scoring = Scoring(loaded, Path(arguments.model), keep=Path(kept) / ".partial")
            sets = evaluate_loaded(
                scoring, {"data": arguments.data}, objective_of(loaded, {}), max_pairs=arguments.pairs
            )
            write_evaluation(EvaluationRecord(arguments.model, sets), Path(kept))
            ours.append(len(rows) / (time.perf_counter() - began))
        print(f"round {number + 1}: bare {bare[-1]:.1f} pairs/s, ours {ours[-1]:.1f}", flush=True)
    return {
        "bench": "evaluate",
        "pairs": len(rows),
        "bare_pairs_per_s": spread(bare),
        "pairs_per_s": spread(ours),
        "ratio": median(mine / theirs for mine, theirs in zip(ours, bare, strict=True)),
        "ray_start_s": ray_start_s,
        **machine(device),
    }


def report(result: dict[str, Any]) -> None:
    bare, ours = (result[name]["median"] for name in ("bare_pairs_per_s", "pairs_per_s"))
    print(
        f"bare {bare:.1f} pairs/s, ours {ours:.1f}: ratio {result['ratio']:.3f}; "
        f"Ray's start {result['ray_start_s']:.1f} s"
    )


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=872, help="the first so many rows of the data")
    run_bench(parser.parse_args(), main, report)
