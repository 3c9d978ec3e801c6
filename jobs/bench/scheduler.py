"""Planning the service's batches: CPU time a text, with 50,000 texts waiting. A CPU, no torch, no Ray.

    python jobs/bench/scheduler.py

Random ids in the shapes of a service's load. Times are this thread's, so that other work on the machine does
not count. The last line is a JSON object: microseconds a text for `take` (and what `answer` adds) by load.
"""

from __future__ import annotations

import json
import time

import numpy as np

from rayrm.data.packing import Ids
from rayrm.serve.scheduler import Layout, ScoreQueue

_VOCABULARY = 50_000
# requests, texts of each, tokens: of all texts' beginning, of each request's beyond it, of each text's beyond
# that (half as many to one and a half times as many), of a batch.
_LOADS: dict[str, tuple[int, int, int, int, int, int]] = {
    "groups of 8": (125, 8, 0, 300, 100, 16384),
    "groups of 50": (1000, 50, 0, 300, 100, 16384),
    "groups of 50 in small batches": (1000, 50, 0, 300, 100, 4096),
    "groups of 50 under one system prompt": (1000, 50, 400, 100, 100, 16384),
    "requests of 100": (500, 100, 0, 300, 100, 16384),
    "unlike texts": (1000, 50, 0, 0, 200, 16384),
    "short texts": (1000, 50, 0, 0, 8, 16384),
    "one request of one prompt": (1, 50_000, 0, 300, 100, 16384),
    "one request of one text": (1, 50_000, 0, 20, 0, 16384),
}


def texts_of(load: tuple[int, int, int, int, int, int], rng: np.random.Generator) -> list[list[Ids]]:
    """The texts of each request of a load."""
    num_requests, num_texts, system, prompt, tail, _ = load

    def some(count: int) -> Ids:
        return rng.integers(0, _VOCABULARY, count, dtype=np.int32)

    common = some(system)
    prompts = [np.concatenate([common, some(prompt)]) for _ in range(num_requests)]
    return [
        [
            np.concatenate([begin, some(int(rng.integers(tail // 2, tail * 3 // 2 + 1)))])
            for _ in range(num_texts)
        ]
        for begin in prompts
    ]


def measure(requests: list[list[Ids]], max_tokens: int, layout: Layout) -> tuple[float, float, float]:
    """Microseconds a text to add and to take, and milliseconds of the longest single `take`."""
    queue = ScoreQueue(max_tokens, layout)
    num_texts = sum(map(len, requests))
    begin = time.thread_time()
    for number, texts in enumerate(requests):
        queue.add(number, texts)
    added, longest = time.thread_time(), 0.0
    while len(queue):
        before = time.thread_time()
        batch = queue.take()
        longest = max(longest, time.thread_time() - before)
        queue.answer(batch, [0.0] * len(batch))
    return (
        1e6 * (added - begin) / num_texts,
        1e6 * (time.thread_time() - added) / num_texts,
        1e3 * longest,
    )


def main() -> None:
    rng = np.random.default_rng(0)
    found = {}
    print(f"{'load':38s} {'add us':>7s} {'take us':>8s} {'longest take ms':>16s}")
    for name, load in _LOADS.items():
        add_us, take_us, longest_ms = measure(texts_of(load, rng), load[-1], "shared")
        print(f"{name:38s} {add_us:7.1f} {take_us:8.1f} {longest_ms:16.1f}", flush=True)
        found[name] = round(take_us, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
