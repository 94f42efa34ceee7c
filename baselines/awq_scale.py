"""AWQ's search for the factors of input channels (Lin et al. 2023, arXiv 2306.00978, Sec. 3.2), on the float model.

For every group of linears with one input X: s = mean|X|^r for r = 0, 1/20, ..., 19/20, and the r whose rounded weights
Q(W s) / s change the output least. W s is then what gets rounded; whatever writes X is divided by s, so that scaling
alone changes no output. r = 0 is no scaling, so on the calibration data the search is never worse than that.

Groups: norm -> {q, k, v}; v -> o, where each value channel feeds one channel of o (not under grouped-query attention);
norm -> {gate, up}, or norm -> {fc1}; up -> down of a gated MLP. The fc2 behind a plain nonlinearity is left alone:
GELU(x / s) is not GELU(x) / s, and the original gets by with a module that divides at run time. Patch embedding and
projector read no norm or linear that could be divided exactly for them alone, and are left alone too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mqbench.baselines.gptq import input_hessian
from mqbench.harness.errors import CalibrationError, NonFiniteError
from mqbench.harness.quant.capture import (
    Call,
    OnRows,
    Replay,
    block_replay,
    collect_rows,
    part_calls,
    run_block,
    visit_blocks,
)
from mqbench.harness.quant.layout import Block, Norm, NormPlace, Part, Path
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.options import Option
from mqbench.harness.quant.scheme import QuantArgs
from mqbench.harness.quant.session import Session
from mqbench.harness.quant.weight import group_rows, round_to_nearest

RATIOS = tuple(step / 20 for step in range(20))
SMALLEST = 1e-4

OPTIONS = (Option("duo_scaling", False, kind=bool, help="AWQ's factors also fall with the weights' magnitude"),)


@dataclass(frozen=True)
class ScalingGroup:
    """Linears that share one input, and what writes it.

    Attributes:
        source: The norm or linear whose output is divided by the factors.
        source_rows: Outputs of a linear source that the group reads; None for a norm.
        readers: The linears.
        inspected: The module whose output tells how good factors are; None: the only reader itself.
    """

    source: str
    source_rows: slice | list[int] | None
    readers: tuple[str, ...]
    inspected: str | None


@dataclass(frozen=True)
class Choice:
    """The outcome of one search.

    Attributes:
        factors: (in_features,) the best s.
        position: Its place among the candidates.
        errors: For every candidate: mean over rows of the squared distance that the output moves.
    """

    factors: Tensor
    position: int
    errors: tuple[float, ...]


ErrorOf = Callable[[Sequence[Tensor]], float]
"""How far the output moves when a group's weights become the given ones."""


@torch.no_grad()
def scale_channels(session: Session) -> None:
    """Searches and applies the factors of every scaling group, block by block; exact before rounding.

    Option ``duo_scaling`` (False): s = mean|X|^r / (w^(1 - r) + 1e-4) as in AutoAWQ, with w the channel's mean of
    |weight| / largest |weight| of its quantization group.

    Raises:
        CalibrationError: no calibration row reaches a group.
        NonFiniteError: an input or every candidate's error is NaN or Inf.
    """
    for tower in session.layout.towers:
        visit_blocks(session, tower, partial(_scale_block, session, tower.norm_place))


def _scale_block(session: Session, place: NormPlace, block: Block, calls: Sequence[Call]) -> None:
    for group in scaling_groups(session, block, place):
        divide_source(session, group, search_group(session, group, block, calls).factors)


