"""Linears that share an input, with the way of that input into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mqbench.harness.quant.layout import NormKind
from mqbench.harness.runtime.linears import RuntimeLinear, merged
from mqbench.harness.runtime.parts import QUANTIZE, part
from mqbench.harness.runtime.pointwise import ACTIVATIONS, SILU, RowNorm
from mqbench.harness.runtime.site import IntegerSite, Levels, Site
from mqbench.kernels import api


class Projection(nn.Module):
    """One linear, or the outputs of several side by side; those with the same grid on their input are merged.

    Args:
        sites: How each linear's input is made.
        linears: One each.
        gemm_part: Name in ``parts.PARTS`` of the products.
        fused: Merge, and let the operation in front quantize; else each linear does so by itself.
    """

    def __init__(
        self, sites: Sequence[Site], linears: Sequence[RuntimeLinear], gemm_part: str, fused: bool = True
    ) -> None:
        super().__init__()
        one = merged(linears) if fused and all(sites[0].shares(site) for site in sites[1:]) else None
        self.sites = nn.ModuleList(sites if one is None else sites[:1])
        self.linears = nn.ModuleList(linears if one is None else [one])
        self.gemm_part = gemm_part
        self.fused = fused

    @property
    def is_merged(self) -> bool:
        """There is one product."""
        return len(self.linears) == 1

    def forward(self, x: Tensor) -> Tensor:
        """Rows (M, K) in floating point -> (M, N)."""
        outs = [self._product(site, linear, x) for site, linear in zip(self.sites, self.linears, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def of_norm(self, norm: RowNorm, x: Tensor, residual: Tensor | None, chunks: int = 1) -> tuple[Tensor, Tensor]:
        """The product of the norm of ``x + residual``, ``chunks`` consecutive rows side by side; and that sum."""
        site = self._fusing_site
        if site is None or norm.kind is not NormKind.RMSNORM or (chunks > 1 and site.scale is None):
            with part(QUANTIZE):
                total = x if residual is None else x + residual
                y = norm(total).view(len(total) // chunks, -1)
            return self(y), total
        with part(QUANTIZE):
            scale, index = site.static(x.device)
            levels, row_scale, total = api.rms_norm_quantize(
                x, norm.weight, norm.eps, scale, index, residual, site.num_bits
            )
            rows = site.levels(levels.view(len(x) // chunks, -1), row_scale, scale, index)
        return self._multiply(rows), x if residual is None else total

    def of_activation(self, x: Tensor, kind: str) -> Tensor:
        """The product of an activation function (key of ``ACTIVATIONS``) of ``x``."""
        site = self._fusing_site
        if site is None or kind == SILU:
            with part(QUANTIZE):
                y = ACTIVATIONS[kind](x)
            return self(y)
        with part(QUANTIZE):
            scale, index = site.static(x.device)
            rows = site.levels(*api.gelu_quantize(x, kind, scale, index, site.num_bits), scale, index)
        return self._multiply(rows)

    def of_gated(self, gate_up: Tensor, kind: str) -> Tensor:
        """The product of ``activation(gate) * up``, which stand side by side in ``gate_up`` (M, 2 K)."""
        gate, up = gate_up.chunk(2, dim=-1)
        site = self._fusing_site
        if site is None or kind != SILU:
            with part(QUANTIZE):
                y = ACTIVATIONS[kind](gate) * up
            return self(y)
        with part(QUANTIZE):
            scale, index = site.static(gate.device)
            gate, up = gate.contiguous(), up.contiguous()
            rows = site.levels(*api.silu_mul_quantize(gate, up, scale, index, site.num_bits), scale, index)
        return self._multiply(rows)

    @property
    def _fusing_site(self) -> IntegerSite | None:
        """The site whose rounding can move into the operation in front."""
        site = self.sites[0]
        one = self.fused and self.is_merged and isinstance(site, IntegerSite) and site.fuses
        return site if one and isinstance(site, IntegerSite) else None

    def _multiply(self, rows: Levels) -> Tensor:
        with part(self.gemm_part):
            out: Tensor = self.linears[0](rows)
            return out

    def _product(self, site: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
        slices = site.slices(x) if isinstance(site, IntegerSite) else None
        if slices is not None:
            assert isinstance(site, IntegerSite)
            return self._sliced(site, linear, x, slices)
        with part(QUANTIZE):
            rows = site(x.contiguous())  # SDPA does not say how it lays out its result
        with part(self.gemm_part):
            out: Tensor = linear(rows)
            return out

    def _sliced(self, site: IntegerSite, linear: nn.Module, x: Tensor, slices: tuple[Tensor, Tensor]) -> Tensor:
        """Gathers the rows of each modality, quantizes and multiplies them apart, and puts the results back."""
        assert site.scale is not None
        out: Tensor | None = None
        for scale, rows in zip(site.scale.split(1), slices, strict=True):
            with part(QUANTIZE):
                levels = site.quantize(x[rows], scale, None)
            with part(self.gemm_part):
                y = linear(levels)
            with part(QUANTIZE):
                out = y.new_empty(len(x), y.shape[1]) if out is None else out
                out.index_copy_(0, rows, y)
        assert out is not None
        return out
