"""One version of a model in a replica's memory: loaded from its files, checked, with a queue of its own.

A request belongs to the version that it met. So a version that was replaced stays until its last request is
answered, and no request is scored by two versions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.errors import PublishError, ScoreError
from rayrm.model.adapters import ADAPTER_CONFIG
from rayrm.serve.adapters import SharedBases, holds_adapter
from rayrm.serve.calibration import stored_calibration
from rayrm.serve.drift import Distribution, ScoreWindow
from rayrm.serve.probe import check_probe
from rayrm.serve.registry import MANIFEST
from rayrm.serve.request import ModelPlace, ScoreRequest, ScoreResult, Timing
from rayrm.serve.saved import read_json
from rayrm.serve.scheduler import QueuedText, ScoreQueue
from rayrm.serve.scorer import Encoded, RewardModel, broken_scores, check_finite


@dataclass(slots=True)
class Waiting:
    """A request that is in the queue, or of which texts are being computed."""

    encoded: Encoded
    answer: asyncio.Future[ScoreResult]
    added_at: float
    tokenize_s: float
    partial: bool = False
    begun_at: float | None = None
    compute_s: float = 0.0


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A version of model `name`, and the requests that met it. `num_bound`: those not answered yet.

    `left_at`: when another took its place, on the monotonic clock.
    """

    name: str
    place: ModelPlace
    model: RewardModel
    queue: ScoreQueue
    window: ScoreWindow | None = None
    calibration: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    waiting: dict[int, Waiting] = field(default_factory=dict)
    num_bound: int = 0
    loaded_at: float = field(default_factory=time.time)
    left_at: float | None = None
    _num_requests: int = 0

    @classmethod
    def load(
        cls,
        name: str,
        place: ModelPlace,
        max_tokens_per_batch: int | None,
        bases: SharedBases | None = None,
    ) -> LoadedModel:
        """Load it, compare its files with their checksums, and its scores with those of its publication.

        An adapter takes its base from `bases`; None: it is merged into one of its own. Raises PublishError,
        ModelError or ScoreError, naming what is wrong.
        """
        if bases is not None and holds_adapter(place.path):
            model = bases.open(place.path, max_tokens_per_batch=max_tokens_per_batch)
        else:
            model = RewardModel.from_pretrained(place.path, max_tokens_per_batch=max_tokens_per_batch)
        manifest: dict[str, Any] = {}
        if (Path(place.path) / MANIFEST).is_file():
            manifest = read_json(Path(place.path) / MANIFEST)
            try:
                check_probe(model, manifest)
            except PublishError as error:
                if not holds_adapter(place.path):
                    raise
                base = read_json(Path(place.path) / ADAPTER_CONFIG).get("base_model_name_or_path")
                raise PublishError(
                    f"{error} It is an adapter: look whether its base ({base!r}) is the model that it was "
                    "trained on."
                ) from error
        # Of a model without a probe too: broken weights end the loading, and not the first caller's request.
        check_finite(model.score_ids([np.zeros(1, np.int32)]))
        stored = Distribution.stored(manifest)
        window = ScoreWindow(stored) if stored else None
        return cls(name, place, model, model.queue(), window, stored_calibration(manifest))

    def encode(self, request: ScoreRequest, start: int, stop: int) -> Encoded:
        """The ids of a part of the request."""
        return self.model.encode_request(request, start, stop)

    def add(
        self, encoded: Encoded, tokenize_s: float, expires_at: float | None, *, partial: bool = False
    ) -> tuple[int, Waiting]:
        """Queue what of a request can be scored; within an event loop."""
        number = self._num_requests
        self._num_requests += 1
        answer: asyncio.Future[ScoreResult] = asyncio.get_running_loop().create_future()
        entry = self.waiting[number] = Waiting(encoded, answer, time.monotonic(), tokenize_s, partial)
        if encoded.sequences:
            self.queue.add(number, list(encoded.sequences.values()), expires_at=expires_at)
        else:
            answer.set_result(self._result(entry, []))
        return number, entry

    def remove(self, number: int) -> None:
        """Answered, failed or cancelled: what of it still waits is not computed."""
        self.queue.drop(number)
        self.waiting.pop(number, None)

    def compute(self, texts: Sequence[QueuedText]) -> list[float]:
        """In the computing thread; weights that were moved away come back first."""
        return self.model.compute([text.ids for text in texts])

    def began(self, texts: Sequence[QueuedText]) -> None:
        for number in {text.request for text in texts}:
            entry = self.waiting.get(number)
            if entry is not None and entry.begun_at is None:
                entry.begun_at = time.monotonic()

    def give(self, texts: Sequence[QueuedText], scores: Sequence[float], seconds: float) -> list[ScoreResult]:
        """Answer the requests whose last text this was; returns their results."""
        for number in {text.request for text in texts}:
            if number in self.waiting:
                self.waiting[number].compute_s += seconds
        given = []
        for number, complete in self.queue.answer(texts, scores):
            entry = self.waiting.get(number)
            if entry is None or entry.answer.done():
                continue
            encoded = entry.encoded
            broken = broken_scores(dict(zip(encoded.sequences, complete, strict=True)), _count(encoded))
            if broken and not entry.partial:
                entry.answer.set_exception(ScoreError(next(iter(broken.values()))))
                continue
            encoded.errors.update(broken)
            result = self._result(entry, complete)
            entry.answer.set_result(result)
            given.append(result)
        return given

    def fail(self, texts: Sequence[QueuedText], failure: BaseException) -> None:
        """A batch failed: so do the requests that have texts in it, and no other."""
        for number in {text.request for text in texts}:
            entry = self.waiting.get(number)
            self.queue.drop(number)
            if entry is not None and not entry.answer.done():
                entry.answer.set_exception(failure)

    def _result(self, entry: Waiting, scores: list[float]) -> ScoreResult:
        encoded, now = entry.encoded, time.monotonic()
        begun = entry.begun_at if entry.begun_at is not None else now
        count = _count(encoded)
        placed, num_tokens = [float("nan")] * count, [0] * count
        for (place, ids), score in zip(encoded.sequences.items(), scores, strict=True):
            num_tokens[place] = len(ids)
            if place not in encoded.errors:
                placed[place] = score
        timing = Timing(
            entry.tokenize_s, begun - entry.added_at, entry.compute_s, entry.tokenize_s + now - entry.added_at
        )
        return ScoreResult(
            placed,
            self.place.version,
            self.name,
            num_tokens,
            encoded.truncated,
            timing=timing,
            errors=encoded.errors,
            calibration=self.calibration,
        )


def _count(encoded: Encoded) -> int:
    """Of the request's texts."""
    return len(encoded.sequences.keys() | encoded.errors.keys())
