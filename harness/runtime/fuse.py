"""Replaces a model's blocks, patch embedding, projector and head by those of the runtime, as its layout says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.layout import Block, Layout, Part
from mqbench.harness.quant.modality import ModalityContext
from mqbench.harness.runtime.blocks import Heads, Rotary, TextBlock, VisionBlock
from mqbench.harness.runtime.coverage import check_covered, final_norm
from mqbench.harness.runtime.decoder import RuntimeDecoder
from mqbench.harness.runtime.family import Family
from mqbench.harness.runtime.pointwise import RowNorm, activation_of
from mqbench.harness.runtime.projection import Projection
from mqbench.harness.runtime.rows import Rows
from mqbench.harness.runtime.systems import System
from mqbench.harness.runtime.vision import PatchRows, Projector


class Source(Protocol):
    """Where the runtime's modules come from: a quantized model, or random values."""

    def projection(self, names: tuple[str, ...], part: Part) -> Projection:
        """Linears that share an input, by their names in the layout."""
        ...

    def norm(self, name: str) -> RowNorm:
        """A norm, by its name in the layout."""
        ...

    def head(self, name: str) -> Projection:
        """The output head."""
        ...


class Head(nn.Module):
    """The output head on hidden states of any shape (..., C) -> (..., vocabulary)."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        return self.projection(rows).view(*hidden.shape[:-1], -1)


@dataclass(frozen=True)
class FusedModel:
    """A model whose blocks are the runtime's, and the modules that a pass calls, in order.

    Attributes:
        model: The Transformers model.
        layout: Its layout.
        family: Its family.
        rows: What the sites of the LLM's linears read.
        context: What tells modalities in passes through Transformers' interface.
    """

    model: Any
    layout: Layout
    family: Family
    rows: Rows
    context: ModalityContext

    @property
    def decoder(self) -> RuntimeDecoder:
        decoder = self.model.get_submodule(self.layout.text_root)
        assert isinstance(decoder, RuntimeDecoder)
        return decoder

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self.model.get_submodule(final_norm(self.layout.text).readers[0])
        return head

    @property
    def visual(self) -> Any:
        """The vision tower's root."""
        assert self.layout.vision_root is not None
        return self.model.get_submodule(self.layout.vision_root)

    @property
    def patch_embed(self) -> nn.Module:
        assert self.layout.patch_embed is not None
        module: nn.Module = self.model.get_submodule(parent_of(self.layout.patch_embed))
        return module

    @property
    def vision_blocks(self) -> Iterator[VisionBlock]:
        assert self.layout.vision is not None
        for block in self.layout.vision.blocks:
            module = self.model.get_submodule(block.name)
            assert isinstance(module, VisionBlock)
            yield module

    @property
    def projector(self) -> Projector:
        assert self.layout.vision is not None
        projector = self.model.get_submodule(parent_of(final_norm(self.layout.vision).name))
        assert isinstance(projector, Projector)
        return projector


def fuse(fused: FusedModel, system: System, source: Source) -> None:
    """Replaces the modules of ``fused.model`` in place, one after the other, so that old and new weights of no more
    than one block are in memory together.

    Raises:
        LayoutError: the architecture has something that the runtime does not cover; the message names it.
    """
    model, layout = fused.model, fused.layout
    check_covered(layout, model.get_submodule(layout.text_root).config)
    if layout.vision is not None:
        assert layout.patch_embed is not None and fused.family.vision_rotary is not None
        put(model, parent_of(layout.patch_embed), PatchRows(source.projection((layout.patch_embed,), Part.VISION)))
        for block in layout.vision.blocks:
            parts = _parts(model, block, Part.VISION, fused.family.vision_rotary, source)
            put(model, block.name, VisionBlock(**parts))
        put(model, parent_of(final_norm(layout.vision).name), _projector(model, layout, source))
    for index, block in enumerate(layout.text.blocks):
        parts = _parts(model, block, Part.TEXT, fused.family.text_rotary, source)
        put(model, block.name, TextBlock(layer=index, **parts))
    _replace_decoder(fused, system, source)
    head = final_norm(layout.text).readers[0]
    put(model, head, Head(source.head(head)))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of that name."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def parent_of(name: str) -> str:
    """Name of the module that holds a module."""
    return name.rpartition(".")[0]


def _parts(model: nn.Module, block: Block, part: Part, rotary: str, source: Source) -> dict[str, Any]:
    """Arguments of ``FusedBlock``."""
    attention = block.attention
    attention_module = model.get_submodule(parent_of(attention.out))
    return {
        "attention_norm": source.norm(block.attention_norm.name),
        "qkv": source.projection(block.attention_norm.readers, part),
        "out": source.projection((attention.out,), part),
        "heads": Heads(attention.num_heads, attention.num_kv_heads, attention.head_dim),
        "rotary": Rotary(type(attention_module).__module__, rotary),
        "mlp_norm": source.norm(block.mlp_norm.name),
        "mlp_in": source.projection(block.mlp_norm.readers, part),
        "mlp_out": source.projection((block.mlp_out,), part),
        "activation": _activation(model, parent_of(block.mlp_out)),
        "gated": block.mlp_up is not None,
    }


def _activation(model: nn.Module, parent: str) -> str:
    """The one activation function among a module's children."""
    found = {kind for child in model.get_submodule(parent).children() if (kind := activation_of(child)) is not None}
    if len(found) != 1:
        raise LayoutError(
            f"'{parent}' has {sorted(found) or 'no'} activation functions that the runtime knows, not one"
        )
    return found.pop()


def _projector(model: nn.Module, layout: Layout, source: Source) -> Projector:
    assert layout.vision is not None
    norm, linears = final_norm(layout.vision), layout.projector
    return Projector(
        source.norm(norm.name),
        norm.chunks,
        source.projection(linears[:1], Part.PROJECTOR),
        _activation(model, parent_of(linears[0])),
        source.projection(linears[1:], Part.PROJECTOR),
    )


def _replace_decoder(fused: FusedModel, system: System, source: Source) -> None:
    model, text, root = fused.model, fused.layout.text, fused.layout.text_root
    norm = final_norm(text).name
    put(model, norm, source.norm(norm))
    decoder = RuntimeDecoder(
        model.get_submodule(root),
        parent_of(text.blocks[0].name).removeprefix(root + "."),
        norm.removeprefix(root + "."),
        system.order,
        fused.rows,
        fused.context,
        fused.family.position_rows,
    )
    put(model, root, decoder.eval())


@torch.no_grad()
def unique_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    sizes = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()  # the storage itself: on the meta device all addresses are 0
    return sum(sizes.values())
