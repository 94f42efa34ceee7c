"""What a method may know about an architecture: names of modules and how they read and write the residual stream.

All names are dotted paths from the root model, of modules (``model.get_submodule``) or, where it says so, of
parameters (``model.get_parameter``).
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


class NormPlace(StrEnum):
    """Where a block normalizes: x + branch(norm(x)), or x + norm(branch(x))."""

    PRE = "pre"
    POST = "post"


class Part(StrEnum):
    """Where a linear stands: the granularity of bit settings and of the paper's tables."""

    VISION = "vision"
    PROJECTOR = "projector"
    TEXT = "text"


class Modality(StrEnum):
    """Whose rows a linear of the LLM sees, where it does not see both."""

    VISUAL = "visual"
    TEXT = "text"


@dataclass(frozen=True)
class Norm:
    """A normalization and the linears that belong to it.

    Attributes:
        name: The norm module.
        readers: Linears whose input is the norm's output. Behind a branch (``NormPlace.POST``): linears that read the
            residual stream and begin that branch.
        chunks: Consecutive normalized vectors that each reader's input concatenates (Qwen2-VL's merger: 4).
        joint: The norm sees the concatenation (InternVL's projector), not each vector alone.
    """

    name: str
    readers: tuple[str, ...]
    chunks: int = 1
    joint: bool = False

    @property
    def affine_repeats(self) -> int:
        """How often the norm's gain stands in a reader's input."""
        return 1 if self.joint else self.chunks


@dataclass(frozen=True)
class Reader:
    """A linear or patch convolution that reads the residual stream without a norm in between.

    Attributes:
        name: The module.
        chunks: Vectors of the stream in its input.
        channels_first: A channel of all vectors stands together, as in a convolution's weight.
    """

    name: str
    chunks: int = 1
    channels_first: bool = False


@dataclass(frozen=True)
class Attention:
    """An attention whose value heads feed ``out``.

    Attributes:
        value: The linear that makes the values.
        value_rows: Row range [start, stop) of the values in that linear's output (fused qkv: the last third). Where
            values are interleaved with queries and keys: the range of the first value head.
        out: The linear that reads the concatenated heads.
        head_dim: Width of one head.
        num_heads: Query heads (``out`` reads num_heads * head_dim).
        num_kv_heads: Key/value heads.
        value_period: Rows from one value head to the next where they are interleaved (InternLM2, Qwen-VL's vision
            tower); 0 where all values stand together.
    """

    value: str
    value_rows: tuple[int, int]
    out: str
    head_dim: int
    num_heads: int
    num_kv_heads: int
    value_period: int = 0

    @property
    def value_index(self) -> slice | list[int]:
        """The rows of the values, head after head."""
        start, stop = self.value_rows
        if not self.value_period:
            return slice(start, stop)
        period = self.value_period
        return [head * period + row for head in range(self.num_kv_heads) for row in range(start, stop)]


@dataclass(frozen=True)
class Path:
    """One way through a block's linears. Most blocks have one; with a visual expert each modality has its own.

    Attributes:
        attention_readers: Linears that begin the attention: q, k, v or one fused qkv.
        attention: Value and output projections.
        mlp_readers: Linears that begin the MLP: fc1, or gate and up.
        mlp_out: The last linear of the MLP, home of the online Hadamard.
        mlp_up: The linear whose output multiplies the activation, when it is one of its own; else None.
        modality: Whose rows take this path; None for all.
    """

    attention_readers: tuple[str, ...]
    attention: Attention
    mlp_readers: tuple[str, ...]
    mlp_out: str
    mlp_up: str | None = None
    modality: Modality | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.attention_readers, self.attention.out, *self.mlp_readers, self.mlp_out)


