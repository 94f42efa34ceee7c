"""Checks of arguments, shared by all operations: errors name the argument and say what is expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Floating-point types that the kernels read and write; on the CPU float64 passes wherever float32 does."""

MIN_BITS, MAX_BITS = 2, 8
WIDTH_LIMIT = 1 << 17
"""Inner dimension from which sums of int8 products may leave int32."""


def check_matrix(
    name: str,
    x: Tensor,
    dtypes: Sequence[torch.dtype],
    rows: int | None = None,
    columns: int | None = None,
    like: Tensor | None = None,
) -> None:
    """A contiguous matrix of one of some dtypes.

    Args:
        name: The argument's name.
        x: The argument.
        dtypes: Those allowed.
        rows: Expected rows, or None for any number.
        columns: Expected columns, or None for any number.
        like: A tensor whose device it must share.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another shape or device, or not contiguous.
    """
    check_dtype(name, x, dtypes)
    if x.dim() != 2 or (rows is not None and x.shape[0] != rows) or (columns is not None and x.shape[1] != columns):
        expected = f"({_shown(rows, 'rows')}, {_shown(columns, 'columns')})"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    _check_placement(name, x, like)


def check_vector(
    name: str,
    x: Tensor,
    dtypes: Sequence[torch.dtype],
    lengths: Sequence[int] | None = None,
    like: Tensor | None = None,
) -> None:
    """A contiguous vector of one of some dtypes and, where ``lengths`` says so, one of these lengths.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another shape or device, or not contiguous.
    """
    check_dtype(name, x, dtypes)
    if x.dim() != 1 or (lengths is not None and x.shape[0] not in lengths):
        expected = "(n,)" if lengths is None else " or ".join(f"({length},)" for length in dict.fromkeys(lengths))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    _check_placement(name, x, like)


def check_dtype(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raises ``TypeError`` unless ``x`` is a tensor of one of ``dtypes``; on the CPU float64 counts as float32."""
    expected = " or ".join(map(_named, dtypes))
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a {expected} tensor, got {type(x).__name__}")
    if x.dtype not in dtypes and not (_is_cpu_float64(x.dtype, x) and torch.float32 in dtypes):
        raise TypeError(f"{name} must be {expected}, got {_named(x.dtype)}")


def check_num_bits(num_bits: int) -> None:
    """Raises ``ValueError`` unless levels of ``num_bits`` fit int8."""
    if not MIN_BITS <= num_bits <= MAX_BITS:
        raise ValueError(f"num_bits must be {MIN_BITS} to {MAX_BITS}, got {num_bits}")


def check_scale(x: Tensor, scale: Tensor | None, row_index: Tensor | None) -> None:
    """Static scales of the rows of ``x``: (1,) for all, or (S,) and a ``row_index`` into it; None is per token.

    The values of ``row_index`` are not looked at: that would make a GPU wait. They must be below S.

    Raises:
        TypeError: scale is not float32, or row_index not uint8.
        ValueError: of another shape or device, or one without the other.
    """
    if scale is None:
        if row_index is not None:
            raise ValueError("row_index needs a scale to point into, got scale=None; leave it out for per-token scales")
        return
    check_vector("scale", scale, (torch.float32,), None if row_index is not None else (1,), like=x)
    if row_index is not None:
        check_row_index(x, scale, "scale", row_index)


def check_row_index(x: Tensor, scale: Tensor, scale_name: str, row_index: Tensor) -> None:
    """A (M,) uint8 index per row of ``x`` into a scale of 1 to 256 entries.

    Raises:
        TypeError: row_index is not uint8.
        ValueError: of another shape or device; or the scale is empty or longer than the index can reach.
    """
    check_vector("row_index", row_index, (torch.uint8,), (x.shape[0],), like=x)
    if not 1 <= scale.shape[0] <= 256:
        raise ValueError(f"{scale_name} must have 1 to 256 entries to go with row_index, got {scale.shape[0]}")


def check_transformed(x: Tensor) -> None:
    """A floating-point matrix that a Hadamard transform takes: at least one column."""
    check_matrix("x", x, FLOAT_DTYPES)
    if x.shape[1] < 1:
        raise ValueError("x must have at least one column, got none")


def check_packed(w_packed: Tensor, x_name: str, x: Tensor) -> None:
    """A packed 4-bit weight for the input ``x``, whose width must be even."""
    if x.shape[1] % 2:
        raise ValueError(f"{x_name} must have an even number of columns, got {x.shape[1]}; add one of zeros")
    check_matrix("w_packed", w_packed, (torch.uint8,), columns=x.shape[1] // 2, like=x)


def check_epilogue(
    x_q: Tensor,
    num_out: int,
    row_scale: Tensor,
    w_scale: Tensor,
    row_index: Tensor | None,
    bias: Tensor | None,
    x0: Tensor | None,
    w0: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """The arguments that ``linear_int8`` and ``linear_int4`` share; ``num_out`` is N."""
    if x_q.shape[1] >= WIDTH_LIMIT:
        raise ValueError(
            f"x_q must have fewer than {WIDTH_LIMIT} columns, got {x_q.shape[1]}; int32 sums would overflow"
        )
    num_rows = x_q.shape[0]
    check_vector("row_scale", row_scale, (torch.float32,), None if row_index is not None else (num_rows, 1), like=x_q)
    if row_index is not None:
        check_row_index(x_q, row_scale, "row_scale", row_index)
    check_vector("w_scale", w_scale, (torch.float32,), (num_out,), like=x_q)
    if bias is not None:
        check_vector("bias", bias, FLOAT_DTYPES, (num_out,), like=x_q)
    if (x0 is None) is not (w0 is None):
        raise ValueError(f"{'x0' if x0 is None else 'w0'} is missing; x0 and w0 belong together")
    if x0 is not None and w0 is not None:
        check_vector("x0", x0, FLOAT_DTYPES, (num_rows,), like=x_q)
        check_vector("w0", w0, FLOAT_DTYPES, (num_out,), like=x_q)
    if out_dtype not in FLOAT_DTYPES and not _is_cpu_float64(out_dtype, x_q):
        raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {_named(out_dtype)}")


def _check_placement(name: str, x: Tensor, like: Tensor | None) -> None:
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other arguments, got {x.device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}; call .contiguous()")


def _is_cpu_float64(dtype: torch.dtype, x: Tensor) -> bool:
    return dtype == torch.float64 and x.device.type == "cpu"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(size: int | None, free: str) -> str:
    return free if size is None else str(size)
