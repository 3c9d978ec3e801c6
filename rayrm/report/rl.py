"""A reinforcement-learning run as one page: did fresh samples get better, and was the reward gamed?

Reads what the run left in its directory: `metrics.jsonl` (needed; it may be empty), `heldout.json`,
`samples*.jsonl` and `run.toml` (each may be missing; the page says what it could not show).
"""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.errors import RunDirectoryError
from rayrm.report.figures import (
    COLOURS,
    SMOOTHED_FROM,
    Curve,
    Picture,
    curves,
    hacking_picture,
    histogram,
    paired_dots,
    shares,
)
from rayrm.report.page import write_page
from rayrm.report.reading import Array, Record, column, last_of_each_step, number, read_lines, read_object
from rayrm.rl.guard import RULES, WINDOWS, Alarm, GuardSettings, HackingGuard
from rayrm.rl.heldout import Gain, paired_gain

REPORT = "report.html"
_NUM_SHOWN = 6
_NUM_TOP = 5
_NUM_LATE = 512
_LONGEST_TEXT = 1500

_NEEDS = {
    "gold": "gold reward",
    "spread": "spread of an ensemble",
    "length": "correlation with completion lengths",
    "repetition": "repetition",
    "kl": "KL (TRL logs none where `beta` is 0)",
}


def write_rl_report(run_dir: str | Path, guard_settings: GuardSettings | None = None) -> Path:
    """Write `report.html` into an RL run's directory, over the one before; its path.

    The page is one file without scripts that loads nothing; the same directory gives the same bytes.
    `guard_settings`: when it warns of reward hacking, as `HackingGuard` was told during the run.

    Raises:
        RunDirectoryError: the directory or its `metrics.jsonl` is missing, or the disk takes no file.
    """
    place = Path(run_dir)
    metrics = place / "metrics.jsonl"
    if not metrics.is_file():
        what = "holds no metrics.jsonl" if place.is_dir() else "is no directory"
        raise RunDirectoryError(
            f"`{place}` {what}: a report is made of a training run's directory. Train first: "
            f'rayrm rl run.toml output_dir="{place}"'
        )
    notes: list[str] = []
    records, stepless = last_of_each_step(read_lines(metrics, notes))
    if stepless:
        notes.append(f"metrics.jsonl: {stepless} records without a `step` were left out.")
    guard = HackingGuard(guard_settings)
    for record in records:
        guard.see(record)
    heldout = _heldout(place / "heldout.json", notes)
    run = place / "run.toml"
    settings = run.read_text(encoding="utf-8", errors="replace") if run.is_file() else None
    if settings is None:
        notes.append("run.toml is missing: the run's settings are not shown.")
    names = reward_names(records)
    rolls = _rolls(records, names)
    pictures, absent = _curves(records, names, rolls)
    paired, top = _samples(place, notes)
    return write_page(
        place / REPORT,
        "rl.html",
        name=place.resolve().name,
        num_records=len(records),
        last_step=int(records[-1]["step"]) if records else 0,
        gain=heldout.gain if heldout else None,
        heldout=_heldout_pictures(heldout) if heldout else [],
        alarms=[alarm.text for alarm in guard.alarms],
        watching=max(guard.watched(rule) for rule in RULES) >= WINDOWS[0],
        few=any(guard.watched(rule) for rule in RULES),
        unwatched=_unwatched(guard, records),
        hacking=[
            picture for name in names if (picture := _hacking(records, name, names, guard.alarms, rolls))
        ],
        curves=pictures,
        smoothed=len(records) >= SMOOTHED_FROM,
        rolls=rolls,
        absent=absent,
        versions=[strip for name in names if (strip := _versions(records, name, names, rolls))],
        comparisons=_compared(heldout) if heldout and heldout.shown else paired,
        fresh=bool(heldout and heldout.shown),
        top=top,
        settings=settings,
        notes=notes,
    )


