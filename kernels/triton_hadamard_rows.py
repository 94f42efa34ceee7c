"""A Hadamard transform per program: the row as a matrix in registers, two products on tensor cores, levels out.

The signs are exact in 16 bits, and so are 16-bit inputs. The sums between the two products are float32: they enter the
second one as two bfloat16 terms (16 bits of mantissa, for 16-bit results) or three (all 24, for float32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mqbench.kernels.triton_epilogue import INTERPRETED, to_dtype
from mqbench.kernels.triton_levels import largest_magnitude, static_scale, to_levels, token_scale


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
    """Both tiles of ``[[h11, h12], [h21, h22]] @ [x1, x2]`` or ``[x1, x2] @ [[...]]``; without TWO, of h11 alone."""
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
def load_tile(x, start, K, FROM_A: tl.constexpr, A: tl.constexpr, FROM_B: tl.constexpr, B: tl.constexpr,
              OUTER: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    """Float32 inputs of a tile, 0 beyond K and beyond the matrix."""
    columns = tile_offsets(FROM_A, A, FROM_B, B, INNER)
    mask = tile_mask(FROM_A, A, FROM_B, B, OUTER, INNER) & (columns < K)
    return tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def halves(z, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of (ROWS, COLUMNS): other registers of the same threads, no exchange."""
    return tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def butterflies(z, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """H_2^LEVELS (Sylvester's) over the leading part of the column index: a tile for each of its values."""
    if LEVELS == 0:
        return (z,)
    elif LEVELS == 1:
        left, right = halves(z, ROWS, COLUMNS)
        return (left + right, left - right)
    else:
        left, right = halves(z, ROWS, COLUMNS)
        sum_left, sum_right = halves(left + right, ROWS, COLUMNS // 2)
        difference_left, difference_right = halves(left - right, ROWS, COLUMNS // 2)
        return (
            sum_left + sum_right,
            sum_left - sum_right,
            difference_left + difference_right,
            difference_left - difference_right,
        )


@triton.jit
def inner_tiles(y1, y2, b11, b12, b21, b22, ROWS: tl.constexpr, B: tl.constexpr, B2: tl.constexpr,
                LEVELS: tl.constexpr, TERMS: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """``[y1, y2] @ H_inner^T`` as a tuple of tiles, left to right; y2 counts with B2 > 0 only."""
    if B2 > 0:
        return mix(b11, b12, b21, b22, y1, y2, False, True, TERMS, dtype)
    else:
        parts = butterflies(y1, ROWS, B, LEVELS)
        tiles = parts[:0]
        for i in tl.static_range(2**LEVELS):
            tiles += (product(b11, parts[i], None, False, TERMS, dtype),)
        return tiles


@triton.jit
def finished(tiles, COUNT: tl.constexpr, dtype: tl.constexpr, FACTOR: tl.constexpr):
    """Times FACTOR, rounded to ``dtype``; 16-bit tiles take half the registers."""
    results = tiles[:0]
    for i in tl.static_range(COUNT):
        y = tiles[i] if FACTOR == 1.0 else tiles[i] * FACTOR
        results += (to_dtype(y, dtype),)
    return results


@triton.jit
def cleared(tiles, where):
    """0 in the first tile ``where`` a mask says so."""
    kept = (tl.where(where, 0.0, tiles[0]).to(tiles[0].dtype),)
    kept += tiles[1:]
    return kept


@triton.jit
def peak_of(peak, tiles, COUNT: tl.constexpr):
    """Bits of the largest magnitude in some tiles and ``peak``."""
    for i in tl.static_range(COUNT):
        peak = tl.maximum(peak, largest_magnitude(tiles[i]))
    return peak


@triton.jit
def store_tile(y, divisor, out, start, FROM_A: tl.constexpr, ROWS: tl.constexpr, FROM_B: tl.constexpr,
               COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, LARGEST: tl.constexpr):  # fmt: skip
    """Stores what is no padding, as levels with LARGEST > 0."""
    mask = tile_mask(FROM_A, ROWS, FROM_B, COLUMNS, A, B)
    if LARGEST > 0:
        y = to_levels(y.to(tl.float32), divisor, LARGEST)
    tl.store(out + start + tile_offsets(FROM_A, ROWS, FROM_B, COLUMNS, B), y, mask=mask)


@triton.jit
def store_tiles(tiles, divisor, out, start, FROM_A: tl.constexpr, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
                B1: tl.constexpr, B2: tl.constexpr, COUNT: tl.constexpr, LARGEST: tl.constexpr):  # fmt: skip
    """Tiles of some rows, left to right."""
    for i in tl.static_range(COUNT):
        store_tile(tiles[i], divisor, out, start, FROM_A, ROWS, i * B1, B2 if B2 > 0 and i == 1 else B1, A, B, LARGEST)


@triton.jit
def rows_kernel(
    x, signs_a, signs_b, out, scale, row_index, row_scale, x0, M, K,
    A: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, B: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    LEVELS: tl.constexpr, INNER_FIRST: tl.constexpr, TERMS_IN: tl.constexpr, TERMS: tl.constexpr,
    FACTOR: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """x (M, K) -> out (M, A * B): floats times FACTOR, or with LARGEST > 0 levels.

    Args:
        signs_a: (A1 + A2, A1 + A2) int8 H_outer, zeros in the padding.
        signs_b: (B1 + B2, B1 + B2) int8 H_inner^T, or what the butterflies leave of it: B = 2^LEVELS * B1, B2 = 0.
        x0: (M,) channel 0, or None to keep it in the row.
    """
    in_type: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.float32 else x.dtype.element_ty
    type_a: tl.constexpr = tl.bfloat16 if INNER_FIRST else in_type
    type_b: tl.constexpr = in_type if INNER_FIRST else tl.bfloat16
    terms_a: tl.constexpr = TERMS if INNER_FIRST else TERMS_IN
    terms_b: tl.constexpr = TERMS_IN if INNER_FIRST else TERMS
    dtype: tl.constexpr = x.dtype.element_ty if LARGEST > 0 else out.dtype.element_ty
    left: tl.constexpr = B1 * 2**LEVELS
    count: tl.constexpr = 2 if B2 > 0 else 2**LEVELS
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
        y11 = load_tile(x, start, K, 0, A1, 0, left, A, B)
        y12, y21, y22 = y11, y11, y11
        if B2 > 0:
            y12 = load_tile(x, start, K, 0, A1, B1, B2, A, B)
        if A2 > 0:
            y21 = load_tile(x, start, K, A1, A2, 0, left, A, B)
        if A2 > 0 and B2 > 0:
            y22 = load_tile(x, start, K, A1, A2, B1, B2, A, B)
        if INNER_FIRST:
            y11, y12 = mix(b11, b12, b21, b22, y11, y12, False, B2 > 0, terms_b, type_b)
            if A2 > 0:
                y21, y22 = mix(b11, b12, b21, b22, y21, y22, False, B2 > 0, terms_b, type_b)
        y11, y21 = mix(a11, a12, a21, a22, y11, y21, True, A2 > 0, terms_a, type_a)
        if B2 > 0:
            y12, y22 = mix(a11, a12, a21, a22, y12, y22, True, A2 > 0, terms_a, type_a)
        if INNER_FIRST:
            top, bottom = (y11, y12), (y21, y22)
        else:
            top = inner_tiles(y11, y12, b11, b12, b21, b22, A1, left, B2, LEVELS, terms_b, type_b)
            bottom = top
            if A2 > 0:
                bottom = inner_tiles(y21, y22, b11, b12, b21, b22, A2, left, B2, LEVELS, terms_b, type_b)
        top = finished(top, count, dtype, FACTOR)
        bottom = finished(bottom, count, dtype, FACTOR)
        divisor = 1.0
        if LARGEST > 0:
            if x0 is not None:
                first = tile_offsets(0, A1, 0, B1, B) == 0
                tl.store(x0 + row, tl.sum(tl.where(first, top[0], 0.0).to(tl.float32)).to(dtype))
                top = cleared(top, first)
            if scale is None:
                peak = peak_of(tl.full((), 0, tl.int32), top, count)
                if A2 > 0:
                    peak = peak_of(peak, bottom, count)
                divisor = token_scale(peak, LARGEST)
                tl.store(row_scale + row, divisor)
            else:
                divisor = static_scale(scale, row_index, row)
        to = row * (zero + A * B)
        store_tiles(top, divisor, out, to, 0, A1, A, B, B1, B2, count, LARGEST)
        if A2 > 0:
            store_tiles(bottom, divisor, out, to, A1, A2, A, B, B1, B2, count, LARGEST)
