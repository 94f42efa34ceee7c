"""A random Qwen2-VL of a few thousand parameters in which every norm gain and every bias matters, and inputs for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl

from mqbench.harness.models.qwen2_vl import qwen2_vl_layout
from mqbench.harness.quant.layout import Layout

PAD_ID, EOS_ID, VISION_START_ID, VISION_END_ID, IMAGE_ID, VIDEO_ID = 0, 2, 60, 61, 62, 63
FIRST_TEXT_ID, LAST_TEXT_ID = 3, 59
GRIDS = ((1, 4, 4), (1, 2, 4), (1, 4, 6))
"""(t, h, w) in patches; a merger of 2x2 makes them 4, 2 and 6 visual tokens."""
PATCH_DIM = 3 * 2 * 4 * 4


def tiny_config() -> Qwen2VLConfig:
    """Vision 2 x 32 (2 heads), LLM 2 x 48 (6 query heads on 2 key/value heads of width 8), vocabulary 64."""
    return Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 48,
            "mlp_ratio": 4,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        text_config={
            "vocab_size": 64,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "bos_token_id": 1,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        tie_word_embeddings=False,
    )


def tiny_model(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    config: Qwen2VLConfig | None = None,
) -> Qwen2VLForConditionalGeneration:
    """A random model in evaluation mode; in float64 it computes in float64 throughout (see ``_keep_float64``)."""
    config = tiny_config() if config is None else config
    config._attn_implementation = attn_implementation
    model = Qwen2VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            randomize(module, generator)
    text = config.text_config
    model.generation_config.update(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, do_sample=False)
    return model.to(dtype).eval()


def tiny_layout(model: Qwen2VLForConditionalGeneration) -> Layout:
    """The layout of the real family, applied to the tiny model."""
    return qwen2_vl_layout(model)


def tiny_batch(
    model: Qwen2VLForConditionalGeneration,
    num_images: int = 1,
    batch_size: int = 2,
    seed: int = 0,
    text_rows: int = 0,
) -> dict[str, Tensor]:
    """Left-padded inputs of prompts of different lengths with text before, between and after the images.

    Args:
        model: Gives dtype and device.
        num_images: Images per row (of different sizes).
        batch_size: Rows.
        seed: Of tokens, lengths and pixels.
        text_rows: This many rows, from the first one on, hold no image.

    Returns:
        ``input_ids``, ``attention_mask`` (B, T); with images also ``mm_token_type_ids`` (B, T), ``pixel_values``
        (patches, 96) and ``image_grid_thw`` (images, 3).
    """
    generator = torch.Generator().manual_seed(seed)
    rows, grids = [], []
    for row in range(batch_size):
        ids, row_grids = _prompt(0 if row < text_rows else num_images, generator)
        rows.append(ids)
        grids += row_grids
    return {name: tensor.to(model.device) for name, tensor in _collate(rows, grids, model.dtype, generator).items()}


def _prompt(num_images: int, generator: torch.Generator) -> tuple[list[int], list[tuple[int, int, int]]]:
    ids, grids = _text(generator), []
    for _ in range(num_images):
        grid = GRIDS[_randint(0, len(GRIDS), generator)]
        ids += [VISION_START_ID, *[IMAGE_ID] * (math.prod(grid) // 4), VISION_END_ID, *_text(generator)]
        grids.append(grid)
    return ids, grids


def _collate(
    rows: list[list[int]], grids: list[tuple[int, int, int]], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    input_ids = torch.tensor([[PAD_ID] * (longest - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    attention_mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if grids:
        num_patches = sum(math.prod(grid) for grid in grids)
        batch["mm_token_type_ids"] = (input_ids == IMAGE_ID).int()
        batch["pixel_values"] = torch.randn(num_patches, PATCH_DIM, generator=generator, dtype=torch.float64).to(dtype)
        batch["image_grid_thw"] = torch.tensor(grids)
    return batch


def _text(generator: torch.Generator) -> list[int]:
    length = _randint(1, 6, generator)
    return torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID + 1, (length,), generator=generator).tolist()


def _randint(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of unit gain; norm gains around 1 and every bias around 0, all clearly off their defaults."""
    is_norm = "Norm" in type(module).__name__
    for name, parameter in module.named_parameters(recurse=False):
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "bias":
            parameter.copy_(0.3 * noise)
        elif is_norm:
            parameter.copy_(1 + 0.3 * noise)
        elif isinstance(module, nn.Embedding):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def _keep_float64() -> None:
    """Lets a float64 model stay in float64.

    Transformers casts to float32 inside the RMSNorm and the vision rotary embedding, which hides an error below 1e-7
    and turns one of 1e-16 into 1e-7: no invariance could be checked to 1e-9. Other dtypes take the original path.
    """
    rms_forward = modeling_qwen2_vl.Qwen2VLRMSNorm.forward
    rotate_vision = modeling_qwen2_vl.apply_rotary_pos_emb_vision

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float64:
            return rms_forward(self, hidden_states)
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if q.dtype != torch.float64:
            return rotate_vision(q, k, cos, sin)
        return modeling_qwen2_vl.apply_rotary_pos_emb(q, k, cos.double(), sin.double(), unsqueeze_dim=-2)

    def patch_once(owner: object, name: str, function: Callable[..., object]) -> None:
        if not getattr(getattr(owner, name), "keeps_float64", False):
            function.keeps_float64 = True  # type: ignore[attr-defined]
            setattr(owner, name, function)

    patch_once(modeling_qwen2_vl.Qwen2VLRMSNorm, "forward", forward)
    patch_once(modeling_qwen2_vl, "apply_rotary_pos_emb_vision", rotate)


_keep_float64()
