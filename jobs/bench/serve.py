"""The reward service beside scoring in process, and beside a server that scores one request at a time.

    python jobs/bench/serve.py --model DIR --data FILE
    python jobs/bench/serve.py --model DIR --parts one-at-a-time --rounds 5

A real cluster on this machine; the load is GRPO's: prompts of the data, each with `--group-size` completions
drawn from it. The sides of each comparison take turns, `--rounds` times, on the same texts, all with
`--threads` threads for the model:

    handle           `--callers` actors call `RewardClient` with 64 completions a call
                     -> handle_over_inprocess: its scores/s over `RewardModel.score`'s, call after call
    per-sample       each actor has 64 threads that ask for one score each, through the same client
                     -> per_sample_over_inprocess
    one-at-a-time    16 threads ask for one score each, two groups of 8 at a time, of this service and of a
                     server as OpenRLHF's: FastAPI, POST /get_reward, a forward in its handler
                     -> ratio; bound: the tokens it computes over the distinct ones of the groups;
                     over_http: ours by the same HTTP call

Every score is compared with `RewardModel.score`'s. Without `--data` the texts are the demo's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from measuring import SEED, machine, open_tokenizer, read_pairs, run_bench, shown, spread
from score import draw_groups

from rayrm.data.messages import Text
from rayrm.data.packing import pack_texts
from rayrm.data.rendering import render
from rayrm.data.tokenize import TextForm, TextInput
from rayrm.serve.scorer import RewardModel

PARTS = ("handle", "per-sample", "one-at-a-time")
CALL, NUM_GROUPS, GROUP = 64, 2, 8
NAME = "bench-reward"


@dataclass
class Work:
    """Texts, those of one prompt after each other, and what they come to in this process."""

    prompts: list[Text] = field(default_factory=list)
    completions: list[Text] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def cut(self, size: int) -> list[Work]:
        return [
            Work(self.prompts[n : n + size], self.completions[n : n + size], self.ids[n : n + size])
            for n in range(0, len(self), size)
        ]


def draw_work(arguments: argparse.Namespace, tokenizer: Any) -> tuple[TextForm, Work]:
    """`--groups` prompts of the data, `--group-size` completions each, at most `--max-length` tokens."""
    form, groups = draw_groups(
        demo_rows() if arguments.data is None else read_pairs(arguments.data),
        tokenizer,
        groups=arguments.groups,
        group_size=arguments.group_size,
        max_length=arguments.max_length,
    )
    work = Work()
    for group in groups:
        work.prompts += [group.prompt] * len(group.ids)
        work.completions += group.completions
        work.ids += group.ids
    return form, work


def demo_rows() -> list[Any]:
    from rayrm.data.preference import parse_row
    from rayrm.demo.preferences import make_preferences

    rows, _ = make_preferences(2400, SEED)
    return [parse_row(row) for row in rows]


class CallerActor:
    """A process that calls the service, as an RL worker does."""

    def __init__(self, name: str) -> None:
        from rayrm.serve.client import RewardClient

        self._client = RewardClient(name)
        self._threads = ThreadPoolExecutor(CALL)

    def whole(self, calls: Sequence[Work]) -> list[Any]:
        return [self._client.score(work.prompts, work.completions) for work in calls]

    def singly(self, calls: Sequence[Work]) -> list[Any]:
        """Of each call one result for each text."""
        return [list(self._threads.map(self._one, work.prompts, work.completions)) for work in calls]

    def _one(self, prompt: Text, completion: Text) -> Any:
        return self._client.score([prompt], [completion])


def one_at_a_time(directory: str, port: int, threads: int) -> None:
    """The server to compare with: what OpenRLHF's does with a request of one text, in its handler."""
    import uvicorn
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(threads)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, list[float]]:
        queries = (await request.json())["query"]
        batch = tokenizer(queries, padding=True, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            scores = model(**batch).logits[:, 0].tolist()
        return {"rewards": scores, "scores": scores}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


@contextlib.contextmanager
def baseline_server(directory: str, threads: int) -> Iterator[str]:
    """The address of the other server, which runs within the block."""
    port = free_port()
    command = [sys.executable, __file__, "--one-at-a-time-server", directory, str(port), str(threads)]
    process = subprocess.Popen(command)
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}/get_reward"
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit("the server to compare with did not start")
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.1)
    raise SystemExit("the server to compare with does not answer")


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


