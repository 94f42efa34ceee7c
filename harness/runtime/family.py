"""What a model family does specially, as data: names of its rotary functions, how its positions are counted.

Blocks know no family; this table is the one place to add one (beside its layout in ``harness.models``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.errors import UnknownNameError
from mqbench.harness.models.llama import llama_layout
from mqbench.harness.models.qwen2_vl import qwen2_vl_layout
from mqbench.harness.quant.layout import Layout
from mqbench.harness.runtime.blocks import Angles
from mqbench.harness.runtime.interface import RuntimeInputs

VisionPositions = Callable[[nn.Module, Tensor, torch.dtype], tuple[Angles, tuple[int, ...]]]
TextPositions = Callable[[nn.Module, RuntimeInputs], Tensor]


@dataclass(frozen=True)
class Family:
    """One model family, by ``config.model_type``.

    Attributes:
        model_class: Name in ``transformers``.
        layout: Of a config or a model.
        text_rotary: Function that rotates the LLM's queries and keys, in the module that defines the LLM's attention.
        vision_rotary: The vision tower's, or None.
        position_rows: Rows of the LLM's position ids: 3 (M-RoPE), or 1.
        text_positions: (model, inputs) -> position ids of a prompt, (position_rows, B, T), counted from 0.
        vision_positions: (vision tower, grids, dtype) -> angles of all patches, and patches per attention window.
    """

    model_class: str
    layout: Callable[[Any], Layout]
    text_rotary: str
    vision_rotary: str | None
    position_rows: int
    text_positions: TextPositions
    vision_positions: VisionPositions | None

    def empty_model(self, config: Any) -> Any:
        """The model of a config on the meta device."""
        import transformers

        with torch.device("meta"):
            return getattr(transformers, self.model_class)(config).eval().requires_grad_(False)


def family_of(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        UnknownNameError: the runtime does not know it.
    """
    if config.model_type not in FAMILIES:
        raise UnknownNameError("model type of the runtime", config.model_type, FAMILIES)
    return FAMILIES[config.model_type]


def sequential_positions(model: nn.Module, inputs: RuntimeInputs) -> Tensor:
    """Tokens count up from each row's first one. Shapes: (1, B, T)."""
    if inputs.attention_mask is None:
        return torch.arange(inputs.num_tokens, device=inputs.input_ids.device).expand(1, inputs.batch_size, -1)
    return (inputs.attention_mask.long().cumsum(1) - 1).clamp_min(0)[None]


def multimodal_positions(model: Any, inputs: RuntimeInputs) -> Tensor:
    """M-RoPE's three rows: text counts up in all, an image's tokens by time, height and width. Shapes: (3, B, T)."""
    if inputs.image_grid_thw is None:
        return sequential_positions(model, inputs).expand(3, -1, -1)
    positions, _ = model.model.get_rope_index(
        inputs.input_ids,
        inputs.mm_token_type_ids,
        image_grid_thw=inputs.image_grid_thw,
        attention_mask=inputs.attention_mask,
    )
    return positions


def grid_positions(visual: Any, grid_thw: Tensor, dtype: torch.dtype) -> tuple[Angles, tuple[int, ...]]:
    """Two rotary axes, height and width; each frame of an image attends to itself."""
    from transformers.vision_utils import get_vision_position_ids

    device = visual.rotary_pos_emb.inv_freq.device
    positions = get_vision_position_ids(grid_thw, visual.spatial_merge_size).to(device)
    frames = [(t, height * width) for t, height, width in grid_thw.tolist()]
    lengths = tuple(size for t, size in frames for _ in range(t))
    return visual.rotary_pos_emb(torch.empty(0, dtype=dtype, device=device), positions), lengths


def _text_only(model_class: str) -> Family:
    return Family(model_class, llama_layout, "apply_rotary_pos_emb", None, 1, sequential_positions, None)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2_vl": Family(
            "Qwen2VLForConditionalGeneration",
            qwen2_vl_layout,
            "apply_rotary_pos_emb",
            "apply_rotary_pos_emb_vision",
            3,
            multimodal_positions,
            grid_positions,
        ),
        "llama": _text_only("LlamaForCausalLM"),
        "qwen2": _text_only("Qwen2ForCausalLM"),
    }
)
"""By ``config.model_type``."""
