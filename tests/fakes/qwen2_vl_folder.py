"""A tiny Qwen2-VL on disk, with tokenizer, processor and chat template, as the adapters load it; and its images."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from fakes.tiny_qwen2_vl import tiny_config, tiny_model

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKEN_PX = 8
MIN_PX, MAX_PX = 4 * TOKEN_PX**2, 12 * TOKEN_PX**2
"""An image is 4 to 12 visual tokens of 8 x 8 pixels."""


def write_model_folder(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Saves a random model with everything that belongs to it."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    config = tiny_config()
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.bos_token_id = None
    config.text_config.pad_token_id, _, config.text_config.eos_token_id, *visual = tokenizer.convert_tokens_to_ids(
        list(SPECIAL)
    )
    config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id = visual
    tiny_model(dtype, seed, config=config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_processor() -> Qwen2VLProcessor:
    """Bytes as tokens; patches of 4 pixels, merged 2 x 2."""
    pixels = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": MIN_PX, "max_pixels": MAX_PX}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tiny_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def write_image(path: Path, width: int, height: int, seed: int = 0) -> str:
    """A PNG of random pixels; returns its path as VLMEvalKit's messages hold it."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return str(path)
