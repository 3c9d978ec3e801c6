"""Texts -> scores in this process: the published (or any saved) reward model, without Ray.

What texts begin with, such as the prompt of several completions, is computed once; batches are cut by tokens
(`scheduler.py`) and the answer comes in input order. A score is a finite float or a `ScoreError`; it does
not depend on what else is in the batch (float32: below 1e-5) and equals that of stock
`AutoModelForSequenceClassification` (below 1e-4). One model computes one batch at a time: to score from many
processes at once, `deploy` it and use `RewardClient`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrm.data.messages import Text
from rayrm.data.packing import Ids, pack_texts
from rayrm.data.tokenize import TextForm, TextInput, encode_each
from rayrm.errors import ScoreError
from rayrm.model.attention_path import choose_path
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import choose_layout, plain_reach
from rayrm.model.reward_model import LoadedModel, load_saved
from rayrm.serve.registry import CURRENT, MANIFEST, open_published
from rayrm.serve.request import (
    Refused,
    Scorable,
    ScoreRequest,
    Truncation,
    check_truncation,
    id_inputs,
    text_inputs,
)
from rayrm.serve.scheduler import Layout, ScoreQueue

logger = logging.getLogger(__name__)

_ON_GPU = 16384
_ON_CPU = 4096
"""A CPU gains nothing by larger batches: their activations leave its caches, and are mapped anew each time
(6 layers of 576: 16384 tokens are 3-6% slower than 4096)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request's texts as the model takes them: `sequences`, int32 `[length]` by their place, in order.

    `truncated`: the places of those that were cut to the model's positions. `errors`: of a partial request,
    why the others have no sequence, by their place.
    """

    sequences: dict[int, Ids] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)

    def extend(self, later: Encoded) -> None:
        """Take in what comes after it."""
        self.sequences.update(later.sequences)
        self.truncated.extend(later.truncated)
        self.errors.update(later.errors)


class RewardModel:
    """A loaded reward model; `text_form` says whether it takes messages or plain strings.

    Texts longer than `reach` (a sliding window, a limit of the rope; None: there is none) are padded, others
    computed in `layout`. `is_float32`: its weights are.
    """

    def __init__(self, loaded: LoadedModel, *, max_tokens_per_batch: int | None = None) -> None:
        layout = choose_layout(loaded.model, longest=loaded.max_positions, train=False)
        self.reach: int | None = None
        if layout.name == "padded" and (reach := plain_reach(loaded.model)):
            within = choose_layout(loaded.model, longest=reach, train=False)
            if within.name == "shared":
                logger.info("prompts of texts above %d tokens are not shared: %s", reach, layout.reason)
                layout, self.reach = within, reach
        if layout.reason:
            logger.info("prompts are not shared among completions: %s", layout.reason)
        self.tokenizer = loaded.tokenizer
        self.text_form: TextForm = loaded.text_form
        self.max_positions = loaded.max_positions
        self.layout: Layout = layout.name
        self._device = next(loaded.model.parameters()).device
        self._is_offloaded = False
        self._is_between = False  # a `restore` that failed left some weights on the device
        self.is_float32 = next(loaded.model.parameters()).dtype == torch.float32
        default = _ON_CPU if self._device.type == "cpu" else _ON_GPU
        self.max_tokens_per_batch = max_tokens_per_batch or default
        self._pad_token_id = loaded.pad_token_id
        self._vocabulary_size = int(loaded.model.config.get_text_config().vocab_size)
        path = choose_path(loaded.model, self._device)
        if layout.name != "padded":
            logger.info("%s", path)
        self._scorer = PackedScorer(loaded.model, layout, path=path.name).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> RewardModel:
        """Load a published version, a run's output, a checkpoint, or a stock transformers reward model.

        `device` None: a GPU if there is one. `dtype` None: float32. `max_tokens_per_batch` (None: 4096 on a
        CPU, else 16384) bounds memory and cannot change a score. Raises ModelError for what is not a
        one-label model.
        """
        if (Path(path) / MANIFEST).is_file() or (Path(path) / CURRENT).is_file():
            path = open_published(path).path  # compares every file with its checksum
        loaded = load_saved(path, device=device, dtype="float32" if dtype is None else dtype)
        return cls(loaded, max_tokens_per_batch=max_tokens_per_batch)

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        rendered: bool = False,
        truncation: Truncation | None = None,
    ) -> list[float]:
        """One score for each (prompt, completion), in order; higher is better.

        Both are lists of strings (standard models), or of message lists (conversational models). `rendered`:
        strings that went through the chat template already. A text above the model's position limit raises
        ScoreError unless `truncation` says which end to cut ("left" keeps the completion).
        """
        inputs = text_inputs(prompts, completions, tools, chat_template_kwargs, rendered=rendered)
        return self.score_inputs(inputs, truncation=truncation)

    def score_inputs(
        self, inputs: Sequence[Scorable], *, truncation: Truncation | None = None
    ) -> list[float]:
        """One score for each input, in order. Raises ScoreError naming the input that cannot be scored."""
        sequences = self.encode(inputs, truncation=truncation)
        return self.score_ids(sequences)

    def score_ids(self, sequences: Sequence[Ids]) -> list[float]:
        """One score for each sequence of token ids (int32 `[length]`), in order.

        Sequences that begin alike are computed together, and what they begin with once.
        """
        sequences = id_inputs(sequences)
        if not sequences:
            return []
        self._check_ids(sequences)
        queue = self.queue()
        queue.add(0, sequences)
        scores: list[float] = []
        while texts := queue.take():
            for _, scores in queue.answer(texts, self.compute([text.ids for text in texts])):
                check_finite(scores)
        return scores

    def encode(self, inputs: Sequence[Scorable], *, truncation: Truncation | None = None) -> list[Ids]:
        """Token ids of each input, int32 `[length]`, within the limit. ScoreError names a bad input."""
        request = ScoreRequest(inputs, truncation=truncation)
        return list(self.encode_request(request).sequences.values())

    def encode_request(self, request: ScoreRequest, start: int = 0, stop: int | None = None) -> Encoded:
        """The token ids of a request's texts, or of those in a part of it; ids are checked and cut alike.

        Raises ScoreError naming the first input that cannot be scored, unless the request is `partial`: then
        it is told in `errors`. Texts are tokenized in one call, also beside bad ones.
        """
        check_truncation(request.truncation)
        encoded = Encoded()
        places = range(len(request.inputs))[start:stop]
        for place, ids in zip(places, self._tokenized(request.inputs, places), strict=True):
            try:
                if isinstance(ids, ScoreError):
                    raise ids
                kept = self._within_limit(ids, place, request)
            except ScoreError as error:
                if not request.partial:
                    raise
                encoded.errors[place] = str(error)
                continue
            if len(kept) < len(ids):
                encoded.truncated.append(place)
            encoded.sequences[place] = kept
        return encoded

    def queue(self) -> ScoreQueue:
        """An empty queue that plans batches for this model."""
        return ScoreQueue(self.max_tokens_per_batch, self.layout, self.reach)

    def compute(self, sequences: Sequence[Ids]) -> list[float]:
        """One forward over `sequences` as one batch, or one more for those longer than `reach`.

        Scores as the model gives them, NaN included.
        """
        self.restore()
        beyond = [n for n, ids in enumerate(sequences) if self.reach is not None and len(ids) > self.reach]
        within = sorted(set(range(len(sequences))) - set(beyond))
        scores = [0.0] * len(sequences)
        for places, path in ((within, self._scorer.path), (beyond, None)):
            if not places:
                continue
            shares = path is not None and self.layout == "shared"
            batch = pack_texts([sequences[n] for n in places], self._pad_token_id, share=shares)
            with torch.inference_mode():
                found = self._scorer(to_device(batch, self._device, path)).cpu().tolist()
            for n, score in zip(places, found, strict=True):
                scores[n] = score
        return scores

    def offload(self) -> None:
        """Move the weights to the CPU's memory and give the device's back to others. Nothing on a CPU.

        Not while a batch is computed: call it, `restore` and `compute` from one thread.
        """
        if (self._is_offloaded and not self._is_between) or self._device.type == "cpu":
            return
        self._is_offloaded = True  # also where a move fails halfway: `restore` then moves what had left
        self._move(torch.device("cpu"))
        self._is_between = False
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.empty_cache()

    def restore(self) -> None:
        """Move the weights back to where they came from, bit for bit; `compute` does so where needed."""
        if self._is_offloaded:
            self._is_between = True
            self._move(self._device)
            self._is_offloaded = self._is_between = False

    def release(self) -> None:
        """Let the loaded model compute as it did before, for another scorer to take it; the end of this."""
        self._scorer.release()

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Its weights, in memory."""
        return list(self._scorer.parameters())

    def _move(self, device: torch.device) -> None:
        self._scorer.to(device)

    def _tokenized(self, inputs: Sequence[Scorable], places: range) -> list[Ids | ScoreError]:
        """The ids of the inputs at `places`, given or made, or why a text has none."""
        texts = [entry for place in places if isinstance(entry := inputs[place], TextInput)]
        made = iter(encode_each(self.tokenizer, self.text_form, texts))
        found: list[Ids | ScoreError] = []
        for place in places:
            entry = inputs[place]
            if isinstance(entry, Refused):
                found.append(ScoreError(entry.reason))
            elif isinstance(entry, TextInput):
                ids = next(made)
                if isinstance(ids, ScoreError):
                    named = ScoreError(f"input {place} of {len(inputs)}: {ids}")
                    named.__cause__ = ids.__cause__
                    ids = named
                found.append(ids)
            else:
                found.append(entry)
        return found

    def _within_limit(self, ids: Ids, place: int, request: ScoreRequest) -> Ids:
        """The ids of input `place` as they are to be scored. Raises ScoreError naming it."""
        if len(ids) == 0:
            raise ScoreError(f"input {place} is empty: there is no token to score. Remove it.")
        # Of texts too: a tokenizer may have tokens for which the model has no embedding.
        self._check_vocabulary(ids, f"input {place} of {len(request.inputs)}")
        if self.max_positions is None or len(ids) <= self.max_positions:
            return ids
        return _cut(ids, self.max_positions, request.truncation, place)

    def _check_vocabulary(self, ids: Ids, name: str) -> None:
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0:
            raise ScoreError(f"{name} must be a flat list of token ids, at least one.")
        for id_ in (ids.min(), ids.max()):
            if not 0 <= id_ < self._vocabulary_size:
                raise ScoreError(
                    f"{name} has the token id {id_}, and the model's are in [0, {self._vocabulary_size}). "
                    "Tokenize with this model's tokenizer, or leave that token out."
                )

    def _check_ids(self, sequences: Sequence[Ids]) -> None:
        for index, ids in enumerate(sequences):
            self._check_vocabulary(ids, f"`sequences[{index}]`")
            if self.max_positions is not None and len(ids) > self.max_positions:
                _cut(ids, self.max_positions, None, index)


def check_finite(scores: Sequence[float]) -> None:
    """Raise ScoreError naming the first score that is NaN or infinite."""
    for said in broken_scores(dict(enumerate(scores)), len(scores)).values():
        raise ScoreError(said)


def broken_scores(scores: Mapping[int, float], count: int) -> dict[int, str]:
    """What is to be said of scores that are NaN or infinite; both by the place of their input, of `count`."""
    return {
        place: f"input {place} of {count} got the score {score}: the weights, or their dtype's range, are "
        "broken. Score with dtype float32, or publish a checkpoint whose weights are finite."
        for place, score in scores.items()
        if not math.isfinite(score)
    }


def _cut(ids: Ids, limit: int, truncation: Truncation | None, index: int) -> Ids:
    if truncation == "left":
        return np.ascontiguousarray(ids[-limit:])
    if truncation == "right":
        return ids[:limit]
    raise ScoreError(
        f"input {index} has {len(ids)} tokens, the model's position limit is {limit}. Shorten it, or pass "
        'truncation="left" (cuts the beginning) or "right" (cuts the end).'
    )