@dataclass(frozen=True)
class Block:
    """A transformer block with two residual branches.

    Attributes:
        name: The block module.
        attention_norm: Norm of the attention; its readers are q, k, v (or one fused qkv).
        attention: Value and output projections.
        mlp_norm: Norm of the MLP; its readers are fc1, or gate and up (or both fused).
        mlp_out: fc2 or down_proj: the linear behind the nonlinearity, home of the online Hadamard.
        mlp_up: The linear whose output multiplies the activation, when the MLP is gated (up_proj); else None.
        experts: Paths by modality, where there are several; the fields above then describe the first one, except that
            the norms' readers are those of all.
        attention_scale: Parameter that multiplies the attention's output channels (LayerScale); None without.
        mlp_scale: The same for the MLP.
    """

    name: str
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp_out: str
    mlp_up: str | None = None
    experts: tuple[Path, ...] = ()
    attention_scale: str | None = None
    mlp_scale: str | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every way through the block's linears."""
        only = Path(self.attention_norm.readers, self.attention, self.mlp_norm.readers, self.mlp_out, self.mlp_up)
        return self.experts or (only,)

    @property
    def norms(self) -> tuple[Norm, Norm]:
        return self.attention_norm, self.mlp_norm

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears that share an input, in the order in which GPTQ rounds them."""
        paths = self.paths
        return (
            *(path.attention_readers for path in paths),
            *((path.attention.out,) for path in paths),
            *(path.mlp_readers for path in paths),
            *((path.mlp_out,) for path in paths),
        )

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears in the order in which GPTQ rounds them."""
        return tuple(name for group in self.groups for name in group)

    @property
    def writers(self) -> tuple[str, ...]:
        """The linears that end a branch."""
        return tuple(name for path in self.paths for name in (path.attention.out, path.mlp_out))

    @property
    def scales(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every LayerScale parameter with the linears whose outputs it multiplies."""
        if self.attention_scale is not None:
            yield self.attention_scale, tuple(path.attention.out for path in self.paths)
        if self.mlp_scale is not None:
            yield self.mlp_scale, tuple(path.mlp_out for path in self.paths)


@dataclass(frozen=True)
class Tower:
    """A residual stream: what writes it first, the blocks, and what reads it last.

    A stream without blocks stands for a norm between two linears (a resampler's).

    Attributes:
        part: Where it stands.
        hidden_size: Width of the residual stream.
        norm_kind: Kind of every norm of this tower.
        entry: What writes the stream before block 0: linears or convolutions (output channels), embeddings (columns)
            and parameters or buffers (last dimension: class token, position table). With ``entry_norm``: what is added
            behind it.
        blocks: In order of execution.
        final_norm: The norm behind the last block with its readers (LLM: lm_head; vision: merger's first linear); None
            when the stream is read as it is.
        norm_place: Where blocks normalize.
        entry_norm: The LayerNorm whose output is the stream before block 0 (CLIP); None without.
        exits: What reads the last block's stream without a norm in between.
    """

    part: Part
    hidden_size: int
    norm_kind: NormKind
    entry: tuple[str, ...]
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    norm_place: NormPlace = NormPlace.PRE
    entry_norm: str | None = None
    exits: tuple[Reader, ...] = ()

    @property
    def block_norms(self) -> Iterator[Norm]:
        for block in self.blocks:
            yield from block.norms

    @property
    def norms(self) -> Iterator[Norm]:
        """Every norm but ``entry_norm``."""
        yield from self.block_norms
        if self.final_norm is not None:
            yield self.final_norm

    @property
    def stream_norms(self) -> tuple[Norm, ...]:
        """The norms that read the residual stream."""
        return tuple(self.norms) if self.norm_place is NormPlace.PRE else ()

    @property
    def writers(self) -> tuple[str, ...]:
        """Every linear, embedding and parameter that adds to the residual stream without a norm behind it."""
        pre = self.norm_place is NormPlace.PRE
        return (*self.entry, *(name for block in self.blocks if pre for name in block.writers))

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Everything that reads the residual stream, behind a norm or not."""
        normed = (Reader(name, norm.chunks) for norm in self.norms for name in norm.readers)
        return (*normed, *self.exits)

    @property
    def keeps_mean(self) -> bool:
        """The mean over channels of a stream with LayerNorms reaches somebody, so writers must not be centred."""
        joint = self.final_norm is not None and self.final_norm.joint
        post = self.norm_place is NormPlace.POST
        return self.norm_kind is NormKind.LAYERNORM and (post or joint or bool(self.exits))


@dataclass(frozen=True)
class Layout:
    """The only architecture facts that a method sees.

    Attributes:
        family: Name of the model family.
        text: The LLM.
        vision: The image encoder; None for text-only models.
        patch_embed: Name of the convolution or linear over pixels, quantized with the vision scheme.
        projector: Linears between the towers in order of execution.
        unquantized: Every linear that stays in floating point, by design (lm_head), or that nobody runs.
        image_token_id: Id of the placeholder that visual features replace; None for text-only models.
        vision_root: Module whose output is the visual features; capture runs up to it.
        text_root: The LLM's decoder module (inputs_embeds -> hidden states), where AIFS permutes.
        resampler: Streams of the projector that have a norm between two linears.
        cross_attentions: Attentions of the projector.
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
    resampler: tuple[Tower, ...] = ()
    cross_attentions: tuple[Attention, ...] = ()

    @property
    def is_multimodal(self) -> bool:
        """Visual tokens may stand among the LLM's."""
        return self.image_token_id is not None

    @property
    def towers(self) -> tuple[Tower, ...]:
        return (*(() if self.vision is None else (self.vision,)), *self.resampler, self.text)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Every attention, one per path."""
        inside = (path.attention for tower in self.towers for block in tower.blocks for path in block.paths)
        return (*inside, *self.cross_attentions)

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

    def modality_of(self, name: str) -> Modality | None:
        """Whose rows an LLM linear sees, where it does not see both."""
        paths = (path for block in self.text.blocks for path in block.experts)
        return next((path.modality for path in paths if name in path.linears), None)

    def check(self, model: nn.Module) -> None:
        """Every name exists, and every linear or convolution is either quantized or a written exception.

        Raises:
            LayoutError: names a module that does not exist or a linear that nobody declared.
        """
        modules = dict(model.named_modules())
        tensors = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        declared = set(self.quantized_linears()) | set(self.unquantized)
        norms = {norm.name for tower in self.towers for norm in tower.norms}
        norms |= {tower.entry_norm for tower in self.towers if tower.entry_norm is not None}
        streams = {name for tower in self.towers for name in (*tower.entry, *(exit.name for exit in tower.exits))}
        scales = {name for tower in self.towers for block in tower.blocks for name, _ in block.scales}
        for name in declared | norms | streams | scales:
            if name not in modules and name not in tensors:
                raise LayoutError(f"layout of family '{self.family}' names '{name}', which the model does not have")
        for name, module in modules.items():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and name not in declared:
                raise LayoutError(
                    f"'{name}' is neither quantized nor listed as unquantized by family '{self.family}'; "
                    "add it to one of the two in its layout"
                )
