"""Roll, kill and overload a reward service under load, and see that no answer is lost or wrong.

    python jobs/soak_serve.py --seconds 60
    python jobs/soak_serve.py --scenarios rolls,overload --seconds 20

Two versions of a small model are published, and 4 actors call the service without a pause, 1 to 64 texts a
call. Scenarios, each for `--seconds`:

    rolls      10 rolls from one version to the other and back
    kills-1    5 SIGKILLs of the only replica
    kills-2    5 SIGKILLs of one of two replicas
    corrupt    rolls to versions with a damaged file, with broken weights, and with other scores than stored
    overload   5 times the callers that the queue has room for: who is refused is told at once
    deaths     callers are killed in the middle of calls, and others come

Every answer must be whole, of one version, and within 1e-4 of that version's scores in this process; every
call must be answered, or refused where that is the scenario. The last line printed is the result as JSON; the
status is 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from soak import prepare

from rayrm.demo.preferences import make_preferences
from rayrm.errors import OverloadedError, PublishError, RayrmError, RollError
from rayrm.serve.client import RewardClient
from rayrm.serve.deployment import deploy
from rayrm.serve.registry import MANIFEST, PublishedModel, publish
from rayrm.serve.scorer import RewardModel

SCENARIOS = ("rolls", "kills-1", "kills-2", "corrupt", "overload", "deaths")
CALLERS, ROLLS, KILLS, SAME = 4, 10, 5, 1e-4
NUM_TEXTS = 400


@dataclass
class Call:
    """A call as its caller saw it: which texts, what came, and how long it took."""

    texts: list[int]
    scores: list[float]
    version: str
    seconds: float
    error: str = ""


@ray.remote(num_cpus=0)
class Caller:
    """Calls without a pause until it is told to stop; tells of every call that it began."""

    def __init__(self, name: str, seed: int, texts: Sequence[tuple[Any, Any]], retry_overload: bool) -> None:
        self._client = RewardClient(name, deadline_s=120, retry_overload=retry_overload)
        self._draw = random.Random(seed)
        self._texts = texts
        self._calls: list[Call] = []
        self._stop = threading.Event()
        self._num_begun = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._stop.is_set():
            size = self._draw.choice((1, 1, 8, 8, 64))
            begin = self._draw.randrange(len(self._texts) - size)
            chosen = list(range(begin, begin + size))
            self._num_begun += 1
            began = time.monotonic()
            call = Call(chosen, [], "", 0.0)
            try:
                prompts, completions = zip(*(self._texts[n] for n in chosen), strict=True)
                answer = self._client.score(list(prompts), list(completions))
                call.scores, call.version = answer.scores, answer.version
            except Exception as error:
                call.error = f"{type(error).__name__}: {error}"
            call.seconds = time.monotonic() - began
            self._calls.append(call)

    def num_done(self) -> int:
        return len(self._calls)

    def finish(self) -> tuple[int, list[Call]]:
        """How many calls were begun, and all of them, after the last was answered."""
        self._stop.set()
        deadline = time.monotonic() + 150
        while len(self._calls) < self._num_begun and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._num_begun, self._calls


@dataclass(slots=True)
class Setting:
    """What all scenarios share."""

    home: Path
    first: PublishedModel
    second: PublishedModel
    texts: list[tuple[Any, Any]]
    expected: dict[str, list[float]]
    seconds: float
    draw: random.Random


@dataclass(slots=True)
class Outcome:
    """What a scenario came to."""

    num_calls: int = 0
    num_texts: int = 0
    refusal_seconds: list[float] = field(default_factory=list)
    events: int = 0
    seconds: list[float] = field(default_factory=list)
    max_delta: float = 0.0
    versions: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def see(self, setting: Setting, begun: int, calls: Sequence[Call], *, refusals: bool = False) -> None:
        """Judge a caller's calls."""
        if begun != len(calls):
            self.problems.append(f"{begun - len(calls)} calls got neither an answer nor an error")
        for call in calls:
            self.num_calls += 1
            if call.error:
                if refusals and call.error.startswith(OverloadedError.__name__):
                    self.refusal_seconds.append(call.seconds)
                else:
                    self.problems.append(call.error)
                continue
            self.seconds.append(call.seconds)
            self.num_texts += len(call.scores)
            self.versions[call.version] = self.versions.get(call.version, 0) + 1
            right = [setting.expected[call.version][n] for n in call.texts]
            if len(right) != len(call.scores):
                self.problems.append(f"{len(call.scores)} scores for {len(right)} texts")
                continue
            delta = max(abs(a - b) for a, b in zip(call.scores, right, strict=True))
            self.max_delta = max(self.max_delta, delta)
            if delta > SAME:
                self.problems.append(f"a score of {call.version} is off by {delta:.1e}")