def scaling_groups(session: Session, block: Block, place: NormPlace = NormPlace.PRE) -> list[ScalingGroup]:
    """The groups of a block, in the order of execution.

    Norms behind a branch write no linear's input, and one norm that several experts read would need factors that suit
    the rows of all: neither makes a group.
    """
    paths = block.paths
    has_norm_groups = place is NormPlace.PRE and len(paths) == 1
    groups: list[ScalingGroup | None] = []
    for path in paths:
        inside = common_module((*path.attention_readers, path.attention.out))
        if has_norm_groups:
            groups.append(_norm_group(session, block.attention_norm, inside))
        if len(paths) == 1:  # heads mix the values of all paths
            groups.append(_value_group(path))
        inside = common_module((*path.mlp_readers, path.mlp_out))
        if has_norm_groups:
            groups.append(_norm_group(session, block.mlp_norm, inside if len(path.mlp_readers) > 1 else None))
        groups.append(_up_group(session, path))
    return [group for group in groups if group is not None]


def _norm_group(session: Session, norm: Norm, inspected: str | None) -> ScalingGroup | None:
    has_gain = isinstance(getattr(session.model.get_submodule(norm.name), "weight", None), Tensor)
    return ScalingGroup(norm.name, None, norm.readers, inspected) if has_gain else None


def _value_group(path: Path) -> ScalingGroup | None:
    attention = path.attention
    if attention.num_heads != attention.num_kv_heads:
        return None
    return ScalingGroup(attention.value, attention.value_index, (attention.out,), None)


def _up_group(session: Session, path: Path) -> ScalingGroup | None:
    if path.mlp_up is None:
        return None
    return ScalingGroup(path.mlp_up, slice(0, session.linears[path.mlp_up].out_features), (path.mlp_out,), None)


def common_module(names: Sequence[str]) -> str:
    """The innermost module that holds all of the named ones."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def search_group(session: Session, group: ScalingGroup, block: Block, calls: Sequence[Call]) -> Choice:
    """Finds a group's factors, given the calls of its block."""
    linears = [session.linears[name] for name in group.readers]
    args = session.weight_args(group.readers[0])
    assert args is not None
    replay = block_replay(session, block, group.readers[0], calls)
    if group.inspected is None:
        magnitude, error_of = _linear_error(linears[0], replay)
    else:
        inner_calls = part_calls(session, block.name, group.inspected, calls)
        magnitude, error_of = _part_error(session, group, group.inspected, inner_calls)
    weights = [linear.weight.detach() for linear in linears]
    duo = weight_magnitude(weights, args) if session.option("duo_scaling", False) else None
    return choose(scaling_candidates(magnitude, duo), weights, args, error_of, group.readers[0])


def scaling_candidates(magnitude: Tensor, weights: Tensor | None = None) -> list[Tensor]:
    """s for every ratio of ``RATIOS``, each with sqrt(max * min) = 1.

    Args:
        magnitude: (C,) mean|X| over the calibration rows.
        weights: (C,) weight magnitude for duo scaling; None: the paper's s.
    """
    candidates = []
    for ratio in RATIOS:
        factors = magnitude.pow(ratio)
        if weights is not None:
            factors = factors / (weights.pow(1 - ratio) + 1e-4)
        factors = factors.clamp_min(SMALLEST)
        candidates.append(factors / (factors.max() * factors.min()).sqrt())
    return candidates


def weight_magnitude(weights: Sequence[Tensor], args: QuantArgs) -> Tensor:
    """Mean over all output channels of |w| / max|w| of w's quantization group. Shapes: (out, C) each -> (C,)."""
    shares = []
    for weight in weights:
        rows = group_rows(weight.abs(), args)
        rows = rows / (rows.amax(1, keepdim=True) + 1e-6)
        shares.append(rows.view(len(weight), -1)[:, : weight.shape[1]])
    return torch.cat(shares).mean(0)


def choose(
    candidates: Sequence[Tensor], weights: Sequence[Tensor], args: QuantArgs, error_of: ErrorOf, name: str
) -> Choice:
    """The first candidate with the least error.

    Raises:
        NonFiniteError: no candidate has a finite error.
    """
    errors = []
    for factors in candidates:
        scaled = [(weight * factors).to(weight.dtype) for weight in weights]
        rounded = [round_to_nearest(weight, args, name=name).weight / factors for weight in scaled]
        error = error_of(rounded)
        errors.append(error if error == error else float("inf"))
    position = errors.index(min(errors))
    if errors[position] == float("inf"):
        raise NonFiniteError(f"the outputs behind '{name}' are NaN or Inf on the calibration data; check the dtype")
    return Choice(candidates[position], position, tuple(errors))