def reward_names(records: list[Record]) -> list[str]:
    """The rewards that a run's log tells of: NAME of each `NAME/score_mean`, sorted."""
    keys = {key for record in records for key in record}
    return sorted(key.removesuffix("/score_mean") for key in keys if key.endswith("/score_mean"))


class _Heldout:
    """What `heldout.json` says: rewards `[P][S]` of both policies, their gain, and texts where it has any."""

    def __init__(self, stored: Record) -> None:
        self.before: list[list[float]] = _rewards(stored["before"])
        self.after: list[list[float]] = _rewards(stored["after"])
        computed = paired_gain(self.before, self.after)
        told = stored.get("gain")
        self.gain = Gain(**told) if told else computed
        if abs(self.gain.gain - computed.gain) > 1e-6 * max(1.0, abs(computed.gain)):
            raise ValueError(f"its gain is {self.gain.gain:g} and its rewards give {computed.gain:g}")
        self.prompts: list[Any] = stored.get("prompts") or []
        self.texts: tuple[list[Any], list[Any]] = (
            stored.get("samples_before") or [],
            stored.get("samples_after") or [],
        )
        num = len(self.before)
        self.shown = all(len(part) == num for part in (self.prompts, *self.texts))


def _rewards(rows: Any) -> list[list[float]]:
    values = [[number(value) for value in row] for row in rows]
    if not all(np.isfinite(row).all() for row in values):
        raise ValueError("a reward is no finite number")
    return values


def _heldout(file: Path, notes: list[str]) -> _Heldout | None:
    stored = read_object(file, notes)
    if stored is None:
        if not file.is_file():
            notes.append(
                "heldout.json is missing: the run kept no held-out rewards, so there is no gain to show."
            )
        return None
    try:
        return _Heldout(stored)
    except (KeyError, TypeError, ValueError) as problem:
        notes.append(f"heldout.json does not hold what it should ({problem!r}): left out.")
        return None


def _heldout_pictures(heldout: _Heldout) -> list[Picture]:
    gain = heldout.gain
    before, after = (np.array([np.mean(row) for row in rows]) for rows in (heldout.before, heldout.after))
    spread = {
        label: np.array([value for row in rows for value in row])
        for label, rows in (("before", heldout.before), ("after", heldout.after))
    }
    drawn = [
        histogram("Held-out rewards", "reward of a fresh sample", spread),
        paired_dots(
            "Held-out reward by prompt",
            "a prompt's mean reward",
            before,
            after,
            caption=f"{(after > before).sum()} of {gain.num_prompts} prompts gained.",
        ),
    ]
    return [picture for picture in drawn if picture]


def _unwatched(guard: HackingGuard, records: list[Record]) -> list[str]:
    """What the guard could not judge, so that no warning means something."""
    lines = []
    lacking = [_NEEDS[rule] for rule in RULES if not guard.watched(rule)]
    if lacking and records:
        lines.append(f"Not watched, since the log has no {', no '.join(lacking)}.")
    return lines


def _hacking(
    records: list[Record], name: str, names: Sequence[str], alarms: Sequence[Alarm], rolls: list[float]
) -> Picture | None:
    total = next((one for one in names if "+" in one and set(one.split("+")) == {*names} - {one}), None)
    is_total = name == total
    rows = {
        "weighted sum of scores" if is_total else "reward model's score": ("", f"{name}/score_mean", ""),
        "gold reward": ("", f"{name}/gold_mean", "gold"),
        "ensemble's spread": ("", f"{name}/spread", "spread"),
    }
    if total is None or is_total:
        # Of the completions, whatever scores them: once, beside what is trained on.
        texts = name.split("+")[0] if is_total else name
        rows |= {
            "completion length": ("tokens", "completions/mean_length", "length"),
            "KL": ("nats per token", "kl", "kl"),
            "repetition": ("share of n-grams", f"{texts}/repetition", "repetition"),
        }
    since = {
        label: float(alarm.since)
        for label, (_, _, rule) in rows.items()
        for alarm in alarms
        if alarm.rule == rule and (alarm.name in (name, "") or is_total)
    }
    return hacking_picture(
        {label: (unit, column(records, key)) for label, (unit, key, _) in rows.items()},
        column(records, "step"),
        since,
        title=_titled("Reward against its checks", name, names),
        rolls=rolls,
    )


