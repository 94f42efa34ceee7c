"""What a method may know about an architecture: names of modules and how they read and write the residual stream.

All names are dotted module paths from the root model (``model.get_submodule``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from mqbench.harness.errors import LayoutError


class NormKind(StrEnum):
    LAYERNORM = "layernorm"
    RMSNORM = "rmsnorm"


class Part(StrEnum):
    """Where a linear stands: the granularity of bit settings and of the paper's tables."""

    VISION = "vision"
    PROJECTOR = "projector"
    TEXT = "text"


@dataclass(frozen=True)
class Norm:
    """A normalization and the linears that read its output.

    Attributes:
        name: The norm module.
        readers: Linears whose input is the norm's output.
        chunks: Consecutive normalized vectors that each reader's input concatenates (Qwen2-VL's merger: 4).
    """

    name: str
    readers: tuple[str, ...]
    chunks: int = 1


@dataclass(frozen=True)
class Attention:
    """An attention whose value heads feed ``out``.

    Attributes:
        value: The linear that makes the values.
        value_rows: Row range [start, stop) of the values in that linear's output (fused qkv: the last third).
        out: The linear that reads the concatenated heads.
        head_dim: Width of one head.
        num_heads: Query heads (``out`` reads num_heads * head_dim).
        num_kv_heads: Key/value heads.
    """

    value: str
    value_rows: tuple[int, int]
    out: str
    head_dim: int
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True)
class Block:
    """A transformer block with pre-norm residual branches.

    Attributes:
        name: The block module.
        attention_norm: Norm before attention; its readers are q, k, v (or one fused qkv).
        attention: Value and output projections.
        mlp_norm: Norm before the MLP; its readers are fc1, or gate and up.
        mlp_out: fc2 or down_proj: the linear behind the nonlinearity, home of the online Hadamard.
        mlp_up: The linear whose output multiplies the activation, when the MLP is gated (up_proj); else None.
    """

    name: str
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp_out: str
    mlp_up: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears in the order in which GPTQ rounds them."""
        return (*self.attention_norm.readers, self.attention.out, *self.mlp_norm.readers, self.mlp_out)

    @property
    def writers(self) -> tuple[str, str]:
        """The linears that add to the residual stream."""
        return self.attention.out, self.mlp_out


@dataclass(frozen=True)
class Tower:
    """A residual stream: what writes it first, the blocks, and what reads it last.

    Attributes:
        part: VISION or TEXT.
        hidden_size: Width of the residual stream.
        norm_kind: Kind of every norm of this tower.
        entry: Modules that write the stream before block 0: linears or convolutions (output channels) and
            embeddings (columns).
        blocks: In order of execution.
        final_norm: The norm behind the last block with its readers (LLM: lm_head; vision: merger's first linear).
    """

    part: Part
    hidden_size: int
    norm_kind: NormKind
    entry: tuple[str, ...]
    blocks: tuple[Block, ...]
    final_norm: Norm

    @property
    def norms(self) -> Iterator[Norm]:
        for block in self.blocks:
            yield block.attention_norm
            yield block.mlp_norm
        yield self.final_norm

    @property
    def writers(self) -> tuple[str, ...]:
        """Everything that writes the residual stream."""
        return (*self.entry, *(name for block in self.blocks for name in block.writers))


@dataclass(frozen=True)
class Layout:
    """The only architecture facts that a method sees.

    Attributes:
        family: Name of the model family.
        text: The LLM.
        vision: The image encoder; None for text-only models.
        patch_embed: Name of the convolution or linear over pixels, quantized with the vision scheme.
        projector: Linears between the towers in order of execution.
        unquantized: Every linear that stays in floating point, by design (lm_head).
        image_token_id: Id of the placeholder that visual features replace; None for text-only models.
        vision_root: Module whose output is the visual features; capture runs up to it.
        text_root: The LLM's decoder module (inputs_embeds -> hidden states), where AIFS permutes.
    """

    family: str
    text: Tower
    vision: Tower | None
    patch_embed: str | None
    projector: tuple[str, ...]
    unquantized: tuple[str, ...]
    image_token_id: int | None
    vision_root: str | None
    text_root: str

    @property
    def is_multimodal(self) -> bool:
        """Visual tokens may stand among the LLM's."""
        return self.image_token_id is not None

    @property
    def towers(self) -> tuple[Tower, ...]:
        return (self.text,) if self.vision is None else (self.vision, self.text)

    def quantized_linears(self) -> dict[str, Part]:
        """Every linear to quantize, in pipeline order: patch embedding, vision blocks, projector, LLM blocks."""
        named: dict[str, Part] = {}
        if self.patch_embed is not None:
            named[self.patch_embed] = Part.VISION
        if self.vision is not None:
            named |= {name: Part.VISION for block in self.vision.blocks for name in block.linears}
        named |= {name: Part.PROJECTOR for name in self.projector}
        named |= {name: Part.TEXT for block in self.text.blocks for name in block.linears}
        return named

    def check(self, model: nn.Module) -> None:
        """Every name exists, and every linear or convolution is either quantized or a written exception.

        Raises:
            LayoutError: names a module that does not exist or a linear that nobody declared.
        """
        modules = dict(model.named_modules())
        declared = set(self.quantized_linears()) | set(self.unquantized)
        for name in declared | {norm.name for tower in self.towers for norm in tower.norms}:
            if name not in modules:
                raise LayoutError(f"layout of family '{self.family}' names '{name}', which the model does not have")
        for name, module in modules.items():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and name not in declared:
                raise LayoutError(
                    f"'{name}' is neither quantized nor listed as unquantized by family '{self.family}'; "
                    "add it to one of the two in its layout"
                )