def prepared(home: Path, seconds: float, seed: int) -> Setting:
    """Two published versions, texts, and what they score."""
    prepare(home / "one")
    prepare(home / "two", seed=1)
    first = publish(home / "one" / "base", home / "registry", "soak")
    second = publish(home / "two" / "base", home / "registry", "soak", make_current=False)
    rows, _ = make_preferences(2400, 0)
    texts = []
    for row in rows[: NUM_TEXTS // 2]:
        texts += [(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])]
    expected = {}
    for version in (first, second):
        model = RewardModel.from_pretrained(version.path)
        expected[version.version] = model.score([p for p, _ in texts], [c for _, c in texts])
    if max(abs(a - b) for a, b in zip(*expected.values(), strict=True)) < 100 * SAME:
        raise SystemExit("the two versions score alike: a wrong version would not be seen")
    return Setting(home, first, second, texts, expected, seconds, random.Random(seed))


class Load:
    """Callers within a block; afterwards what they saw is judged."""

    def __init__(
        self, setting: Setting, outcome: Outcome, name: str, count: int = CALLERS, *, overload: bool = False
    ) -> None:
        self._setting, self._outcome, self._overload = setting, outcome, overload
        self.callers = [
            Caller.remote(name, setting.draw.randrange(2**30), setting.texts, not overload)  # type: ignore[attr-defined]
            for _ in range(count)
        ]

    def __enter__(self) -> Load:
        for caller in self.callers:
            while not ray.get(caller.num_done.remote()):
                time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        for begun, calls in ray.get([caller.finish.remote() for caller in self.callers]):
            self._outcome.see(self._setting, begun, calls, refusals=self._overload)
        for caller in self.callers:
            ray.kill(caller)


def moments(setting: Setting, count: int) -> list[float]:
    """When, in seconds from now, to do `count` things: at random, one in each part of the time."""
    part = setting.seconds / (count + 1)
    return [part * (n + setting.draw.uniform(0.3, 1.0)) for n in range(count)]


def at_moments(setting: Setting, count: int, act: Callable[[int], None]) -> None:
    began = time.monotonic()
    for number, moment in enumerate(moments(setting, count)):
        time.sleep(max(began + moment - time.monotonic(), 0.0))
        act(number)
    time.sleep(max(began + setting.seconds - time.monotonic(), 0.0))


def rolls(setting: Setting, outcome: Outcome) -> None:
    client = deploy(setting.first, "soak-rolls", num_cpus=0.5)
    versions = [setting.second.version, setting.first.version]

    def act(number: int) -> None:
        wanted = versions[number % 2]
        client.roll(wanted)
        outcome.events += 1
        if client.score([setting.texts[0][0]], [setting.texts[0][1]]).version != wanted:
            outcome.problems.append(f"after the roll to {wanted} another version answers")

    with Load(setting, outcome, client.name):
        at_moments(setting, ROLLS, act)
    if set(outcome.versions) != set(versions):
        outcome.problems.append("a version answered no call")


def kills(setting: Setting, outcome: Outcome, num_replicas: int) -> None:
    name = f"soak-kills-{num_replicas}"
    client = deploy(setting.first, name, num_cpus=0.5, num_replicas=num_replicas)

    def act(number: int) -> None:
        replicas = client.status(wait_s=60)["replicas"]
        os.kill(setting.draw.choice(replicas)["pid"], signal.SIGKILL)
        outcome.events += 1

    with Load(setting, outcome, name):
        at_moments(setting, KILLS, act)


def corrupt(setting: Setting, outcome: Outcome) -> None:
    client = deploy(setting.first, "soak-corrupt", num_cpus=0.5)
    bad = [damaged(setting), other_scores(setting), setting.home / "nowhere"]

    def act(number: int) -> None:
        try:
            client.roll(bad[number])
        except (RollError, PublishError) as error:
            outcome.events += 1
            print(f"  refused: {str(error)[:160]}", file=sys.stderr)
        else:
            outcome.problems.append(f"the service rolled to {bad[number]}")
        if set(client.status()["models"].values()) != {setting.first.version}:
            outcome.problems.append("the status names another version than the one that serves")

    with Load(setting, outcome, client.name):
        at_moments(setting, len(bad), act)
    if set(outcome.versions) != {setting.first.version}:
        outcome.problems.append(f"versions {sorted(outcome.versions)} answered")


def damaged(setting: Setting) -> Path:
    """A version of whose weights a byte is another."""
    copy = writable_copy(setting.second.path, setting.home / "registry" / "soak" / "damaged")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 0xFF
    (copy / "model.safetensors").write_bytes(weights)
    return copy


