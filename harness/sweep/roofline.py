"""The least time that a pass can take: each matrix product bound by the measured arithmetic or bandwidth.

Counted are matrix products and what they must read and write, each alone: the larger of operations / rate and bytes /
bandwidth. Norms, quantization, rotary embeddings and launches are free here; padding is no work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mqbench.harness.quant.scheme import Scheme
from mqbench.harness.runtime.systems import FLOAT8, System
from mqbench.harness.sweep.protocol import (
    ImageRules,
    Shape,
    image_size,
    past_length,
    row_tokens,
)

FLOAT_BYTES = 2.0
"""Of an activation or weight in bfloat16."""

BF16, INT8, FP8 = "bf16", "int8", "fp8"
MS_PER_S = 1e3


@dataclass(frozen=True)
class Peaks:
    """What the device reached in this run.

    Attributes:
        bytes_s: Bandwidth of a copy, reads and writes together.
        ops_s: Operations per second of large matrix products by kind; a multiplication and an addition are two.
    """

    bytes_s: float
    ops_s: Mapping[str, float]

    def time_s(self, product: Product) -> float | None:
        """None where the rate of its kind was not measured."""
        rate = self.ops_s.get(product.kind)
        if rate is None:
            return None
        return max(product.ops / rate, product.bytes / self.bytes_s)


@dataclass(frozen=True)
class Product:
    """One kind of matrix product with its least traffic, ``count`` times alike."""

    kind: str
    ops: float
    bytes: float
    count: int = 1


@dataclass(frozen=True)
class Precision:
    """How a tower's linears are stored and multiplied.

    Attributes:
        kind: Which rate bounds them.
        weight_bytes: Per weight.
        input_bytes: Per activation read.
    """

    kind: str = BF16
    weight_bytes: float = FLOAT_BYTES
    input_bytes: float = FLOAT_BYTES


def precision_of(scheme: Scheme, float8: bool = False) -> Precision:
    """Of a tower with this scheme; float8 replaces it."""
    if float8:
        return Precision(FP8, 1.0, 1.0)
    weights, activations = scheme.weights, scheme.activations
    weight_bytes = FLOAT_BYTES if weights is None else weights.num_bits / 8
    if activations is None or weights is None:
        return Precision(BF16, weight_bytes)
    return Precision(INT8, weight_bytes, 1.0)


def prefill_limit_ms(
    shape: Shape, rules: ImageRules, config: Mapping[str, Any], system: System, peaks: Peaks
) -> float | None:
    """All prefills of a shape, summed over the turns; None without the rate of a product."""
    float8 = system.activations == FLOAT8
    vision, text = precision_of(system.vision_scheme, float8), precision_of(system.text_scheme, float8)
    products = list(vision_products(shape, rules, config, vision))
    limit = 0.0
    for turn in range(shape.turns):
        whole = [*products, *text_products(shape, rules, config, text, turn, system.head_bits)]
        time_s = _total_s(whole, peaks)
        if time_s is None:
            return None
        limit += time_s * MS_PER_S
    return limit


def decode_limit_ms(
    shape: Shape, rules: ImageRules, config: Mapping[str, Any], system: System, peaks: Peaks
) -> float | None:
    """One decoding step, averaged over all steps of all turns; None without the rate of a product."""
    text = precision_of(system.text_scheme, system.activations == FLOAT8)
    sizes = _text_sizes(config)
    rows = sum(_columns(shape, rules, turn) for turn in range(shape.turns)) / shape.turns
    products = [*_linears(sizes, float(shape.batch), text), _head(sizes, shape.batch, system.head_bits)]
    products.append(_attention(sizes, pairs=rows, keys=rows, queries=shape.batch))
    time_s = _total_s(products, peaks)
    return None if time_s is None else time_s * MS_PER_S


def vision_products(
    shape: Shape, rules: ImageRules, config: Mapping[str, Any], precision: Precision
) -> Iterator[Product]:
    """Vision tower and merger over all images of a turn."""
    vision = config["vision_config"]
    size = image_size(shape.image_px, rules)
    images = shape.batch * shape.images
    width, inner, depth = vision["embed_dim"], int(vision["embed_dim"] * vision["mlp_ratio"]), vision["depth"]
    rows, out = float(images * size.patches), vision["hidden_size"]
    for k, n in ((width, 3 * width), (width, width), (width, inner), (inner, width)):
        yield linear_product(rows, k, n, precision, depth)
    yield linear_product(rows, rules.patch_elements, width, precision)
    merged = width * rules.merge**2
    yield linear_product(rows / rules.merge**2, merged, merged, precision)
    yield linear_product(rows / rules.merge**2, merged, out, precision)
    ops = 4.0 * images * size.patches**2 * width
    yield Product(BF16, ops, 4 * rows * width * FLOAT_BYTES, depth)


def text_products(
    shape: Shape, rules: ImageRules, config: Mapping[str, Any], precision: Precision, turn: int, head_bits: int | None
) -> Iterator[Product]:
    """LLM over one turn's prompt; the output head on the last token of each row only."""
    sizes = _text_sizes(config)
    lengths = [row_tokens(shape, rules, row) for row in range(shape.batch)]
    past = past_length(shape, rules, turn)
    yield from _linears(sizes, float(sum(lengths)), precision)
    pairs = sum(length * past + length * (length + 1) / 2 for length in lengths)
    yield _attention(sizes, pairs=pairs, keys=sum(past + length for length in lengths), queries=sum(lengths))
    yield _head(sizes, shape.batch, head_bits)


