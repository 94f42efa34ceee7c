"""A Hadamard transform per program: the row as a matrix in registers, two products on tensor cores, quantization behind.

The signs are exact in 16 bits, and so are 16-bit inputs. The sums between the two products are float32: they enter the
second one as two bfloat16 terms (16 bits of mantissa, for 16-bit results) or three (all 24, for float32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mqbench.kernels.triton_epilogue import INTERPRETED, to_dtype
from mqbench.kernels.triton_levels import activate, largest_magnitude, static_scale, to_levels, token_scale


@triton.jit
def signs_tile(signs, SIZE: tl.constexpr, FROM_ROW: tl.constexpr, ROWS: tl.constexpr, FROM: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
    """A tile of (SIZE, SIZE) int8."""
    rows, columns = FROM_ROW + tl.arange(0, ROWS), FROM + tl.arange(0, COLUMNS)
    return tl.load(signs + rows[:, None] * SIZE + columns[None, :])


@triton.jit
def product(h, x, acc, LEFT: tl.constexpr, TERMS: tl.constexpr, dtype: tl.constexpr):
    """``acc + h @ x`` if LEFT, else ``acc + x @ h``: x float32 as TERMS terms of ``dtype``, h signs, acc or None."""
    signs = h.to(tl.float32) if INTERPRETED else h.to(dtype)  # the interpreter cannot multiply bfloat16
    for term in tl.static_range(TERMS):
        part = to_dtype(x, dtype)
        if term + 1 < TERMS:
            x = x - part.to(tl.float32)
        if INTERPRETED:
            part = part.to(tl.float32)
        if LEFT:
            acc = tl.dot(signs, part, acc)
        else:
            acc = tl.dot(part, signs, acc)
    return acc


@triton.jit
def mix(h11, h12, h21, h22, x1, x2, LEFT: tl.constexpr, TWO: tl.constexpr, TERMS: tl.constexpr, dtype: tl.constexpr):
    """Both tiles of ``[[h11, h12], [h21, h22]] @ [x1, x2]``, or of ``[x1, x2] @ [[...]]``; without TWO, of h11 alone."""
    y1 = product(h11, x1, None, LEFT, TERMS, dtype)
    y2 = y1
    if TWO:
        if LEFT:
            y1 = product(h12, x2, y1, LEFT, TERMS, dtype)
            y2 = product(h21, x1, None, LEFT, TERMS, dtype)
        else:
            y1 = product(h21, x2, y1, LEFT, TERMS, dtype)
            y2 = product(h12, x1, None, LEFT, TERMS, dtype)
        y2 = product(h22, x2, y2, LEFT, TERMS, dtype)
    return y1, y2


@triton.jit
def tile_offsets(FROM_A: tl.constexpr, A: tl.constexpr, FROM_B: tl.constexpr, B: tl.constexpr, INNER: tl.constexpr):
    """Columns of the row that a tile holds, (A, B)."""
    return (FROM_A + tl.arange(0, A))[:, None] * INNER + (FROM_B + tl.arange(0, B))[None, :]


@triton.jit
def tile_mask(FROM_A: tl.constexpr, A: tl.constexpr, FROM_B: tl.constexpr, B: tl.constexpr, OUTER: tl.constexpr,
              INNER: tl.constexpr):  # fmt: skip
    """Which elements of a tile are no padding."""
    return (FROM_A + tl.arange(0, A) < OUTER)[:, None] & (FROM_B + tl.arange(0, B) < INNER)[None, :]


@triton.jit
def load_tile(x, up, start, K, FROM_A: tl.constexpr, A: tl.constexpr, FROM_B: tl.constexpr, B: tl.constexpr,
              OUTER: tl.constexpr, INNER: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Float32 inputs of a tile, 0 beyond K and beyond the matrix."""
    columns = tile_offsets(FROM_A, A, FROM_B, B, INNER)
    mask = tile_mask(FROM_A, A, FROM_B, B, OUTER, INNER) & (columns < K)
    return activate(x, up, start + columns, mask, KIND)


@triton.jit
def finished(y, dtype: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr):
    """Float32 results, divided by sqrt(WIDTH) and rounded to ``dtype``; untouched if another pass follows."""
    if SCALED:
        y = to_dtype(y * (WIDTH**-0.5), dtype).to(tl.float32)
    return y


