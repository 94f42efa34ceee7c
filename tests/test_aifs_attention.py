"""AIFS attention: every variant against explicit masks and causal attention, and the code of our own kernel.

Run as a program it compiles the kernel without a GPU and prints a JSON line per case, because a process that interprets
kernels cannot compile them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mqbench.kernels import attention_plan, reference
from mqbench.kernels.attention import VARIANTS, aifs_attention, attend, plan_attention
from mqbench.kernels.attention_plan import AUTO, FLEX_BLOCK, TRITON_BLOCK_N, choose_variant, triton_block_m
from mqbench.kernels.gemm_configs import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EXACT = 1e-9
"""Largest difference in float64."""

SAME_TOKENS = ("unpermute", "mask", "auto")
AFTER_CACHE = ("mask", "auto")
SMALL_SPLITS = (1, 2, 8)


@dataclass(frozen=True)
class Case:
    """Queries over keys, slot by slot; ``None`` for ``query_position`` takes the last slots."""

    q: Tensor
    k: Tensor
    v: Tensor
    position: Tensor
    valid: Tensor | None
    query_position: Tensor | None = None

    def run(self, variant: str, **options: Any) -> Tensor:
        return aifs_attention(
            self.q, self.k, self.v, self.position, self.valid,
            query_position=self.query_position, variant=variant, **options,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def sees(self) -> Tensor:
        """(B, T_q, T_k) bool, from the definition."""
        num_queries = self.q.shape[2]
        last = slice(self.position.shape[1] - num_queries, None)
        valid = torch.ones_like(self.position, dtype=torch.bool) if self.valid is None else self.valid
        if self.query_position is None:
            query_position, query_valid = self.position[:, last], valid[:, last]
        else:
            query_position, query_valid = self.query_position, self.query_position >= 0
        sees = self.position[:, None, :] <= query_position[:, :, None]
        return sees & valid[:, None, :] & query_valid[:, :, None]


def naive(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, H, T_q, D): masked softmax with an explicit mask, every step in ``dtype``; zeros where nothing is seen."""
    sees = case.sees()[:, None]
    group = case.q.shape[1] // case.k.shape[1]
    hidden = ~sees.any(2)[..., None] if sees.shape[2] else sees.any(2)[..., None]
    k, v = (x.to(dtype).masked_fill(hidden, 0).repeat_interleave(group, 1) for x in (case.k, case.v))
    scores = case.q.to(dtype) @ k.mT * case.q.shape[3] ** -0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.where(sees.any(-1, keepdim=True), weights, 0) @ v


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def random_tensors(seed: int, sizes: tuple[int, int, int, int], num_keys: int, num_queries: int) -> Sequence[Tensor]:
    """q, k and v; ``sizes`` are batch, key heads, heads per key head, and head dimension."""
    batch, kv_heads, group, width = sizes
    shapes = [(kv_heads * group, num_queries), (kv_heads, num_keys), (kv_heads, num_keys)]
    return [normal(seed + i, batch, *shape, width) for i, shape in enumerate(shapes)]


def visual_first(visual: Sequence[bool], num_padding: int) -> list[int]:
    """Original index of the token in each slot: left padding, visual tokens, text."""
    return sorted(range(len(visual)), key=lambda i: 0 if i < num_padding else 1 if visual[i] else 2)