def other_scores(setting: Setting) -> Path:
    """A version whose files are whole and whose scores are not those that were stored."""
    copy = writable_copy(setting.second.path, setting.home / "registry" / "soak" / "otherscores")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["probe"]["scores"] = [score + 0.01 for score in manifest["probe"]["scores"]]
    manifest["version"] = "otherscores"
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def writable_copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def overload(setting: Setting, outcome: Outcome) -> None:
    deploy(setting.first, "soak-overload", num_cpus=0.5, max_queued_requests=CALLERS)
    with Load(setting, outcome, "soak-overload", 5 * CALLERS, overload=True):
        time.sleep(setting.seconds)
    outcome.events = len(outcome.refusal_seconds)
    if not outcome.refusal_seconds or not outcome.seconds:
        outcome.problems.append("nobody was refused, or nobody answered: that was no overload")
        return
    half, late = (quantile(outcome.refusal_seconds, share) for share in (0.5, 0.99))
    usual = quantile(outcome.seconds, 0.5)
    print(
        f"  half were refused within {half:.3f} s, 99% within {late:.3f} s; half were answered after "
        f"{usual:.3f} s",
        file=sys.stderr,
    )
    if half > usual:
        outcome.problems.append(f"half were refused after {half:.2f} s: they wait as who is answered")


def deaths(setting: Setting, outcome: Outcome) -> None:
    client = deploy(setting.first, "soak-deaths", num_cpus=0.5)

    def act(number: int) -> None:
        doomed = Caller.remote(client.name, number, setting.texts, True)  # type: ignore[attr-defined]
        while not ray.get(doomed.num_done.remote()):
            time.sleep(0.02)
        time.sleep(setting.draw.uniform(0, 0.3))
        ray.kill(doomed)
        outcome.events += 1

    with Load(setting, outcome, client.name):
        at_moments(setting, 2 * KILLS, act)
    deadline = time.monotonic() + 30
    while waiting(client) and time.monotonic() < deadline:
        time.sleep(0.2)
    if waiting(client):
        outcome.problems.append("texts of callers that died still wait")


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def waiting(client: RewardClient) -> int:
    return sum(replica["num_waiting"] for replica in client.status()["replicas"])


def soak(arguments: argparse.Namespace, home: Path) -> dict[str, Outcome]:
    setting = prepared(home, arguments.seconds, arguments.seed)
    acts: dict[str, Callable[[Setting, Outcome], None]] = {
        "rolls": rolls,
        "kills-1": lambda setting, outcome: kills(setting, outcome, 1),
        "kills-2": lambda setting, outcome: kills(setting, outcome, 2),
        "corrupt": corrupt,
        "overload": overload,
        "deaths": deaths,
    }
    outcomes: dict[str, Outcome] = {}
    for name in arguments.scenarios.split(","):
        if name not in acts:
            raise SystemExit(f"--scenarios: {name!r} is none of {', '.join(SCENARIOS)}")
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcome = outcomes[name] = Outcome()
        try:
            acts[name](setting, outcome)
        except (RayrmError, RayActorError) as error:
            outcome.problems.append(f"{type(error).__name__}: {error}")
        serve.delete(f"soak-{name}")
        print(shown(name, outcome), flush=True)
    return outcomes


def shown(name: str, outcome: Outcome) -> str:
    seconds = outcome.seconds or [0.0]
    problems = "; ".join(list(dict.fromkeys(outcome.problems))[:5]) or "nothing lost, nothing wrong"
    return (
        f"{name:<9} {outcome.events} events, {outcome.num_calls} calls of {outcome.num_texts} texts, "
        f"{len(outcome.refusal_seconds)} refused, p50 {quantile(seconds, 0.5):.3f} s, "
        f"p99 {quantile(seconds, 0.99):.2f} s, longest {max(seconds):.1f} s, "
        f"off by {outcome.max_delta:.0e} at most: {problems}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of load in each scenario (60)")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help=f"some of {','.join(SCENARIOS)}")
    parser.add_argument("--seed", type=int, default=0, help="draws moments and calls (0)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    ray.init(
        address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False
    )
    with tempfile.TemporaryDirectory(prefix="rayrm-soak-serve-") as home:
        outcomes = soak(arguments, Path(home))
    ray.shutdown()
    result = {
        name: {
            "events": outcome.events,
            "calls": outcome.num_calls,
            "texts": outcome.num_texts,
            "refused": len(outcome.refusal_seconds),
            "p50_s": quantile(outcome.seconds or [0.0], 0.5),
            "p99_s": quantile(outcome.seconds or [0.0], 0.99),
            "max_delta": outcome.max_delta,
            "longest_s": max(outcome.seconds, default=0.0),
            "problems": list(dict.fromkeys(outcome.problems)),
        }
        for name, outcome in outcomes.items()
    }
    good = not any(outcome.problems for outcome in outcomes.values())
    print(json.dumps({"soak_serve": result, "good": good}), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
