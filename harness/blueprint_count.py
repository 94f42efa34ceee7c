"""Parameters and FLOPs of a blueprint's parts, counted on the meta device: no weights, no memory.

One multiplication with its addition is two FLOPs. Counted are matrix products and convolutions, as
``torch.utils.flop_counter`` does; the LLM's output layer runs on every token, attention on the full square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mqbench.harness.blueprint import Blueprint, InputSpec, ProjectorSpec, TextSpec, VisionSpec
from mqbench.harness.blueprint_modules import ConvGluProjector, PixelShuffleProjector, PlainTower, Resampler, mlp
from mqbench.harness.errors import UnknownNameError

ATTENTION_OPS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
"""Products of two activations: inside attention (and the LLM's table of angles, a millionth of it)."""

ATTENTION = "eager"


@dataclass(frozen=True)
class Flops:
    """FLOPs of one run.

    Attributes:
        linear: Linear layers and convolutions.
        attention: Products inside attention.
    """

    linear: int
    attention: int

    def total(self, spec: InputSpec, runs: int = 1) -> float:
        """What ``spec`` counts of ``runs`` runs."""
        counted = self.linear + (self.attention if spec.attention else 0)
        return runs * spec.share * counted


@dataclass(frozen=True)
class Parts:
    """The parts of a model on the meta device.

    Attributes:
        tower: Pixels to patches.
        projector: Patches to visual tokens.
        llm: A causal language model of transformers.
    """

    tower: nn.Module
    projector: nn.Module
    llm: nn.Module


class InternVitTower(nn.Module):
    """transformers' vision tower of InternVL."""

    def __init__(self, spec: VisionSpec) -> None:
        from transformers import InternVLVisionConfig, InternVLVisionModel

        super().__init__()
        config = InternVLVisionConfig(attention_bias=True, **_vision_options(spec))
        self.model = InternVLVisionModel(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state[:, 1:]


class SiglipTower(nn.Module):
    """transformers' SigLIP without its pooling head; positions are resampled to the image."""

    def __init__(self, spec: VisionSpec) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        self.model = SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **_vision_options(spec)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels, interpolate_pos_encoding=True).last_hidden_state


class ClipTower(nn.Module):
    """transformers' CLIP."""

    def __init__(self, spec: VisionSpec) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        self.model = CLIPVisionModel(CLIPVisionConfig(**_vision_options(spec)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state[:, 1:]


class Qwen2VLTower(nn.Module):
    """transformers' vision tower of Qwen2-VL without the merger, which is our projector."""

    FRAMES = 2
    """An image is given twice: the patch embedding reads pairs of video frames."""

    def __init__(self, spec: VisionSpec) -> None:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        super().__init__()
        config = Qwen2VLVisionConfig(
            embed_dim=spec.hidden_size,
            depth=spec.num_layers,
            num_heads=spec.num_heads,
            mlp_ratio=spec.intermediate_size // spec.hidden_size,
            patch_size=spec.patch_size,
            attn_implementation=ATTENTION,
        )
        self.model = Qwen2VisionTransformerPretrainedModel(config)
        self.model.merger = nn.Identity()
        self.spec = spec

    def forward(self, pixels: Tensor) -> Tensor:
        # Block by block: the model's own forward reads sizes out of a tensor, which the meta device does not hold.
        num_patches = (pixels.shape[-1] // self.spec.patch_size) ** 2
        angles = pixels.new_empty(num_patches, self.spec.hidden_size // self.spec.num_heads)
        ends = torch.tensor([0, num_patches], dtype=torch.int32, device="cpu")
        hidden = self.model.patch_embed(pixels.reshape(num_patches, -1).repeat(1, self.FRAMES))
        for block in self.model.blocks:
            hidden = block(hidden, cu_seqlens=ends, max_seqlen=num_patches, position_embeddings=(angles, angles))
        return hidden[None]


def _merger(spec: ProjectorSpec) -> nn.Module:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    return PatchMerger(dim=spec.hidden_size, context_dim=spec.input_size)


TOWERS: Mapping[str, Callable[[VisionSpec], nn.Module]] = MappingProxyType(
    {
        "internvit": InternVitTower,
        "siglip": SiglipTower,
        "clip": ClipTower,
        "qwen2_vl": Qwen2VLTower,
        "plain": PlainTower,
    }
)
PROJECTORS: Mapping[str, Callable[[ProjectorSpec], nn.Module]] = MappingProxyType(
    {
        "pixel_shuffle": PixelShuffleProjector,
        "merger": _merger,
        "resampler": Resampler,
        "conv_glu": ConvGluProjector,
        "mlp": lambda spec: mlp(spec.input_size, spec.hidden_size),
    }
)
LLM_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama": ("Llama", {}),
        "qwen2": ("Qwen2", {}),
        "glm": ("Glm", {"attention_bias": True, "head_dim": 128}),
    }
)
"""transformers' name, and what its configuration needs beyond the sizes."""


@cache
def build_parts(blueprint: Blueprint) -> Parts:
    """The model's parts on the meta device, without weights.

    Raises:
        UnknownNameError: a part is of an unknown kind.
    """
    with torch.device("meta"):
        tower = _find("vision tower", TOWERS, blueprint.vision.kind)(blueprint.vision)
        projector = _find("projector", PROJECTORS, blueprint.projector.kind)(blueprint.projector)
        return Parts(tower.eval(), projector.eval(), build_llm(blueprint.llm).eval())


def build_llm(spec: TextSpec) -> nn.Module:
    """A causal language model of transformers on the current default device.

    Raises:
        UnknownNameError: it is of an unknown kind.
    """
    import transformers

    name, options = _find("language model", LLM_CLASSES, spec.kind)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_key_value_heads,
        vocab_size=spec.vocab_size,
        tie_word_embeddings=spec.tied,
        attn_implementation=ATTENTION,
        pad_token_id=None,
        **options,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def num_params(module: nn.Module) -> int:
    """Parameters, frozen ones included, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def num_view_tokens(blueprint: Blueprint, view_px: int) -> int:
    """Visual tokens that the tower and projector make of one square view."""
    return _visual_run(blueprint, view_px)[1]


def visual_flops(blueprint: Blueprint, view_px: int) -> Flops:
    """FLOPs of vision tower and projector on one square view of ``view_px`` pixels."""
    return _visual_run(blueprint, view_px)[0]


@cache
def llm_flops(blueprint: Blueprint, num_tokens: int) -> Flops:
    """FLOPs of the LLM's prefill of ``num_tokens`` tokens."""
    llm = build_parts(blueprint).llm
    tokens = torch.empty(1, num_tokens, dtype=torch.long, device="meta")
    # Four dimensions: transformers takes it as it is instead of looking into the tokens.
    mask = torch.empty(1, 1, num_tokens, num_tokens, device="meta")
    return _count(lambda: llm(input_ids=tokens, attention_mask=mask, use_cache=False))[0]


@cache
def _visual_run(blueprint: Blueprint, view_px: int) -> tuple[Flops, int]:
    parts = build_parts(blueprint)
    pixels = torch.empty(1, 3, view_px, view_px, device="meta")
    flops, tokens = _count(lambda: parts.projector(parts.tower(pixels)))
    return flops, tokens.shape[-2]


def _count(run: Callable[[], Any]) -> tuple[Flops, Any]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = run()
    by_op = counter.get_flop_counts()["Global"]
    attention = sum(by_op.get(op, 0) for op in ATTENTION_OPS)
    return Flops(counter.get_total_flops() - attention, attention), result


def _vision_options(spec: VisionSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "patch_size": spec.patch_size,
        "image_size": spec.image_px,
        "hidden_act": spec.hidden_act,
        "attn_implementation": ATTENTION,
    }


def _find(what: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise UnknownNameError(what, name, table)
    return table[name]