@st.composite
def layouts(draw: st.DrawFn, max_tokens: int = 150, max_batch: int = 3) -> tuple[Tensor, Tensor]:
    """(B, T) position and valid: per sequence 0 to 3 images anywhere, and left padding."""
    batch, tokens = draw(st.integers(1, max_batch)), draw(st.integers(1, max_tokens))
    orders, valid = [], []
    for _ in range(batch):
        visual = [False] * tokens
        for start, length in draw(st.lists(st.tuples(st.integers(0, tokens - 1), st.integers(1, 70)), max_size=3)):
            visual[start : start + length] = [True] * len(visual[start : start + length])
        padding = draw(st.integers(0, tokens // 2))
        orders.append(visual_first(visual, padding))
        valid.append([index >= padding for index in orders[-1]])
    return torch.tensor(orders, dtype=torch.int32, device=DEVICE), torch.tensor(valid, device=DEVICE)


def sizes(max_group: int = 7) -> st.SearchStrategy[tuple[int, int, int]]:
    """Key heads, heads per key head, and head dimension."""
    groups = [group for group in (1, 2, 7) if group <= max_group]
    return st.tuples(st.sampled_from([1, 2]), st.sampled_from(groups), st.sampled_from([3, 8, 16]))


seeds = st.integers(0, 1000)


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 150, max_batch: int = 3, max_group: int = 7) -> Case:
    """Whole sequences, or after a cache chunks whose queries are the last slots or come with their positions."""
    position, valid = draw(layouts(max_tokens, max_batch))
    tokens, after_cache = position.shape[1], draw(st.booleans())
    num_queries = draw(st.one_of(st.integers(1, min(tokens, 9)), st.integers(1, tokens))) if after_cache else tokens
    shape = position.shape[0], *draw(sizes(max_group))
    q, k, v = random_tensors(draw(seeds), shape, tokens, num_queries)
    if not after_cache or draw(st.booleans()):
        return Case(q, k, v, position, draw(st.sampled_from([valid, None])))
    generator = torch.Generator().manual_seed(draw(seeds))
    chosen = torch.randint(-1, tokens, (len(position), num_queries), generator=generator, dtype=torch.int32)
    return Case(q, k, v, position, valid, chosen.to(DEVICE))


# --- the paper's claim: the order in memory changes nothing


@settings(max_examples=40)
@given(layout=layouts(), shape=sizes(), seed=seeds, variant=st.sampled_from(SAME_TOKENS))
def test_equals_causal_attention_in_the_original_order(
    layout: tuple[Tensor, Tensor], shape: tuple[int, int, int], seed: int, variant: str
) -> None:
    """Queries, keys and values are written in the original order; torch attends there, without any permutation."""
    position, valid = layout
    rows, slots = torch.arange(len(position), device=DEVICE)[:, None], position.long()
    tokens = position.shape[1]
    q, k, v = random_tensors(seed, (len(position), *shape), tokens, tokens)
    was_valid = torch.empty_like(valid)
    was_valid[rows, slots] = valid
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril() & was_valid[:, None, None, :]
    mask |= torch.eye(tokens, dtype=torch.bool, device=DEVICE)  # padding sees itself, which torch needs; it is not read
    expected = F.scaled_dot_product_attention(q, *(x.repeat_interleave(shape[1], 1) for x in (k, v)), mask)
    moved = (x.transpose(1, 2)[rows, slots].transpose(1, 2) for x in (q, k, v))
    out = aifs_attention(*moved, position, valid, variant=variant)
    found = torch.empty_like(out)
    found.transpose(1, 2)[rows, slots] = out.transpose(1, 2)
    padding = ~was_valid[:, None, :, None]
    torch.testing.assert_close(found, expected.masked_fill(padding, 0), rtol=0, atol=EXACT)


def test_one_image_between_texts_by_hand() -> None:
    """Tokens t0 v1 v2 t3 lie in memory as v1 v2 t0 t3; equal scores make each result the mean of what is seen."""
    position = torch.tensor([[1, 2, 0, 3]], dtype=torch.int32, device=DEVICE)
    q = k = torch.zeros(1, 1, 4, 1, dtype=torch.float64, device=DEVICE)
    v = torch.tensor([10.0, 20.0, 1.0, 5.0], dtype=torch.float64, device=DEVICE).reshape(1, 1, 4, 1)
    expected = [(1 + 10) / 2, (1 + 10 + 20) / 3, 1.0, (1 + 10 + 20 + 5) / 4]
    for variant in SAME_TOKENS:
        assert aifs_attention(q, k, v, position, variant=variant).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("variant", [*AFTER_CACHE, "triton"])
def test_turns_and_decoding_over_a_permuted_cache(variant: str) -> None:
    """Two turns with an image each, permuted on their own, then two single tokens: the same as one causal pass."""
    visual = [*[False] * 4, *[True] * 30, *[False] * 3]
    tokens = 2 * len(visual) + 2
    q, k, v = random_tensors(5, (2, 1, 3, 16), tokens, tokens)
    if variant == "triton":
        q, k, v = (x.float() for x in (q, k, v))
    padding = (0, 6)
    first = torch.tensor([visual_first(visual, count) for count in padding])
    second = len(visual) + torch.tensor([visual_first(visual, 0)] * 2)
    chunks = [first, second, torch.full((2, 1), tokens - 2), torch.full((2, 1), tokens - 1)]
    rows = torch.arange(2)[:, None]
    was_valid = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    whole = torch.arange(tokens, dtype=torch.int32, device=DEVICE).expand(2, -1)
    expected = naive(Case(q, k, v, whole, was_valid.to(DEVICE))).transpose(1, 2)
    for end in range(1, len(chunks) + 1):
        cached, chunk = torch.cat(chunks[:end], 1), chunks[end - 1]
        queries = q.transpose(1, 2)[rows, chunk].transpose(1, 2)
        keys, values = (x.transpose(1, 2)[rows, cached].transpose(1, 2) for x in (k, v))
        valid = was_valid[rows, cached].to(DEVICE)
        out = aifs_attention(queries, keys, values, cached.int().to(DEVICE), valid, variant=variant)
        tolerance = 2e-6 if variant == "triton" else EXACT
        torch.testing.assert_close(out.transpose(1, 2).double(), expected[rows, chunk], rtol=0, atol=tolerance)


# --- every variant against an explicit mask


@settings(max_examples=40)
@given(case=cases(), dtype=st.sampled_from([*DTYPES, torch.float64]), data=st.data())
def test_torch_variants(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    same_tokens = case.query_position is None and case.q.shape[2] == case.k.shape[2]
    case = case.to(dtype)
    out = case.run(data.draw(st.sampled_from(SAME_TOKENS if same_tokens else AFTER_CACHE)))
    assert (out.shape, out.dtype) == (case.q.shape, dtype)
    check_rounding(out, case)


def check_rounding(out: Tensor, case: Case) -> None:
    """Within twice the error of the reference in the same dtype, which is never less than rounding once.

    The 16-bit reference computes in float32 and rounds its result: the kernels, too, must not sum in 16 bits.
    """
    truth, own = naive(case), naive(case, torch.promote_types(out.dtype, torch.float32)).to(out.dtype)
    assert out.isfinite().all()
    assert not out[~case.sees().any(-1)[:, None].expand(out.shape[:3])].any()
    own_errors = (own.double() - truth).abs(), (truth.to(out.dtype).double() - truth).abs()
    own_error = max(*(errors.max() for errors in own_errors), half_ulp(case.v.nan_to_num()))
    assert (out.double() - truth).abs().max() <= (EXACT if out.dtype == torch.float64 else 2 * own_error)


def half_ulp(v: Tensor) -> float:
    """What rounding the largest value once may cost: results are means of values."""
    return torch.finfo(v.dtype).eps / 2 * float(v.abs().max())


def test_naive_masks_agree_with_the_reference_of_loops() -> None:
    position = torch.tensor([[2, 3, 0, 1, 4], [0, 1, 3, 2, 4]], dtype=torch.int32)
    valid = torch.tensor([[True] * 5, [False, True, True, True, True]])
    q, k, v = (x.cpu() for x in random_tensors(0, (2, 2, 3, 4), 5, 3))
    looped = reference.aifs_attention(q, k, v, position[:, 2:], position, valid[:, 2:], valid)
    torch.testing.assert_close(naive(Case(q, k, v, position, valid)), looped, rtol=0, atol=EXACT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_queries", [150, 3])
def test_flex(num_queries: int) -> None:
    """Uncompiled where there is no GPU: it is torch's reference then, and does not look at the lists of blocks."""
    position = torch.tensor([visual_first([20 < i < 100 for i in range(150)], padding) for padding in (0, 9)])
    valid = position >= torch.tensor([[0], [9]])
    case = Case(*random_tensors(3, (2, 1, 4, 16), 150, num_queries), position.int().to(DEVICE), valid.to(DEVICE))
    dtype = torch.float32 if DEVICE == "cuda" else torch.float64
    tolerance = 1e-5 if DEVICE == "cuda" else EXACT
    torch.testing.assert_close(case.to(dtype).run("flex").double(), naive(case), rtol=0, atol=tolerance)


# --- lists of blocks


@settings(max_examples=40)
@given(case=cases(max_tokens=300))
def test_lists_of_blocks(case: Case) -> None:
    """Blocks seen whole and in part are those of the explicit mask; rows past the end ask for nothing."""
    sees, num_queries = case.sees(), case.q.shape[2]
    for variant, size_m, size_n in (
        ("triton", triton_block_m(num_queries), TRITON_BLOCK_N), ("flex", FLEX_BLOCK, FLEX_BLOCK)
    ):  # fmt: skip
        whole, seen = (blocks_of(sees, size_m, size_n, kind) for kind in ("whole", "seen"))
        plan = plan_attention(
            case.position, case.valid, num_queries=num_queries, query_position=case.query_position, variant=variant
        )
        if variant == "triton":
            counts, indices = plan.tables
            parts = [(whole, counts[..., 0], indices), (seen, counts[..., 1], indices)]
        else:
            part_counts, part_indices, whole_counts, whole_indices = (x[:, 0] for x in plan.tables)
            parts = [(seen & ~whole, part_counts, part_indices), (whole, whole_counts, whole_indices)]
        for expected, counts, indices in parts:
            assert torch.equal(listed(counts, indices), expected)


def blocks_of(sees: Tensor, size_m: int, size_n: int, kind: str) -> Tensor:
    """(B, Q, N) bool by looking at every element; keys past the end are not seen, and queries past it do not count."""
    split_queries = sees.split(size_m, 1)
    all_or_any: Callable[[Tensor], Tensor] = torch.Tensor.all if kind == "whole" else torch.Tensor.any

    def of(block: Tensor) -> bool:
        return bool(all_or_any(block)) and (kind == "seen" or block.shape[1] == size_n)

    rows = [[[of(block) for block in part[b].split(size_n, 1)] for part in split_queries] for b in range(len(sees))]
    return torch.tensor(rows, device=sees.device)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """(B, Q, N) bool: which blocks the first ``counts`` of ``indices`` name."""
    named = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    return torch.zeros_like(named).scatter_(-1, indices.long(), named)


# --- our own kernel


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory holds NaN: what a kernel forgets to write shows."""

    def patch(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def fresh(*args: Any, **kwargs: Any) -> Tensor:
            made: Tensor = plain(*args, **kwargs)
            return made.fill_(torch.nan) if made.dtype.is_floating_point else made

        monkeypatch.setattr(owner, name, fresh)

    patch(torch, "empty")
    patch(torch.Tensor, "new_empty")


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=10)
@given(
    case=cases(max_tokens=140, max_batch=2, max_group=2),
    dtype=st.sampled_from(DTYPES),
    num_splits=st.sampled_from(SMALL_SPLITS),
)
def test_own_kernel(case: Case, dtype: torch.dtype, num_splits: int) -> None:
    """Padding holds NaN, which is never read."""
    case = case.to(dtype)
    if case.valid is not None:
        padding = ~case.valid[:, None, :, None]
        case = replace(case, k=case.k.masked_fill(padding, torch.nan), v=case.v.masked_fill(padding, torch.nan))
    check_rounding(run_kernel(case, num_splits), case)


def run_kernel(case: Case, num_splits: int) -> Tensor:
    from mqbench.kernels.triton_attention import attention

    num_queries = case.q.shape[2]
    plan = plan_attention(
        case.position, case.valid, num_queries=num_queries, query_position=case.query_position, variant="triton"
    )
    out = case.q.new_empty(*case.q.transpose(1, 2).shape)
    scale = case.q.shape[3] ** -0.5
    attention(case.q, case.k, case.v, plan.query_position, plan.key_position, *plan.tables, scale, out, num_splits)
    return out.transpose(1, 2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("width", "group"), [(40, 1), (64, 7), (80, 2), (256, 1)])
@pytest.mark.parametrize("num_queries", [1, 20])
def test_own_kernel_takes_every_head_dimension(width: int, group: int, num_queries: int) -> None:
    """Powers of two and others; one query, packed with those of its key head and split along the keys, and several."""
    position = torch.tensor([visual_first([5 < i < 60 for i in range(70)], 0)], dtype=torch.int32, device=DEVICE)
    case = Case(*random_tensors(width, (1, 1, group, width), 70, num_queries), position, None).to(torch.float16)
    check_rounding(run_kernel(case, 2 if num_queries == 1 else 1), case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "num_splits"), [(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float32, 1)])
def test_own_kernel_over_several_lists(dtype: torch.dtype, num_splits: int) -> None:
    """More queries than one list serves, in tiles as large as the list's and smaller ones."""
    visual = [10 < i < 60 or 100 < i < 170 for i in range(200)]
    position = torch.tensor([visual_first(visual, padding) for padding in (0, 140)])
    valid = position >= torch.tensor([[0], [140]])
    case = Case(*random_tensors(9, (2, 1, 1, 16), 200, 200), position.int().to(DEVICE), valid.to(DEVICE)).to(dtype)
    check_rounding(run_kernel(case, num_splits), case)


@pytest.mark.usefixtures("poisoned")
def test_operation_runs_our_kernel_on_strided_inputs() -> None:
    """As attention layers hand them over: heads and tokens swapped, queries, keys and values in one tensor."""
    fused = normal(0, 2, 33, 3 * 4, 16, dtype=torch.float16).transpose(1, 2)
    q, k, v = fused[:, :8], fused[:, 8:10], fused[:, 10:]
    position = torch.stack([torch.randperm(33, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    case = Case(q, k, v, position.int().to(DEVICE), (position > 2).to(DEVICE))
    out = case.run("triton")
    assert out.transpose(1, 2).is_contiguous()
    check_rounding(out, case)


# --- nothing to see


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_see_nothing_are_zero(variant: str) -> None:
    """A sequence of padding alone, and padding among tokens."""
    position = torch.arange(5, dtype=torch.int32, device=DEVICE).expand(2, -1)
    valid = torch.tensor([[False] * 5, [True, True, False, True, False]], device=DEVICE)
    case = Case(*random_tensors(1, (2, 1, 2, 16), 5, 5), position, valid).to(torch.float32)
    out = case.run(variant)
    assert not out[0].any() and not out[1, :, [2, 4]].any()
    assert out[1, :, [0, 1, 3]].all()
    check_rounding(out, case)


def test_queries_before_every_key_and_blind_queries_are_zero() -> None:
    position = torch.tensor([[3, 5]], dtype=torch.int32, device=DEVICE)
    queries = torch.tensor([[2, 3, -1]], dtype=torch.int32, device=DEVICE)
    case = Case(*random_tensors(2, (1, 1, 1, 16), 2, 3), position, None, queries).to(torch.float32)
    for variant in ("mask", "triton"):
        out = case.run(variant)
        assert not out[:, :, [0, 2]].any()
        torch.testing.assert_close(out[:, :, 1], case.v[:, :, 0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_empty_sequences(variant: str, batch: int, tokens: int) -> None:
    position = torch.zeros(batch, tokens, dtype=torch.int32, device=DEVICE)
    q, k, v = (x.float() for x in random_tensors(0, (batch, 1, 2, 8), tokens, tokens))
    assert aifs_attention(q, k, v, position, variant=variant).shape == q.shape


@pytest.mark.parametrize("variant", ["mask", "flex", "triton"])
def test_no_keys_or_no_queries(variant: str) -> None:
    q, k, v = (x.float() for x in random_tensors(0, (1, 1, 2, 8), 0, 3))
    nothing = torch.zeros(1, 0, dtype=torch.int32, device=DEVICE)
    queries = torch.arange(3, dtype=torch.int32, device=DEVICE)[None]
    assert not aifs_attention(q, k, v, nothing, query_position=queries, variant=variant).any()
    assert aifs_attention(q[:, :, :0], q[:, :1], q[:, :1], queries, variant=variant).shape == (1, 2, 0, 8)


# --- one plan for all layers, torch.library


def example(variant: str, num_queries: int = 6) -> tuple[Case, attention_plan.AttentionPlan]:
    position = torch.tensor([[2, 3, 0, 1, 4, 5], [0, 1, 3, 2, 4, 5]], dtype=torch.int32, device=DEVICE)
    valid = torch.tensor([[True] * 6, [False] + [True] * 5], device=DEVICE)
    case = Case(*random_tensors(7, (2, 1, 2, 16), 6, num_queries), position, valid).to(torch.float32)
    return case, plan_attention(position, valid, num_queries=num_queries, variant=variant)


def test_layers_share_a_plan() -> None:
    case, plan = example("unpermute")
    for factor in (1.0, 3.0):
        layer = replace(case, v=case.v * factor)
        assert torch.equal(attend(layer.q, layer.k, layer.v, plan), layer.run("unpermute"))


def test_scale() -> None:
    case, _ = example("mask")
    for variant in ("unpermute", "mask", "triton"):
        expected = naive(replace(case, q=case.q * 0.3 * 4))  # 4 = sqrt(16): the default scale goes
        torch.testing.assert_close(case.run(variant, scale=0.3).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("variant", "num_queries"), [("unpermute", 6), ("mask", 2), ("triton", 2)])
def test_opcheck(variant: str, num_queries: int) -> None:
    case, plan = example(variant, num_queries)
    positions = plan.query_position, plan.key_position, plan.blind
    arguments = case.q, case.k, case.v, *positions, list(plan.tables), variant, 0.25
    torch.library.opcheck(torch.ops.mqbench.aifs_attention.default, arguments)


@pytest.mark.parametrize("variant", ["unpermute", "mask"])
def test_passes_through_torch_compile(variant: str) -> None:
    case, plan = example(variant)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, plan).transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.q, case.k, case.v), layer(case.q, case.k, case.v))


# --- the choice


def test_choice_by_device_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs by way of fake tensors."""

    def choice(device: str, num_queries: int, takes_triton: bool = True) -> str:
        with FakeTensorMode():
            position = torch.empty(1, 9, dtype=torch.int32, device=device)
        return choose_variant(position, num_queries, None, takes_triton)

    assert [choice("cuda", 9), choice("cuda", 1), choice("cuda", 1, False)] == ["unpermute", "triton", "mask"]
    assert [choice("cpu", 9), choice("cpu", 1)] == ["unpermute", "mask"]
    monkeypatch.setattr(attention_plan, "find_spec", lambda name: None)
    assert choice("cuda", 1) == "mask"


def test_the_last_choice_needs_no_triton() -> None:
    assert set(AUTO) == {(device, same) for device in ("cuda", "cpu") for same in (True, False)}
    assert {variants[-1] for variants in AUTO.values()} <= set(VARIANTS) - {"triton"}
    assert {variants[-1] for (_, same_tokens), variants in AUTO.items() if not same_tokens} == {"mask"}


# --- wrong arguments name themselves

GOOD: Mapping[str, Any] = {
    "q": torch.zeros(2, 4, 3, 8),
    "k": torch.zeros(2, 2, 3, 8),
    "v": torch.zeros(2, 2, 3, 8),
    "position": torch.arange(3, dtype=torch.int32).expand(2, -1),
    "valid": torch.ones(2, 3, dtype=torch.bool),
}
ONE_KEY: Mapping[str, Any] = {"k": torch.zeros(2, 2, 1, 8), "v": torch.zeros(2, 2, 1, 8)}
META = "meta"
WRONG: Sequence[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, r"^q must be a .* tensor, got list"),
    ({"q": GOOD["q"].int()}, TypeError, r"^q must be float16 or .*, got int32"),
    ({"k": GOOD["k"].half()}, TypeError, r"^k must be float32 as q is, got float16"),
    ({"v": GOOD["v"].double()}, TypeError, r"^v must be float32 as q is, got float64"),
    ({"position": GOOD["position"].long()}, TypeError, r"^position must be int32, got int64"),
    ({"valid": GOOD["position"]}, TypeError, r"^valid must be bool, got int32"),
    ({"query_position": GOOD["position"].long()}, TypeError, r"^query_position must be int32"),
    ({"q": GOOD["q"][0]}, ValueError, r"^q must have shape \(batch, heads, tokens, head_dim\), got \(4, 3, 8\)"),
    ({"q": torch.zeros(2, 4, 3, 0)}, ValueError, r"^q must have a head_dim of at least 1"),
    ({"q": torch.zeros(2, 3, 3, 8)}, ValueError, r"^k must have shape \(2, a divisor of 3, keys, 8\)"),
    ({"k": torch.zeros(2, 2, 3, 4)}, ValueError, r"^k must have shape"),
    ({"k": torch.zeros(1, 2, 3, 8)}, ValueError, r"^k must have shape"),
    ({"v": torch.zeros(2, 2, 2, 8)}, ValueError, r"^v must have shape \(2, 2, 3, 8\) as k has"),
    ({"k": GOOD["k"].to(META)}, ValueError, r"^k must be on cpu as q is, got meta"),
    ({"position": GOOD["position"][0]}, ValueError, r"^position must have shape \(batch, keys\), got \(3,\)"),
    ({"position": torch.zeros(2, 4, dtype=torch.int32), "valid": None}, ValueError, r"^position must have shape"),
    ({"valid": GOOD["valid"][:1]}, ValueError, r"^valid must have shape \(2, 3\), got \(1, 3\)"),
    ({"valid": GOOD["valid"].to(META)}, ValueError, r"^valid must be on cpu as position is"),
    ({"query_position": GOOD["position"][:, :1]}, ValueError, r"^query_position must have shape \(2, 3\)"),
    (
        {**ONE_KEY, "position": GOOD["position"][:, :1], "valid": None},
        ValueError,
        r"^query_position is needed for more",
    ),
    ({"variant": "fast"}, ValueError, r"^variant must be auto, unpermute, mask, flex, triton, got 'fast'"),
    ({"variant": "unpermute", "query_position": GOOD["position"]}, ValueError, r"^variant 'unpermute' needs as many"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**GOOD, **changes}
    with pytest.raises(error, match=message):
        aifs_attention(**arguments)


@pytest.mark.parametrize(("width", "dtype"), [(257, torch.float32), (8, torch.float64)])
def test_our_kernel_says_what_it_cannot_do(width: int, dtype: torch.dtype) -> None:
    q = torch.zeros(2, 1, 3, width, dtype=dtype)
    with pytest.raises(ValueError, match=r"^variant 'triton' needs q in 16 or 32 bits with a head_dim of at most 256"):
        aifs_attention(q, q, q, GOOD["position"], variant="triton")


def test_plans_check_their_own_arguments() -> None:
    with pytest.raises(TypeError, match=r"^position must be a int32 tensor, got list"):
        plan_attention([0, 1])  # type: ignore[arg-type]
    plan = plan_attention(GOOD["position"])
    q = GOOD["q"]
    with pytest.raises(
        ValueError, match=r"^q must have batch 2 and 3 tokens as the plan has, on cpu; got batch 2 and 2"
    ):
        attend(q[:, :, :2], q, q, plan)
    with pytest.raises(ValueError, match=r"^k must have batch 2 and 3 tokens"):
        attend(q, q[:, :, :2], q[:, :, :2], plan)


# --- generated code


def compiled(capability: int, dtype: str, head_dim: int, num_queries: int, num_splits: int) -> dict[str, Any]:
    """The kernel as `triton_attention.attention` would launch it at Qwen2-VL-7B's seven heads per key head."""
    from fakes.triton_compile import build
    from mqbench.kernels.triton_attention import attention_kernel, constants

    config, sizes = constants({"bf16": 2, "fp16": 2, "fp32": 4}[dtype], head_dim, num_queries, 7)
    types = dict.fromkeys(attention_kernel.arg_names, "i32") | dict.fromkeys("qkv", f"*{dtype}")
    types |= dict.fromkeys(("query_position", "key_position", "counts", "blocks"), "*i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("out", "peaks", "totals"), "*fp32") | ({"out": f"*{dtype}"} if num_splits == 1 else {})
    parts = {"peaks": None, "totals": None} if num_splits == 1 else {}
    constants_of_all = {**sizes, **parts, "SPLITS": num_splits}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    name = f"{dtype} {head_dim} {num_queries}"
    case = build(name, capability, attention_kernel, types, constants_of_all, unaligned=COUNTS, **options)
    return {**case, "dtype": dtype}


COUNTS = ("scale", "B", "H", "T_Q", "T_K", "Q_BLOCKS", "K_BLOCKS")
"""Arguments that need not be multiples of 16, as strides and addresses are."""


def compiled_cases() -> Iterator[dict[str, Any]]:
    for capability in FAMILIES:
        yield compiled(capability, "bf16", 128, num_queries=900, num_splits=1)
        yield compiled(capability, "bf16", 128, num_queries=1, num_splits=8)
    for head_dim in (64, 80, 256):  # the least shared memory
        yield compiled(89, "fp16", head_dim, num_queries=900, num_splits=1)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All cases, compiled once, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_no_register_spills(generated: list[dict[str, Any]]) -> None:
    """A spill lies on the stack; `test_triton_compile` shows that one would be seen."""
    assert len(generated) == 2 * len(FAMILIES) + 3
    assert [case for case in generated if case["stack_bytes"] + case["local_bytes"]] == []


def test_shared_memory_fits(generated: list[dict[str, Any]]) -> None:
    for case in generated:
        assert case["shared_bytes"] <= FAMILIES[case["capability"]].shared_memory_bytes, case


def test_products_use_tensor_cores_and_prefetch(generated: list[dict[str, Any]]) -> None:
    """Whole sequences on sm_90 by wgmma, whose smallest tile has 64 rows; the others by mma.sync."""
    for case in generated:
        assert case["async_copies"] > 0, case
        is_wgmma = case["capability"] == 90 and case["name"].endswith(" 900")
        start = "wgmma.mma_async.sync.aligned.m64" if is_wgmma else "mma.sync.aligned.m16n8k16.row.col"
        operands = ".f32." + case["dtype"].replace("fp16", "f16")
        assert case["matrix"], case
        assert all(found.startswith(start) and operands in found for found in case["matrix"]), case


if __name__ == "__main__":
    for found in compiled_cases():
        print(json.dumps(found), flush=True)