def linear_product(rows: float, k: int, n: int, precision: Precision, count: int = 1) -> Product:
    """(rows, k) times (k, n): inputs and weights are read, outputs written in bfloat16."""
    traffic = rows * k * precision.input_bytes + k * n * precision.weight_bytes + rows * n * FLOAT_BYTES
    return Product(precision.kind, 2.0 * rows * k * n, traffic, count)


@dataclass(frozen=True)
class _TextSizes:
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def _text_sizes(config: Mapping[str, Any]) -> _TextSizes:
    text = config["text_config"]
    return _TextSizes(
        hidden=text["hidden_size"],
        inner=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        vocabulary=text["vocab_size"],
    )


def _linears(sizes: _TextSizes, rows: float, precision: Precision) -> Iterator[Product]:
    kv = 2 * sizes.kv_heads * sizes.head_dim
    shapes = (
        (sizes.hidden, sizes.hidden + kv),
        (sizes.hidden, sizes.hidden),
        (sizes.hidden, 2 * sizes.inner),
        (sizes.inner, sizes.hidden),
    )
    return (linear_product(rows, k, n, precision, sizes.layers) for k, n in shapes)


def _attention(sizes: _TextSizes, pairs: float, keys: float, queries: float) -> Product:
    """``pairs`` of query and key over all rows; queries and outputs, keys and values are moved once."""
    traffic = 2 * (queries * sizes.heads + keys * sizes.kv_heads) * sizes.head_dim * FLOAT_BYTES
    return Product(BF16, 4.0 * pairs * sizes.heads * sizes.head_dim, traffic, sizes.layers)


def _head(sizes: _TextSizes, rows: int, head_bits: int | None) -> Product:
    precision = Precision() if head_bits is None else Precision(INT8, head_bits / 8, 1.0)
    return linear_product(float(rows), sizes.hidden, sizes.vocabulary, precision)


def _columns(shape: Shape, rules: ImageRules, turn: int) -> float:
    """Keys that a decoding step of this turn sees on average, over all rows of the batch."""
    tokens = sum(past_length(shape, rules, turn) + row_tokens(shape, rules, row) for row in range(shape.batch))
    return tokens + shape.batch * (shape.decode_tokens + 1) / 2


def _total_s(products: Iterable[Product], peaks: Peaks) -> float | None:
    total = 0.0
    for product in products:
        time_s = peaks.time_s(product)
        if time_s is None:
            return None
        total += product.count * time_s
    return total
