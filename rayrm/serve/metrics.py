"""[RAY] What a replica counts, for Prometheus: Ray exports it on each node's metrics port, as `ray_rayrm_*`.

The dashboard that draws them is `grafana.json`, beside this file. Serve adds its own by application,
deployment and replica (`ray_serve_*`), and tags these alike.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections import Counter

from ray.serve import metrics

from rayrm.serve.batch_loop import BatchLoop, BatchReport
from rayrm.serve.loaded import LoadedModel

logger = logging.getLogger("rayrm.serve")
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]
_SCORES = [-20, -10, -7, -5, -4, -3, -2, -1.5, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 20]
_BUCKETS = [*(f"{bound:g}" for bound in _SCORES), "+Inf"]
_TOKENS = [2**power for power in range(5, 18)]


class ReplicaMetrics:
    """Named after what they count; a histogram's unit is in its name. `phase`: tokenize, queue, compute."""

    def __init__(self) -> None:
        self._requests = metrics.Counter("rayrm_requests", "Requests answered", tag_keys=("model", "version"))
        self._texts = metrics.Counter("rayrm_texts", "Texts scored", tag_keys=("model", "version"))
        self._errors = metrics.Counter("rayrm_errors", "Requests refused or failed", tag_keys=("kind",))
        self._phase = metrics.Histogram(
            "rayrm_phase_seconds", "Time of a request by phase", boundaries=_SECONDS, tag_keys=("phase",)
        )
        self._batch_tokens = metrics.Histogram(
            "rayrm_batch_tokens", "Tokens computed in a batch", boundaries=_TOKENS, tag_keys=("model",)
        )
        self._batch_seconds = metrics.Histogram(
            "rayrm_batch_seconds", "Time of a batch", boundaries=_SECONDS, tag_keys=("model",)
        )
        self._tokens = metrics.Counter("rayrm_tokens", "Tokens of the texts scored", tag_keys=("model",))
        self._saved = metrics.Counter(
            "rayrm_tokens_saved", "Tokens not computed, as texts begin alike", tag_keys=("model",)
        )
        # Ray's histograms have positive bounds alone: a counter for each bucket, named by its upper bound.
        self._scores = metrics.Counter(
            "rayrm_scores", "Scores given, by bucket", tag_keys=("model", "version", "bucket")
        )
        self._waiting = metrics.Gauge("rayrm_waiting_requests", "Requests not answered yet")
        self._waiting_tokens = metrics.Gauge("rayrm_waiting_tokens", "Tokens of the texts that wait")
        self._version = metrics.Gauge(
            "rayrm_version_info", "1 for the version that serves", tag_keys=("model", "version")
        )
        self._drift = metrics.Gauge(
            "rayrm_score_drift",
            "The latest window's mean, in standard deviations from publication's (shift), and the ratio of "
            "their standard deviations (spread)",
            tag_keys=("model", "version", "of"),
        )
        self._shown: dict[str, str] = {}

    def batch(self, report: BatchReport) -> None:
        """Count a batch, and the requests that it was the last of."""
        name, version = report.model.name, report.model.place.version
        tags = {"model": name, "version": version}
        self._texts.inc(len(report.texts), tags)
        num_tokens, num_computed = report.num_tokens, report.num_computed
        self._tokens.inc(num_tokens, {"model": name})
        if num_tokens > num_computed:
            self._saved.inc(num_tokens - num_computed, {"model": name})
        self._batch_tokens.observe(num_computed, {"model": name})
        self._batch_seconds.observe(report.seconds, {"model": name})
        for result in report.results:
            self._requests.inc(1, tags)
            for phase in ("tokenize", "queue", "compute"):
                self._phase.observe(getattr(result.timing, f"{phase}_s"), {"phase": phase})
            scores = [score for score in result.scores if not math.isnan(score)]  # of partial requests
            for bucket, count in Counter(bisect_left(_SCORES, score) for score in scores).items():
                self._scores.inc(count, {**tags, "bucket": _BUCKETS[bucket]})
            self._watch(report.model, scores)

    def error(self, error: BaseException) -> None:
        self._errors.inc(1, {"kind": type(error).__name__})

    def state(self, loop: BatchLoop) -> None:
        """What holds now. Ray forgets a gauge that was not set for some 25 s: call this more often."""
        self._waiting.set(loop.num_waiting)
        self._waiting_tokens.set(loop.waiting_tokens)
        for model in loop.models.values():
            self._serves(model)
            if model.window is not None and (reading := model.window.reading) is not None:
                tags = {"model": model.name, "version": model.place.version}
                self._drift.set(reading.shift or 0.0, {**tags, "of": "shift"})
                self._drift.set(reading.std_ratio or 0.0, {**tags, "of": "spread"})

    def _serves(self, model: LoadedModel) -> None:
        before = self._shown.get(model.name)
        if before is not None and before != model.place.version:
            self._version.set(0, {"model": model.name, "version": before})
        self._version.set(1, {"model": model.name, "version": model.place.version})
        self._shown[model.name] = model.place.version

    def _watch(self, model: LoadedModel, scores: list[float]) -> None:
        if model.window is None:
            return
        model.window.add(scores)
        if said := model.window.warning():
            logger.warning("%s %s: %s", model.name, model.place.version, said)