@triton.jit
def store_tile(y, out, start, FROM_A: tl.constexpr, A: tl.constexpr, FROM_B: tl.constexpr, B: tl.constexpr,
               OUTER: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    """Stores what is no padding."""
    mask = tile_mask(FROM_A, A, FROM_B, B, OUTER, INNER)
    tl.store(out + start + tile_offsets(FROM_A, A, FROM_B, B, INNER), y, mask=mask)


@triton.jit
def rows_kernel(
    x, up, signs_a, signs_b, out, scale, row_index, row_scale, x0, M, K,
    A: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, B: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    INNER_FIRST: tl.constexpr, TERMS_IN: tl.constexpr, TERMS: tl.constexpr, KIND: tl.constexpr,
    SCALED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """x (M, K) -> out (M, A * B): floats, or with LARGEST > 0 levels.

    Args:
        signs_a: (A1 + A2, A1 + A2) int8 H_outer, zeros in the padding.
        signs_b: (B1 + B2, B1 + B2) int8 H_inner^T.
        x0: (M,) channel 0, or None to keep it in the row.
        SCALED: 0 leaves the sums as they are, for another pass.
    """
    in_type: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.float32 else x.dtype.element_ty
    in_a: tl.constexpr = tl.bfloat16 if INNER_FIRST else in_type
    in_b: tl.constexpr = in_type if INNER_FIRST else tl.bfloat16
    terms_a: tl.constexpr = TERMS if INNER_FIRST else TERMS_IN
    terms_b: tl.constexpr = TERMS_IN if INNER_FIRST else TERMS
    dtype: tl.constexpr = x.dtype.element_ty
    a11 = signs_tile(signs_a, A1 + A2, 0, A1, 0, A1)
    b11 = signs_tile(signs_b, B1 + B2, 0, B1, 0, B1)
    a12, a21, a22 = a11, a11, a11
    b12, b21, b22 = b11, b11, b11
    if A2 > 0:
        a12 = signs_tile(signs_a, A1 + A2, 0, A1, A1, A2)
        a21 = signs_tile(signs_a, A1 + A2, A1, A2, 0, A1)
        a22 = signs_tile(signs_a, A1 + A2, A1, A2, A1, A2)
    if B2 > 0:
        b12 = signs_tile(signs_b, B1 + B2, 0, B1, B1, B2)
        b21 = signs_tile(signs_b, B1 + B2, B1, B2, 0, B1)
        b22 = signs_tile(signs_b, B1 + B2, B1, B2, B1, B2)
    zero = tl.full((), 0, tl.int64)  # takes products to 64 bits; the interpreter's row is a plain int
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        start = row * (zero + K)
        y11 = load_tile(x, up, start, K, 0, A1, 0, B1, A, B, KIND)
        y12, y21, y22 = y11, y11, y11
        if B2 > 0:
            y12 = load_tile(x, up, start, K, 0, A1, B1, B2, A, B, KIND)
        if A2 > 0:
            y21 = load_tile(x, up, start, K, A1, A2, 0, B1, A, B, KIND)
        if A2 > 0 and B2 > 0:
            y22 = load_tile(x, up, start, K, A1, A2, B1, B2, A, B, KIND)
        if INNER_FIRST:
            y11, y12 = mix(b11, b12, b21, b22, y11, y12, False, B2 > 0, terms_b, in_b)
            if A2 > 0:
                y21, y22 = mix(b11, b12, b21, b22, y21, y22, False, B2 > 0, terms_b, in_b)
        y11, y21 = mix(a11, a12, a21, a22, y11, y21, True, A2 > 0, terms_a, in_a)
        if B2 > 0:
            y12, y22 = mix(a11, a12, a21, a22, y12, y22, True, A2 > 0, terms_a, in_a)
        if not INNER_FIRST:
            y11, y12 = mix(b11, b12, b21, b22, y11, y12, False, B2 > 0, terms_b, in_b)
            if A2 > 0:
                y21, y22 = mix(b11, b12, b21, b22, y21, y22, False, B2 > 0, terms_b, in_b)
        y11 = finished(y11, dtype, A * B, SCALED)
        y12 = finished(y12, dtype, A * B, SCALED)
        y21 = finished(y21, dtype, A * B, SCALED)
        y22 = finished(y22, dtype, A * B, SCALED)
        if LARGEST > 0:
            if x0 is not None:
                kept = tile_offsets(0, A1, 0, B1, B) == 0
                tl.store(x0 + row, to_dtype(tl.sum(tl.where(kept, y11, 0.0)), dtype))
                y11 = tl.where(kept, 0.0, y11)
            if scale is None:
                peak = largest_magnitude(y11)
                if B2 > 0:
                    peak = tl.maximum(peak, largest_magnitude(y12))
                if A2 > 0:
                    peak = tl.maximum(peak, largest_magnitude(y21))
                if A2 > 0 and B2 > 0:
                    peak = tl.maximum(peak, largest_magnitude(y22))
                divisor = token_scale(peak, LARGEST)
                tl.store(row_scale + row, divisor)
            else:
                divisor = static_scale(scale, row_index, row)
        to = row * (zero + A * B)
        if LARGEST > 0:
            store_tile(to_levels(y11, divisor, LARGEST), out, to, 0, A1, 0, B1, A, B)
            if B2 > 0:
                store_tile(to_levels(y12, divisor, LARGEST), out, to, 0, A1, B1, B2, A, B)
            if A2 > 0:
                store_tile(to_levels(y21, divisor, LARGEST), out, to, A1, A2, 0, B1, A, B)
            if A2 > 0 and B2 > 0:
                store_tile(to_levels(y22, divisor, LARGEST), out, to, A1, A2, B1, B2, A, B)
        else:
            store_tile(to_dtype(y11, out.dtype.element_ty), out, to, 0, A1, 0, B1, A, B)
            if B2 > 0:
                store_tile(to_dtype(y12, out.dtype.element_ty), out, to, 0, A1, B1, B2, A, B)
            if A2 > 0:
                store_tile(to_dtype(y21, out.dtype.element_ty), out, to, A1, A2, 0, B1, A, B)
            if A2 > 0 and B2 > 0:
                store_tile(to_dtype(y22, out.dtype.element_ty), out, to, A1, A2, B1, B2, A, B)
