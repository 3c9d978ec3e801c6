"""Each attention path equals the dense definition over random forests, forward and backward.

What runs on a GPU only is split: the plan for the variable-length kernel is checked with a stand-in that
computes what torch documents, the kernels themselves in tests marked `gpu`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from rayrm.data.packing import PackedBatch, pack_texts
from rayrm.model import segment_loop, tiled
from rayrm.model.attention import Attention, AttentionPath, Dense, attention_of, dense_mask, reach_of
from rayrm.model.flex import Flex
from rayrm.model.tiled import Tiled
from rayrm.model.varlen import Varlen

CPU = torch.device("cpu")
NUM_HEADS, NUM_KEY_HEADS, HEAD_SIZE = 4, 2, 16

# Two ids: short sequences already branch on every level, repeat, and begin one another.
forests = st.lists(st.lists(st.sampled_from([3, 4]), min_size=1, max_size=9), min_size=1, max_size=7).map(
    lambda texts: pack_texts([np.array(text, np.int32) for text in texts], 0)
)


def large_forest(seed: int) -> PackedBatch:
    """Prompts of some hundred tokens, each with three completions: several blocks and tiles a run."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, 60, rng.integers(low, high)).astype(np.int32)

    prompts = [ids(1, 400) for _ in range(3)]
    return pack_texts([np.concatenate([prompt, ids(1, 150)]) for prompt in prompts for _ in range(3)], 0)


def documented_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`varlen_attn` as documented: sequences end to end, causal at the lower right, `[tokens, heads, D]`."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(query) == cu_seq_q[-1]
    assert len(key) == len(value) == cu_seq_k[-1]
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    parts = []
    for n in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[n] : cu_seq_q[n + 1]]
        k, v = (x[cu_seq_k[n] : cu_seq_k[n + 1]].repeat_interleave(groups, dim=1) for x in (key, value))
        logits = torch.einsum("qhd,khd->hqk", q, k) * (scale or query.shape[-1] ** -0.5)
        hidden = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
        parts.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(parts)


def older_varlen(*args: Any, scale: float | None = None, window_size: tuple[int, int]) -> torch.Tensor:
    """The same before torch 2.12: grouped heads go unsaid."""
    grouped = args[0].shape[1] != args[1].shape[1]
    return documented_varlen(*args, scale=scale, window_size=window_size, enable_gqa=grouped)


