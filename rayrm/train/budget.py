"""The token budget of a micro-batch, where none is given: as many tokens as memory has room for, measured.

Each rank runs the run's longest row, and the row cut to half, forward and backward through the model as it
will train (precision, layout, adapter, gradient checkpointing) with gradients in place, as in every
micro-batch of a step but the first. The difference of the two peaks is what a token takes. The budget is the
largest power of two that a share of the free memory holds beside gradients and optimizer state, coarse so
that the same run chooses the same twice, and at least the longest row.

The probe leaves no gradient, weight or random state changed, and costs about a step. It runs before an engine
takes the model: later every rank would have to take part in each forward, and gradients were the engine's.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rayrm.config import RewardConfig
from rayrm.data.packing import PackedBatch, pack_texts
from rayrm.data.tokenize import TokenizedRow
from rayrm.deepspeed_rules import resolved_stage
from rayrm.errors import ConfigError
from rayrm.model.forward import PackedScorer, to_device
from rayrm.model.layout import unwrapped
from rayrm.train.evaluation import RowSet
from rayrm.train.peak_memory import free_bytes, peak_bytes
from rayrm.train.precision import Precision, in_precision
from rayrm.train.rundir import record_budget, recorded_budget

logger = logging.getLogger("rayrm.train")

_GIB = 2**30
_SHARE = 0.6
"""Of the free memory. The rest is for other programs, fragmentation, and rows unlike the longest."""
_MOST_TOKENS = {"cpu": 8192, "cuda": 65536}
"""From here on a larger micro-batch is no faster."""
_PROBE_LENGTH = 512
"""Without padding memory grows evenly with tokens, so that the beginnings of long texts tell enough."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a micro-batch holds at its peak: `fixed` bytes and `per_token` more for each of its tokens."""

    fixed: float
    per_token: float

    def of(self, num_tokens: int) -> float:
        """Bytes of a micro-batch of `num_tokens`."""
        return self.fixed + self.per_token * num_tokens