def divide_source(session: Session, group: ScalingGroup, factors: Tensor) -> None:
    """Divides the written channels by the factors and multiplies the readers' columns by them."""
    source = session.model.get_submodule(group.source)
    rows = slice(None) if group.source_rows is None else group.source_rows
    for parameter in (source.weight, getattr(source, "bias", None)):
        if isinstance(parameter, Tensor):
            value = parameter.detach().clone()
            value[rows] /= factors if value.dim() == 1 else factors[:, None]
            parameter.data = value
    for name in group.readers:
        linear = session.linears[name]
        linear.weight.data = (linear.weight * factors).to(linear.weight.dtype)


def _linear_error(linear: QuantLinear, replay: Replay) -> tuple[Tensor, ErrorOf]:
    """mean|X| of one linear, and its output error through X^T X: no row is kept."""
    magnitude = _MeanMagnitude(linear.name)
    hessian = input_hessian(partial(_tee, replay, magnitude.add), linear.name)
    before = linear.weight.detach().to(hessian.dtype)

    def error_of(rounded: Sequence[Tensor]) -> float:
        change = rounded[0].to(hessian.dtype) - before
        return ((change @ hessian) * change).sum().item() / 2

    return magnitude.mean, error_of


def _part_error(session: Session, group: ScalingGroup, part: str, calls: Sequence[Call]) -> tuple[Tensor, ErrorOf]:
    """mean|X| of a group, and the error of its part's output over all rows that are not padding."""
    magnitude = _MeanMagnitude(group.readers[0])
    is_text = session.part(group.readers[0]) is Part.TEXT

    def outputs() -> Iterator[Tensor]:
        return (_output_rows(session, part, call, is_text) for call in calls)

    with collect_rows(session, group.readers[0], magnitude.add):
        expected = list(outputs())
    linears = [session.linears[reader] for reader in group.readers]

    def error_of(rounded: Sequence[Tensor]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=expected[0].device)
        with replaced_weights(linears, rounded):
            for rows, reference in zip(outputs(), expected, strict=True):
                total += (rows - reference).square().sum(dtype=torch.float64)
        session.context.clear()
        return total.item() / magnitude.num_rows

    return magnitude.mean, error_of


def _output_rows(session: Session, name: str, call: Call, is_text: bool) -> Tensor:
    """(N, width) output rows of a part, at least in float32, padding of the LLM left out."""
    output = run_block(session, name, call)
    rows = output[call.valid] if is_text and call.valid is not None else output.flatten(0, -2)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


@contextmanager
def replaced_weights(linears: Sequence[QuantLinear], weights: Sequence[Tensor]) -> Iterator[None]:
    """While open, the linears have other weights."""
    before = [linear.weight.data for linear in linears]
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.data = weight.to(linear.weight.dtype)
    try:
        yield
    finally:
        for linear, weight in zip(linears, before, strict=True):
            linear.weight.data = weight


class _MeanMagnitude:
    """mean|X| of each channel over rows that come in parts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.total: Tensor | float = 0.0
        self.num_rows = 0

    def add(self, rows: Tensor) -> None:
        self.total = self.total + rows.abs().sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        self.num_rows += len(rows)

    @property
    def mean(self) -> Tensor:
        if not isinstance(self.total, Tensor):
            raise CalibrationError(f"no calibration sample reaches '{self.name}'; add samples with images")
        return self.total / self.num_rows


def _tee(replay: Replay, first: OnRows, second: OnRows) -> None:
    def both(rows: Tensor) -> None:
        first(rows)
        second(rows)

    replay(both)
