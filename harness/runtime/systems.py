"""What is timed side by side: each system as data, in the order in which tables print them.

Quantized systems differ in what their names say and in nothing else: all of them have the online Hadamard transforms
and the split channel 0 of MQuant, so that a ratio of two of them is the price of their difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from types import MappingProxyType

import torch

from mqbench.harness.quant.scheme import Scheme, Strategy, scheme_named

FLOAT8 = "float8"
MIN_INTEGER_CAPABILITY = (8, 0)
MIN_FLOAT8_CAPABILITY = (8, 9)


class Order(StrEnum):
    """How rows of two modalities get two static scales."""

    ORIGINAL = "original"
    """Tokens stay where they are; each row names its scale."""
    SLICED = "sliced"
    """Each linear gathers the rows of each modality, multiplies them apart and puts them back (MSQ without AIFS)."""
    AIFS = "aifs"
    """Visual tokens first, permuted once at the LLM's entry."""


class Engine(StrEnum):
    """How the operations reach the GPU. On a CPU all of them run eagerly."""

    EAGER = "eager"
    GRAPH = "graph"
    """CUDA graphs: one per prefill shape and one for decoding."""
    COMPILE = "compile"
    """``torch.compile`` under CUDA graphs."""


@dataclass(frozen=True)
class System:
    """One way to run a model.

    Attributes:
        name: Key in ``SYSTEMS``.
        title: For tables and figures.
        bits: Bit settings VISION/LLM as in ``scheme.scheme_named``; the projector has the vision tower's.
        activations: ``Strategy.TENSOR``, ``MODALITY`` (static) or ``TOKEN`` (dynamic) of quantized activations, as
            the string; None where activations stay in floating point; ``FLOAT8``: E4M3 weights and activations, one
            dynamic scale per token and one per output channel.
        fused: Quantization happens inside the norm, activation and Hadamard operations, and linears that share an
            input are one. Without it each quantized linear quantizes its own input.
        order: See ``Order``; ``AIFS`` and ``SLICED`` need two scales.
        engine: See ``Engine``.
        transformers: The model runs as Transformers wrote it, nothing is replaced.
        zero_point: Weight-only grids are asymmetric (AWQ).
        hadamard: Online Hadamard transforms in front of fc2 and down_proj.
        split: RMS: channel 0 behind them is a rank-1 term.
        head_bits: 8 or 4: the output head is integer, its input per token; None keeps it in floating point.
        attention: SDPA's backends on a GPU by falling priority; empty leaves the choice to torch.
    """

    name: str
    title: str
    bits: str = "float/float"
    activations: str | None = None
    fused: bool = True
    order: Order = Order.ORIGINAL
    engine: Engine = Engine.GRAPH
    transformers: bool = False
    zero_point: bool = False
    hadamard: bool = True
    split: bool = True
    head_bits: int | None = None
    attention: tuple[str, ...] = ("cudnn", "flash", "efficient", "math")

    @property
    def vision_scheme(self) -> Scheme:
        return scheme_named(self.bits.partition("/")[0])

    @property
    def text_scheme(self) -> Scheme:
        return scheme_named(self.bits.partition("/")[2])

    @property
    def weights(self) -> str:
        """Bits of the LLM's weights for people: ``BF16``, ``W8``, ``W4``, ``W4-g128`` or ``FP8``."""
        if self.activations == FLOAT8:
            return "FP8"
        args = self.text_scheme.weights
        if args is None:
            return "BF16"
        return f"W{args.num_bits}" + ("" if args.group_size is None else f"-g{args.group_size}")

    @property
    def is_integer(self) -> bool:
        """Its linears multiply integers, or unpack them."""
        return self.bits != "float/float"

    def runs_on(self, device: str | torch.device) -> str | None:
        """Why the system cannot run on a device, in one line; None when it can.

        Only software and compute capability are looked at, not memory.
        """
        device = torch.device(device)
        if device.type not in ("cpu", "cuda", "meta"):
            return f"no kernels for device type '{device.type}'; take cpu or cuda"
        if device.type != "cuda":
            return "needs float8 tensor cores; run it on a GPU" if self._is_float8 and device.type == "cpu" else None
        if not torch.cuda.is_available():
            return "this torch sees no GPU; install a CUDA build, or take cpu"
        return self._why_not_cuda(torch.cuda.get_device_capability(device))

    @property
    def _is_float8(self) -> bool:
        return self.activations == FLOAT8

    def _why_not_cuda(self, capability: tuple[int, int]) -> str | None:
        """``capability`` is the GPU's compute capability."""
        needed = MIN_FLOAT8_CAPABILITY if self._is_float8 else MIN_INTEGER_CAPABILITY if self.is_integer else (0, 0)
        if capability < needed:
            return f"needs a GPU of compute capability {_dotted(needed)} or newer, this one has {_dotted(capability)}"
        if self.is_integer and find_spec("triton") is None:
            return "needs Triton; install triton"
        return None


def _dotted(capability: Iterable[int]) -> str:
    return ".".join(map(str, capability))


W4A8, W8A8, AWQ_BITS = "w4a8/w4a8", "w8a8/w8a8", "float/w4a16-g128"

SYSTEMS: Mapping[str, System] = MappingProxyType(
    {
        system.name: system
        for system in (
            System(
                "bf16-eager",
                "BF16, eager",
                engine=Engine.EAGER,
                transformers=True,
                hadamard=False,
                split=False,
                attention=(),
            ),
            System("bf16-graph", "BF16, CUDA graphs", hadamard=False, split=False),
            System("awq-w4a16-g128", "AWQ W4A16 g128", AWQ_BITS, zero_point=True, hadamard=False, split=False),
            System("w8a8-token", "W8A8 per token", W8A8, Strategy.TOKEN),
            System("w8a8-token-unfused", "W8A8 per token, unfused", W8A8, Strategy.TOKEN, fused=False),
            System("w4a8-token", "W4A8 per token", W4A8, Strategy.TOKEN),
            System("w4a8-token-unfused", "W4A8 per token, unfused", W4A8, Strategy.TOKEN, fused=False),
            System("w4a8-tensor", "W4A8 per tensor", W4A8, Strategy.TENSOR),
            System("w4a8-msq", "W4A8 MSQ", W4A8, Strategy.MODALITY, order=Order.SLICED),
            System("mquant-w4a8", "MQuant W4A8 (MSQ + AIFS)", W4A8, Strategy.MODALITY, order=Order.AIFS),
            System("w4a8-rows", "W4A8 MSQ, a scale per row", W4A8, Strategy.MODALITY),
            System("fp8-token", "FP8 per token", activations=FLOAT8, hadamard=False, split=False),
        )
    }
)
"""Every system by name, the baseline first."""