def _titled(title: str, name: str, names: Sequence[str]) -> str:
    return f"{title}: {name}" if len(names) > 1 else title


def _curves(
    records: list[Record], names: Sequence[str], rolls: list[float]
) -> tuple[list[Picture], list[str]]:
    """Every curve that the log has values for, and the titles of those it has none for."""
    steps = column(records, "step")

    def curve(key: str, band: str | None = None, label: str = "", **look: Any) -> Curve:
        return Curve(label, steps, column(records, key), column(records, band) if band else None, **look)

    wanted: list[tuple[str, str, list[Curve], str]] = [
        ("Reward", "what the trainer got", [curve("reward", "reward_std")], "Band: one standard deviation."),
        ("KL from the reference", "nats per token", [curve("kl")], ""),
        ("Entropy", "nats per token", [curve("entropy")], ""),
        ("Completion length", "tokens", [curve("completions/mean_length")], ""),
    ]
    for name in names or ["reward"]:
        both = [
            curve(f"{name}/score_mean", f"{name}/score_std", "reward model"),
            curve(f"{name}/gold_mean", None, "gold", colour=6, dashed=True),
        ]
        beside = bool(np.isfinite(both[1].values).any())
        per_name: list[tuple[str, str, list[Curve], str]] = [
            (
                "Score beside gold" if beside else "Score",
                "mean score",
                both if beside else both[:1],
                "Band: one standard deviation of the scores.",
            ),
            ("Spread of the ensemble", "score", [curve(f"{name}/spread")], "Mean over a step's texts."),
            (
                "Length correlation",
                "Pearson, score and length",
                [curve(f"{name}/length_correlation")],
                "Within a worker's texts of a step; 1: only length counts.",
            ),
            ("Repetition", "share of n-grams that came before", [curve(f"{name}/repetition")], ""),
            ("Latency of a reward call", "seconds", [curve(f"{name}/latency_s")], ""),
            ("Retries", "calls sent again", [curve(f"{name}/retries")], ""),
            ("Truncated texts", "share of texts", [curve(f"{name}/truncated")], ""),
        ]
        wanted += [(_titled(title, name, names), *rest) for title, *rest in per_name]  # type: ignore[misc]
    drawn, absent = [], []
    for title, unit, lines, caption in wanted:
        picture = curves(title, unit, lines, rolls=rolls, caption=caption)
        if picture is None:
            absent.append(title)
        else:
            drawn.append(picture)
    return drawn, absent


def _version_shares(records: list[Record], name: str) -> dict[str, Array]:
    """version -> its share of each step's scores, in the order in which versions came."""
    head = f"{name}/version/"
    found = dict.fromkeys(key for record in records for key in record if key.startswith(head))
    return {key.removeprefix(head): np.nan_to_num(column(records, key)) for key in found}


def _rolls(records: list[Record], names: Sequence[str]) -> list[float]:
    """The steps at which a version took over: the first of which it gave the most scores."""
    steps = set()
    for name in names:
        before: int | None = None
        given = _version_shares(records, name)
        parts = np.stack(list(given.values())) if given else np.zeros((0, len(records)))
        for place in np.flatnonzero(parts.sum(axis=0) > 0):
            most = int(np.argmax(parts[:, place]))
            if before is not None and most != before:
                steps.add(float(records[place]["step"]))
            before = most
    return sorted(steps)