@dataclass(frozen=True, slots=True)
class Probe:
    """The model as it will train, and what it is tried on; `pad_token_id` is the model's."""

    module: PackedScorer
    precision: Precision
    device: torch.device
    pad_token_id: int | None

    def footprint(self, row: TokenizedRow) -> Footprint:
        """Measured on the row's texts and on their first halves."""
        padded = self.module.layout.name == "padded"
        most = max(row.lengths) if padded else _PROBE_LENGTH
        whole, half = self._batch(row, most), self._batch(row, min(most, max(row.lengths)) // 2)
        self.module.train()
        with _untouched(self.module, self.device):
            if self.device.type == "cuda":
                self._run(half)  # The libraries' workspaces, taken once, are no token's.
            peaks = [peak_bytes(partial(self._run, batch), self.device) for batch in (half, whole)]
        tokens = [self._num_tokens(batch) for batch in (half, whole)]
        per_token = (peaks[1] - peaks[0]) / max(1, tokens[1] - tokens[0])
        return Footprint(max(0.0, peaks[1] - per_token * tokens[1]), per_token)

    def _num_tokens(self, batch: PackedBatch) -> int:
        """What the model computes, padding included, as a plan counts it."""
        padded = self.module.layout.name == "padded"
        return int(batch.length.max()) * len(batch.length) if padded else batch.num_tokens

    def _batch(self, row: TokenizedRow, length: int) -> PackedBatch:
        """The row's texts, each cut to `length` tokens."""
        texts = [ids[: max(1, length)] for ids in row.sequences]
        return pack_texts(texts, self.pad_token_id, share=self.module.layout.name == "shared")

    def _run(self, batch: PackedBatch) -> None:
        on_device = to_device(batch, self.device, self.module.path)
        torch.autograd.backward(in_precision(self.module, on_device, self.precision).sum())


def decide_budget(
    probe: Probe,
    rows: RowSet,
    config: RewardConfig,
    given: int | None,
    *,
    output_dir: Path,
    rank: int,
    num_ranks: int,
) -> int:
    """The budget of all ranks: as given, as chosen when the run began, or the least that a rank chooses now.

    What is chosen is written to the run directory. Every rank calls this.

    Raises:
        ConfigError: the longest row does not fit a budget that the settings name.
    """

    def say(message: str) -> None:
        if rank == 0:
            logger.info("%s", message)

    layout = probe.module.layout.name
    longest = int(rows.index.tokens(share=layout == "shared", padded=layout == "padded").max())
    if given is not None:
        if longest > given and config.max_tokens_per_microbatch is not None:
            raise ConfigError(
                f"`max_tokens_per_microbatch` ({given}) is below the longest row ({longest} tokens, "
                f"{layout}). Raise it to {longest} or lower `max_length`."
            )
        return max(longest, given)
    recorded = recorded_budget(output_dir)
    free = _free_share(probe.device, num_ranks)
    budget = recorded or choose_budget(probe, rows, config, free=free, num_ranks=num_ranks, say=say)
    if num_ranks > 1:
        least = torch.tensor(budget, device=probe.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        if int(least) < budget:
            say(f"max_tokens_per_microbatch: {int(least)} tokens, since another rank has room for no more")
        budget = int(least)
    if rank == 0:
        record_budget(output_dir, budget)
    return budget


def choose_budget(
    probe: Probe,
    rows: RowSet,
    config: RewardConfig,
    *,
    free: int | None,
    num_ranks: int,
    say: Callable[[str], None],
) -> int:
    """This rank's token budget where `free` bytes are left (None: nobody knows).

    `say` is told how it was chosen, and where gradient checkpointing is not needed.
    """
    layout = probe.module.layout.name
    tokens = rows.index.tokens(share=layout == "shared", padded=layout == "padded")
    longest = int(tokens.max())
    most = _MOST_TOKENS.get(probe.device.type, _MOST_TOKENS["cpu"])
    if free is None:
        say(f"max_tokens_per_microbatch: {max(most, longest)} tokens (free memory is not known here)")
        return max(most, longest)
    room = _SHARE * max(0, free - _state_bytes(probe.module, config, num_ranks))
    (row,) = rows.fetch([int(np.argmax(tokens))])
    found = probe.footprint(row)
    fits = max(1, int((room - found.fixed) / found.per_token)) if found.per_token > 0 else most
    budget: int = max(longest, min(most, 1 << (fits.bit_length() - 1)))
    say(
        f"max_tokens_per_microbatch: {budget} tokens (measured: {found.per_token / 2**10:.0f} KiB a token, "
        f"{room / _GIB:.3g} GiB for them; the longest row has {longest})"
    )
    if found.of(longest) > room:
        say(
            f"the longest row ({longest} tokens) takes {found.of(longest) / _GIB:.2g} GiB and may not fit. "
            "Where memory runs out, lower `max_length`, or set `gradient_checkpointing=true` or "
            "`zero_stage=3`"
        )
    layers = _checkpointed_layers(probe.module)
    # Without checkpointing a layer holds no more than it holds while it is recomputed: room for the probe.
    if layers and len(layers) * found.of(longest) <= room:
        with _without_checkpointing(layers):
            without = probe.footprint(row).of(budget)
        if without <= room:
            say(
                f"gradient checkpointing is not needed: without it a micro-batch of {budget} tokens takes "
                f"{without / _GIB:.2g} of {room / _GIB:.3g} GiB. To save the time it takes: "
                "`gradient_checkpointing=false`"
            )
    return budget


def _free_share(device: torch.device, num_ranks: int) -> int | None:
    """The bytes that this rank may take; the ranks of one machine share its memory."""
    free = free_bytes(device)
    if free is None or device.type == "cuda":
        return free
    # Ray Train and torch's launcher say how many of the ranks are here.
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))


def _state_bytes(module: torch.nn.Module, config: RewardConfig, num_ranks: int) -> float:
    """What training holds beside the model and its activations, at most.

    A gradient for each trained weight; and of this rank's share of them an optimizer's two moments and one
    copy more, ZeRO's own weights or what an update takes.
    """
    trained = sum(int(p.nbytes) for p in module.parameters() if p.requires_grad)
    return float(trained) * (1 + 3 / (num_ranks if resolved_stage(config) else 1))


@contextlib.contextmanager
def _untouched(module: PackedScorer, device: torch.device) -> Iterator[None]:
    """Zeros as gradients, and what gradients and random states were before, afterwards.

    The input embedding gets none: its gradient, as large for one token as for thousands, would be the peak.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    before = [p.grad for p in trained]
    embedding = {id(p) for p in unwrapped(module.model).get_input_embeddings().parameters()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for parameter in trained:
                if id(parameter) in embedding:
                    parameter.requires_grad_(False)
                else:
                    parameter.grad = torch.zeros_like(parameter)
            yield
        finally:
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.requires_grad_(True)
                parameter.grad = gradient


def _checkpointed_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that are computed again in backward."""
    # On transformers' layers the flag stands on each; older models read it on the decoder that runs them.
    return [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]


@contextlib.contextmanager
def _without_checkpointing(layers: list[torch.nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
