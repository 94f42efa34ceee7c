"""AIFS attention against causal attention over the same tokens in their original order (paper, Table 9)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mqbench.harness.bench.contender import Check, Contender, Makers, check_norm, need_cuda
from mqbench.harness.bench.spec import SEED, Case
from mqbench.kernels.attention import attend, plan_attention

DTYPE = torch.bfloat16
TEXT_BEFORE, TEXT_BEHIND = 14, 15
"""Text tokens around the image in the original order."""

BACKENDS = {"causal_flash": SDPBackend.FLASH_ATTENTION, "causal_cudnn": SDPBackend.CUDNN_ATTENTION}
VARIANTS = {"aifs": "auto", "aifs_unpermute": "unpermute", "aifs_flex": "flex", "aifs_triton": "triton"}
OUR_LIMIT_FACTOR = 2.0
"""AIFS may be this many times as far from the truth as torch's causal attention in the same dtype."""


def attention(case: Case, device: torch.device) -> Makers:
    """A plan is made once for all layers of a forward pass, so that a layer is timed without it."""
    tokens, heads, width = case.rows, case.shape["heads"], case.shape["head_dim"]
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (3, 1, heads, tokens, width)
    q, k, v = torch.randn(shape, generator=generator, device=device).to(DTYPE).unbind()
    order = visual_first(tokens, device)
    moved = tuple(x[:, :, order].contiguous() for x in (q, k, v))
    work = {"bytes": 4 * q.numel() * DTYPE.itemsize, "ops": 4 * heads * width * tokens * (tokens + 1) // 2}

    def truth(part: slice) -> Tensor:
        """(1, H, T, D) has one slice along its first dimension: all of it, a head at a time."""
        heads_of = [x.split(1, dim=1) for x in (q, k, v)]
        return torch.cat([_causal(*(x.double() for x in one)) for one in zip(*heads_of, strict=True)], 1)[part]

    def causal() -> Contender:
        return Contender(_causal, (q, k, v), partial(check_norm, truth=truth), **work)

    def forced(backend: SDPBackend) -> Contender:
        need_cuda(device)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return _causal(q, k, v)

        return Contender(run, (q, k, v), partial(check_norm, truth=truth), **work)

    def aifs(variant: str) -> Contender:
        if variant not in ("auto", "unpermute"):
            need_cuda(device)
        plan = plan_attention(order[None].int(), variant=variant)

        def check(y: Tensor) -> Check:
            own = check_norm(_causal(q, k, v), truth)
            original = torch.empty_like(y)
            original[:, :, order] = y
            return Check(check_norm(original, truth).error, OUR_LIMIT_FACTOR * own.error)

        return Contender(lambda q, k, v: attend(q, k, v, plan), moved, check, **work)

    return {
        "causal": causal,
        **{name: partial(forced, backend) for name, backend in BACKENDS.items()},
        **{name: partial(aifs, variant) for name, variant in VARIANTS.items()},
    }


def visual_first(tokens: int, device: torch.device) -> Tensor:
    """(T,) original index of each token when the image stands before the text."""
    original = torch.arange(tokens, device=device)
    image = slice(TEXT_BEFORE, tokens - TEXT_BEHIND)
    return torch.cat([original[image], original[: image.start], original[image.stop :]])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