def _versions(
    records: list[Record], name: str, names: Sequence[str], rolls: list[float]
) -> tuple[Picture, list[dict[str, Any]]] | None:
    """The strip of which version gave each step's rewards, and one row of its legend for each version."""
    given = _version_shares(records, name)
    steps = column(records, "step")
    told = np.sum(list(given.values()), axis=0) > 0 if given else np.zeros(len(records), np.bool_)
    given = {version: part[told] for version, part in given.items() if part[told].any()}
    title = _titled("Versions of the reward model", name, names)
    caption = "Dotted: another version took over." if rolls else ""
    picture = shares(title, steps[told], given, rolls=rolls, caption=caption)
    if picture is None:
        return None
    legend = [
        {
            "version": version,
            "colour": place % len(COLOURS),
            "first": int(steps[told][part > 0][0]),
            "last": int(steps[told][part > 0][-1]),
            "share": float(part.mean()),
        }
        for place, (version, part) in enumerate(given.items())
    ]
    return picture, legend


def _samples(place: Path, notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """From all ranks: prompts as first and last answered, and what scored highest at the end."""
    files = sorted(place.glob("samples*.jsonl"))
    if not files:
        notes.append("samples*.jsonl is missing: no completions of the run are shown.")
        return [], []
    first: dict[str, Record] = {}
    last: dict[str, Record] = {}
    late: deque[Record] = deque(maxlen=_NUM_LATE)
    ranks = [read_lines(file, notes) for file in files]
    for sample in heapq.merge(*ranks, key=lambda sample: number(sample.get("step"))):
        prompt = plain_text(sample.get("prompt"))
        if prompt in first or len(first) < _NUM_LATE:
            first.setdefault(prompt, sample)
            last[prompt] = sample
        late.append(sample)
    twice = [prompt for prompt in first if first[prompt].get("step") != last[prompt].get("step")]
    paired = [
        {"prompt": _cut(prompt), "before": [_shown(first[prompt])], "after": [_shown(last[prompt])]}
        for prompt in twice[:_NUM_SHOWN]
    ]
    unlike = {plain_text(sample.get("completion")): sample for sample in late}
    scored = [sample for sample in unlike.values() if np.isfinite(number(sample.get("score")))]
    highest = heapq.nlargest(_NUM_TOP, scored, key=lambda sample: number(sample["score"]))
    return paired, [{"prompt": _cut(plain_text(one.get("prompt"))), **_shown(one)} for one in highest]


def _shown(sample: Record) -> dict[str, Any]:
    score = number(sample.get("score"))
    return {
        "text": _cut(plain_text(sample.get("completion"))),
        "score": score if np.isfinite(score) else None,
        "step": sample.get("step"),
    }


def _compared(heldout: _Heldout) -> list[dict[str, Any]]:
    """Prompts from the largest gain to the largest loss, each with its first samples: none was picked."""
    gains = np.array(
        [
            np.mean(after) - np.mean(before)
            for before, after in zip(heldout.before, heldout.after, strict=True)
        ]
    )
    order = np.argsort(-gains, kind="stable")
    places = order[np.unique(np.linspace(0, len(order) - 1, _NUM_SHOWN).round().astype(int))]

    def texts(rows: Sequence[Any], rewards: Sequence[Sequence[float]], place: int) -> list[dict[str, Any]]:
        pairs = zip(rows[place], rewards[place], strict=False)
        return [{"text": _cut(plain_text(text)), "score": score, "step": None} for text, score in pairs][:4]

    return [
        {
            "prompt": _cut(plain_text(heldout.prompts[place])),
            "gain": float(gains[place]),
            "before": texts(heldout.texts[0], heldout.before, place),
            "after": texts(heldout.texts[1], heldout.after, place),
        }
        for place in places
    ]


def plain_text(text: Any) -> str:
    """A string or a message list, as the trainer has it, as text to read; anything else as JSON."""
    if isinstance(text, str):
        return text
    if isinstance(text, list) and all(isinstance(turn, dict) and "role" in turn for turn in text):
        return "\n".join(f"[{turn['role']}] {plain_text(turn.get('content'))}" for turn in text)
    return json.dumps(text, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    more = len(text) - _LONGEST_TEXT
    return text if more <= 0 else f"{text[:_LONGEST_TEXT]} … ({more} more characters)"