class Sides:
    """What takes turns, each returning seconds; scores are compared on the way."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        directory: str,
        work: Work,
        rendered: list[str],
        urls: dict[str, str],
    ) -> None:
        import ray

        from rayrm.serve.client import RewardClient

        self.work, self.rendered, self.urls = work, rendered, urls
        self.client = RewardClient(NAME)
        self.callers = [
            ray.remote(CallerActor).options(num_cpus=0).remote(NAME) for _ in range(arguments.callers)
        ]
        self.threads = ThreadPoolExecutor(NUM_GROUPS * GROUP)
        self.model = RewardModel.from_pretrained(directory)
        self.expected: list[float] = []
        self.delta = 0.0
        self.timings: list[Any] = []

    def inprocess(self) -> float:
        began = time.perf_counter()
        scores: list[float] = []
        for call in self.work.cut(CALL):
            scores += self.model.score(call.prompts, call.completions)
        seconds = time.perf_counter() - began
        self.expected = self.expected or scores
        return seconds

    def by_callers(self, method: str) -> float:
        import ray

        calls = self.work.cut(CALL)
        shares = [list(range(n, len(calls), len(self.callers))) for n in range(len(self.callers))]
        began = time.perf_counter()
        found = ray.get(
            [
                getattr(caller, method).remote([calls[n] for n in share])
                for caller, share in zip(self.callers, shares, strict=True)
            ]
        )
        seconds = time.perf_counter() - began
        for share, answers in zip(shares, found, strict=True):
            for number, answer in zip(share, answers, strict=True):
                results = answer if isinstance(answer, list) else [answer]
                self.timings += [result.timing for result in results]
                self._compare([s for result in results for s in result.scores], number * CALL)
        return seconds

    def together(self, one: Callable[[int], float]) -> float:
        """Two groups of 8 callers that each ask for one score; a group goes on when it has all of them."""
        begins = range(0, len(self.work), GROUP)
        scores = [0.0] * len(self.work)

        def drive(first: int) -> None:
            for begin in begins[first::NUM_GROUPS]:
                scores[begin : begin + GROUP] = self.threads.map(one, range(begin, begin + GROUP))

        began = time.perf_counter()
        with ThreadPoolExecutor(NUM_GROUPS) as drivers:
            list(drivers.map(drive, range(NUM_GROUPS)))
        seconds = time.perf_counter() - began
        self._compare(scores, 0)
        return seconds

    def by_client(self, number: int) -> float:
        return self.client.score([self.work.prompts[number]], [self.work.completions[number]]).scores[0]

    def by_http(self, url: str, number: int) -> float:
        body = {"query": [self.rendered[number]], "prompts": [""], "labels": [""]}
        return float(post(url, body)["rewards"][0])

    def _compare(self, scores: Sequence[float], begin: int) -> None:
        for score, right in zip(scores, self.expected[begin : begin + len(scores)], strict=True):
            self.delta = max(self.delta, abs(score - right))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and the result."""
    import ray
    from ray import serve

    from rayrm.serve.deployment import deploy

    if arguments.group_size % GROUP:
        raise SystemExit(f"--group-size ({arguments.group_size}) must be a multiple of {GROUP}")
    torch.set_num_threads(arguments.threads)
    tokenizer = open_tokenizer(arguments)
    form, work = draw_work(arguments, tokenizer)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        directory = saved(arguments, tokenizer, form, Path(scratch) / "model")
        ray.init(
            address="local",
            num_cpus=max(arguments.threads, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
        )
        stack.callback(ray.shutdown)
        port = free_port()
        deploy(
            directory,
            NAME,
            num_cpus=arguments.threads,
            http_port=port,
            max_tokens_per_batch=arguments.max_tokens,
            ray_actor_options={"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(arguments.threads)}}},
        )
        stack.callback(serve.delete, NAME)
        urls = {"ours": f"http://127.0.0.1:{port}/get_reward"}
        if "one-at-a-time" in arguments.parts:
            urls["baseline"] = stack.enter_context(baseline_server(directory, arguments.threads))
        inputs = [TextInput(p, c) for p, c in zip(work.prompts, work.completions, strict=True)]
        rendered = [str(text) for text in render(tokenizer, form, inputs)]
        sides = Sides(arguments, directory, work, rendered, urls)
        turns: dict[str, Callable[[], float]] = {"inprocess": sides.inprocess}
        if "handle" in arguments.parts:
            turns["handle"] = lambda: sides.by_callers("whole")
        if "per-sample" in arguments.parts:
            turns["per-sample"] = lambda: sides.by_callers("singly")
        if "one-at-a-time" in arguments.parts:
            turns["baseline"] = lambda: sides.together(lambda n: sides.by_http(urls["baseline"], n))
            turns["together"] = lambda: sides.together(sides.by_client)
            turns["http"] = lambda: sides.together(lambda n: sides.by_http(urls["ours"], n))
        speeds = take_turns(arguments, turns, len(work))
        return result_of(arguments, work, speeds, sides, tokenizer.pad_token_id)


def saved(arguments: argparse.Namespace, tokenizer: Any, form: TextForm, directory: Path) -> str:
    """The model as a reward model of the texts' form that all sides load: its head may be random."""
    from measuring import open_model

    from rayrm.model.saving import save_model

    model = open_model(arguments)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    save_model(model, tokenizer, directory, text_form=form)
    return str(directory)


def take_turns(
    arguments: argparse.Namespace, turns: dict[str, Callable[[], float]], count: int
) -> dict[str, list[float]]:
    """Scores/s of each side, round by round; one round before them is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(arguments.rounds + 1):
        for name, turn in turns.items():
            speed = count / turn()
            if number:
                speeds[name].append(speed)
        if number:
            words = ", ".join(f"{name} {values[-1]:.1f}" for name, values in speeds.items())
            print(f"round {number}: {words} scores/s", flush=True)
    return speeds


def result_of(
    arguments: argparse.Namespace, work: Work, speeds: dict[str, list[float]], sides: Sides, pad_token_id: int
) -> dict[str, Any]:
    def over(name: str, base: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(speeds[name], speeds[base], strict=True)])

    result: dict[str, Any] = {
        "bench": "serve",
        "model": arguments.shape or arguments.model,
        "data": arguments.data or "demo",
        "texts": len(work),
        "group_size": arguments.group_size,
        "callers": arguments.callers,
        "rounds": arguments.rounds,
        "scores_per_s": {name: spread(values) for name, values in speeds.items()},
        "max_score_delta": sides.delta,
        "machine": machine(torch.device("cpu")),
    }
    if "handle" in speeds:
        result["handle_over_inprocess_spread"] = over("handle", "inprocess")
    if "per-sample" in speeds:
        result["per_sample_over_inprocess_spread"] = over("per-sample", "inprocess")
    if "baseline" in speeds:
        parts = work.cut(GROUP)
        alone = sum(len(ids) for ids in work.ids)
        distinct = sum(pack_texts(part.ids, pad_token_id).num_tokens for part in parts)
        result["ratio_spread"] = over("together", "baseline")
        result["over_http_spread"] = over("http", "baseline")
        result["bound"] = alone / distinct
        result["share_of_bound"] = result["ratio_spread"]["median"] / result["bound"]
    for name in [name for name in result if name.endswith("_spread")]:
        result[name.removesuffix("_spread")] = result[name]["median"]
    result["seconds_by_phase"] = {
        phase: {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99)}
        for phase in ("tokenize_s", "queue_s", "compute_s", "total_s")
        if (values := sorted(getattr(timing, phase) for timing in sides.timings))
    }
    return result


def quantile(values: Sequence[float], share: float) -> float:
    return values[min(int(share * len(values)), len(values) - 1)]


def report(result: dict[str, Any]) -> None:
    """The result in words."""
    for name, said in (
        ("handle_over_inprocess", "through the handle, calls of 64, over in process"),
        ("per_sample_over_inprocess", "per-sample callers over in process"),
        ("ratio", "16 per-sample callers over one request at a time"),
        ("over_http", "the same by HTTP"),
    ):
        if name in result:
            print(f"{said}: {shown(list(result[f'{name}_spread'].values()))}")
    if "bound" in result:
        print(f"distinct-token bound {result['bound']:.2f}, share of it {result['share_of_bound']:.2f}")
    for phase, found in result["seconds_by_phase"].items():
        print(f"{phase}: p50 {found['p50']:.3f}, p99 {found['p99']:.3f}")
    print(f"scores differ by {result['max_score_delta']:.1e} at most")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    from measuring import bench_parser

    parser = bench_parser(__doc__)
    for action in parser._actions:
        action.required = action.required and action.dest != "data"
    parser.set_defaults(threads=os.cpu_count() or 1)
    parser.add_argument("--groups", type=int, default=64, help="how many prompts")
    parser.add_argument("--group-size", type=int, default=8, help="completions a prompt")
    parser.add_argument("--callers", type=int, default=4, help="actors that call the service")
    parser.add_argument("--max-tokens", type=int, help="a batch's token budget (default: RewardModel's)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    return parser.parse_args(words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-at-a-time-server"]:
        one_at_a_time(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        run_bench(parse_arguments(), measure, report)
