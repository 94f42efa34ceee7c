"""KV-cache quantization as in QuaRot (arXiv 2404.00456, Sec. 4): every key and value head vector on its own grid.

A key (behind its rotary embedding) or a value of one token and one head is a group of ``head_dim`` numbers with one
scale and one zero point. Methods with online Hadamards also transform queries and keys by a Hadamard of size
``head_dim``, which leaves every product of a query with a key as it is; values are rotated through the weights already
(``rotate_values``).

The LLM's attention runs under the name ``QUANTIZED_KV_ATTENTION``: SDPA with its masks, behind the quantizer of the
attention module. The cache of this simulation holds keys and values before rounding, and attention rounds a copy of all
that it reads. So nothing is rounded twice; since a vector's grid depends on that vector alone, a token's key reads the
same in every step, as if it had been rounded once when it was written.

Keys are rounded behind their rotary embedding, so unlike the float model's, outputs depend on absolute positions: who
pads on the left passes ``position_ids`` that count from each row's first token, as ``generate`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.options import Option
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Strategy
from mqbench.harness.quant.session import Session, Step
from mqbench.harness.quant.weight import round_to_levels, weight_scale
from mqbench.kernels.hadamard import hadamard_transform, padded_size

QUANTIZED_KV_ATTENTION = "sdpa_quantized_kv"
"""Name in transformers' attention and mask interfaces."""

BASE_ATTENTION = "sdpa"
QUANTIZER = "kv_quantizer"
"""Attribute of an attention module that holds its ``KVQuantizer``."""

OPTIONS = (
    Option("kv_bits", None, choices=(None, *range(2, 9)), help="bits of the LLM's KV cache; null: floating point"),
    Option(
        "kv_clip",
        1.0,
        kind=float,
        minimum=0.5,
        maximum=1.0,
        help="share of each KV range that is kept; QuaRot's 0.95 helps at 4 bits and heads of 64 or wider",
    ),
)


class KVQuantizer(nn.Module):
    """Rounds what attention reads: asymmetric, one scale and zero point per token and head.

    Args:
        num_bits: Width of the grid.
        clip: Each range [min(x, 0), max(x, 0)] is shrunk by this factor.
        rotate: Hadamard of size head_dim on queries and keys.

    Shapes: query (B, heads, T, head_dim), key and value (B, kv_heads, S, head_dim) -> the same.
    """

    kind = "kv_quantizer"

    def __init__(self, num_bits: int, clip: float = 1.0, rotate: bool = False) -> None:
        super().__init__()
        self.args = QuantArgs(num_bits, symmetric=False, strategy=Strategy.CHANNEL)
        self.clip = clip
        self.rotate = rotate

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.rotate:
            query, key = hadamard_transform(query), hadamard_transform(key)
        return query, round_vectors(key, self.args, self.clip), round_vectors(value, self.args, self.clip)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "num_bits": self.args.num_bits, "clip": self.clip, "rotate": self.rotate}

    def extra_repr(self) -> str:
        return f"{self.args.num_bits} bits, clip={self.clip}, rotate={self.rotate}"


def round_vectors(x: Tensor, args: QuantArgs, clip: float = 1.0) -> Tensor:
    """Rounds each vector of the last dimension to an asymmetric grid of its own and back, at least in float32."""
    rows = x.reshape(-1, x.shape[-1])
    grid = weight_scale(rows, args)
    scale, zero_point = grid.scale * clip, grid.zero_point  # both ends shrink alike: the zero point stays
    assert zero_point is not None
    levels = round_to_levels(rows.to(scale.dtype), scale, zero_point, args)
    return ((levels - zero_point) * scale).to(x.dtype).view(x.shape)


def kv_cache_steps(recipe: Recipe, rotate: bool = False) -> tuple[Step, ...]:
    """The last step of a method when its recipe has ``kv_bits``, else nothing.

    Args:
        recipe: Options ``kv_bits`` and ``kv_clip``.
        rotate: Whether the method has online Hadamards.
    """
    if recipe.options.get("kv_bits") is None:
        return ()
    return (partial(quantize_kv_cache, rotate=rotate),)


def quantize_kv_cache(session: Session, rotate: bool = False) -> None:
    """Gives every attention of the LLM a ``KVQuantizer``; options ``kv_bits``, ``kv_clip``.

    The vision tower has no cache. The step runs last: static scales are observed with nothing but the weights rounded.

    Raises:
        LayoutError: head_dim has no Hadamard matrix, or the LLM does not run with SDPA attention.
    """
    num_bits, clip = session.option("kv_bits", None), float(session.option("kv_clip", 1.0))
    if num_bits is None:
        return
    for module, head_dim in _attentions(session.model, session.layout):
        if rotate and padded_size(head_dim) != head_dim:
            raise LayoutError(f"no Hadamard matrix of head_dim {head_dim} is known; set online_hadamard=false")
        setattr(module, QUANTIZER, KVQuantizer(num_bits, clip, rotate))
    activate_kv_quantizers(session.model, session.layout)
    session.report.kv_bits = num_bits


def activate_kv_quantizers(model: nn.Module, layout: Layout) -> None:
    """Makes the LLM's attention use the quantizers that stand in its modules; does nothing when there are none.

    Raises:
        LayoutError: the LLM runs with another attention than SDPA.
    """
    if not any(hasattr(module, QUANTIZER) for module, _ in _attentions(model, layout)):
        return
    config: Any = model.get_submodule(layout.text_root).config
    if config._attn_implementation not in (BASE_ATTENTION, QUANTIZED_KV_ATTENTION):
        raise LayoutError(
            f"KV-cache quantization needs '{BASE_ATTENTION}' attention, not '{config._attn_implementation}'; "
            "load the model with it"
        )
    _register_attention()
    config._attn_implementation = QUANTIZED_KV_ATTENTION


def quantized_kv_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA on queries, keys and values that went through the module's quantizer, if it has one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    quantizer: KVQuantizer | None = getattr(module, QUANTIZER, None)
    if quantizer is not None:
        query, key, value = quantizer(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _register_attention() -> None:
    """Makes the name known to transformers; a second call changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(QUANTIZED_KV_ATTENTION, quantized_kv_attention)
    AttentionMaskInterface.register(QUANTIZED_KV_ATTENTION, sdpa_mask)


def _attentions(model: nn.Module, layout: Layout) -> Iterator[tuple[nn.Module, int]]:
    """The LLM's attention modules, parents of the output projections, with their head_dim."""
    for block in layout.text.blocks:
        yield model.get_submodule(block.attention.out.rpartition(".")[0]), block.attention.head_dim