def inputs(
    num_tokens: int,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    key_heads: int = NUM_KEY_HEADS,
) -> list[torch.Tensor]:
    """Query, key, value, and the gradient that comes back; laid out as transformers lays them out."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(heads: int) -> torch.Tensor:
        made = torch.randn(1, num_tokens, heads, HEAD_SIZE, generator=generator).to(device, dtype)
        return made.transpose(1, 2)

    return [normal(NUM_HEADS), normal(key_heads), normal(key_heads), normal(NUM_HEADS)]


def attended(
    attention: Attention, given: list[torch.Tensor], scaling: float | None, softcap: float | None = None
) -> list[torch.Tensor]:
    """The result and the gradients of query, key and value."""
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in given[:3])
    result = attention.attend(query, key, value, scaling, softcap)
    result.backward(given[3])
    gradients = [query.grad, key.grad, value.grad]
    return [result.detach(), *(gradient for gradient in gradients if gradient is not None)]


def assert_is_the_definition(
    attention: Attention, batch: PackedBatch, scaling: float | None = None, softcap: float | None = None
) -> None:
    for key_heads in (NUM_KEY_HEADS, NUM_HEADS):
        tensors = inputs(batch.num_tokens, key_heads=key_heads)
        wanted = attended(Dense.of(batch, CPU), tensors, scaling, softcap)
        found = attended(attention, tensors, scaling, softcap)
        assert len(found) == 4
        for one, other in zip(found, wanted, strict=True):
            # The same float32 sums in another order.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("path", ["loop", "tiled"])
@settings(max_examples=30, deadline=None)
@given(batch=forests)
def test_a_cpu_path_is_the_definition(path: AttentionPath, scaling: float | None, batch: PackedBatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "_TILE", 3)
        assert_is_the_definition(attention_of(batch, path, CPU), batch, scaling)


@pytest.mark.parametrize("scaling", [None, 0.3])
@settings(max_examples=30, deadline=None)
@given(batch=forests)
def test_the_loop_caps_logits_as_the_definition(scaling: float | None, batch: PackedBatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_loop, "_BLOCK", 3)
        assert_is_the_definition(attention_of(batch, "loop", CPU), batch, scaling, softcap=1.5)


def test_the_memory_of_capped_logits_grows_evenly_with_tokens() -> None:
    """What stays for backward: queries, keys, values and results, and no logits."""

    def held(length: int) -> int:
        batch = pack_texts([np.arange(3, 3 + length, dtype=np.int32)], 0)
        query, key, value, _ = inputs(batch.num_tokens)
        stored: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        attention = attention_of(batch, "loop", CPU)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attention.attend(query.requires_grad_(), key, value, None, 1.5)
        return sum(storage.nbytes() for storage in stored.values())

    # Logits would be four times as many.
    assert held(1024) <= 2.1 * held(512)


def test_the_memory_of_tiles_grows_evenly_with_tokens() -> None:
    """The masks of a long text are parts of one, of a tile's queries."""

    def held(length: int) -> int:
        tail = np.arange(3, 3 + length // 2, dtype=np.int32)
        sides = [np.concatenate([np.full(length // 2, 1, np.int32), [side], tail]) for side in (1, 2)]
        tiles = Tiled.of(pack_texts([side.astype(np.int32) for side in sides], 0)).tiles
        masks = [tile.mask.untyped_storage() for tile in tiles if tile.mask is not None]
        assert len(masks) > 1
        return sum({mask.data_ptr(): mask.nbytes() for mask in masks}.values())

    # A mask for each tile would be four times as much, and hundreds of MB for 8192 tokens.
    assert held(4096) <= 2.1 * held(2048)
    assert held(4096) < 4 * 2**20


@pytest.mark.parametrize("key_heads", [NUM_KEY_HEADS, NUM_HEADS])
def test_the_definition_caps_logits_as_their_formula(key_heads: int) -> None:
    batch = large_forest(0)
    query, key, value, _ = inputs(batch.num_tokens, key_heads=key_heads)
    key_of, value_of = (part.repeat_interleave(NUM_HEADS // key_heads, dim=1) for part in (key, value))
    logits = 1.5 * torch.tanh(query @ key_of.transpose(2, 3) * 0.3 / 1.5)
    hidden = torch.from_numpy(~dense_mask(batch))
    wanted = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value_of
    dense = Dense.of(batch, CPU)
    # The same float32 sums in another order.
    torch.testing.assert_close(dense.attend(query, key, value, 0.3, 1.5), wanted, rtol=1e-4, atol=1e-5)
    # A cap far above the logits is none: both formulas are one.
    far, plain = (dense.attend(query, key, value, 0.3, softcap) for softcap in (1e4, None))
    torch.testing.assert_close(far, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["tiled", "varlen"])
def test_a_kernel_without_a_soft_cap_refuses_one(path: AttentionPath) -> None:
    batch = large_forest(0)
    query, key, value, _ = inputs(batch.num_tokens)
    with pytest.raises(AssertionError, match="no cap"):
        attention_of(batch, path, CPU).attend(query, key, value, None, 1.5)


@pytest.mark.parametrize("kernel", [documented_varlen, older_varlen])
@pytest.mark.parametrize("scaling", [None, 0.3])
@settings(max_examples=30, deadline=None)
@given(batch=forests)
def test_the_plan_for_the_varlen_kernel_is_the_definition(
    kernel: Any, scaling: float | None, batch: PackedBatch
) -> None:
    assert_is_the_definition(Varlen.of(batch, CPU, kernel), batch, scaling)


@pytest.mark.parametrize("path", ["loop", "tiled", "varlen"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_path_is_the_definition_over_long_runs(path: AttentionPath, seed: int) -> None:
    batch = large_forest(seed)
    found = Varlen.of(batch, CPU, documented_varlen) if path == "varlen" else attention_of(batch, path, CPU)
    assert_is_the_definition(found, batch)


def test_texts_that_share_nothing_are_not_gathered_for_the_varlen_kernel() -> None:
    texts = [np.arange(3, 9, dtype=np.int32), np.arange(3, 12, dtype=np.int32)]
    assert Varlen.of(pack_texts(texts, 0, share=False), CPU).keys is None
    forked = [texts[0], texts[0][:4], np.append(texts[0][:2], 50).astype(np.int32)]
    assert Varlen.of(pack_texts(forked, 0), CPU).keys is not None


def test_gradients_of_a_shared_ancestor_are_added_up_in_float32() -> None:
    # 600 runs give 1 each; bf16 cannot count beyond 256.
    prompt = np.arange(3, 6, dtype=np.int32)
    batch = pack_texts([np.append(prompt, n).astype(np.int32) for n in range(100, 700)], 0)

    def key_free(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        return query + value.sum()

    value = torch.ones(1, 1, batch.num_tokens, 8, dtype=torch.bfloat16, requires_grad=True)
    query = torch.zeros_like(value).detach()
    result = Varlen.of(batch, CPU, key_free).attend(query, query, value, None)
    result.backward(torch.zeros_like(result).index_fill_(2, torch.tensor([0]), 1 / 8))
    assert value.grad is not None
    assert float(value.grad[0, 0, 0, 0]) == 600


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_blocks_for_flex_are_those_of_the_dense_mask(seed: int) -> None:
    batch = large_forest(seed)
    mask = torch.from_numpy(dense_mask(batch))
    size = batch.num_tokens
    theirs = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, size, size, device="cpu")
    ours = Flex.of(reach_of(batch), CPU).blocks
    assert size > 3 * 128
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("scaling", "softcap"), [(None, None), (0.3, None), (0.3, 1.5)])
@settings(max_examples=20, deadline=None)
@given(batch=forests | st.builds(large_forest, st.integers(0, 3)))
def test_flex_is_the_definition_forward(
    scaling: float | None, softcap: float | None, batch: PackedBatch
) -> None:
    # It has no backward on a CPU.
    query, key, value, _ = inputs(batch.num_tokens)
    wanted = Dense.of(batch, CPU).attend(query, key, value, scaling, softcap)
    found = attention_of(batch, "flex", CPU).attend(query, key, value, scaling, softcap)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("path", "softcap"), [("varlen", None), ("flex", None), ("flex", 1.5), ("loop", 1.5)]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_gpu_path_is_the_definition(
    path: AttentionPath, softcap: float | None, seed: int, dtype: torch.dtype
) -> None:
    batch = large_forest(seed)
    device = torch.device("cuda")
    tensors = inputs(batch.num_tokens, device=device, dtype=dtype)
    wanted = attended(Dense.of(batch, CPU), [tensor.cpu().float() for tensor in tensors], None, softcap)
    found = attended(attention_of(batch, path, device), tensors, None, softcap)
    for one, other in zip(found, wanted, strict=True):
        # Half precision keeps 8 (bf16) or 11 bits; a wrong key or factor is off by the norm itself.
        assert float((one.cpu().float() - other).norm()) <= 2e-2 * float(other.norm())
