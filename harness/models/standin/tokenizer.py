"""The stand-in's tokenizer: bytes, plus one piece per fixed stretch of the prompt templates and per lexicon word.

Characters that are read from images stay single pieces, so reading is per character, while VLMEvalKit's long prompts
cost a few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mqbench.harness.models.standin import vocabulary

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ROLE_PHRASES = ("user\n", "assistant\n", "system\n")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Dialect:
    """What a family's tokenizer has beside bytes and the tasks' words.

    Attributes:
        special: Special tokens, in the order of their ids.
        phrases: Fixed stretches of the family's conversation, each one piece.
        eos_token: Ends an answer.
        pad_token: Stands at masked places.
        settings: More arguments of ``PreTrainedTokenizerFast``.
    """

    special: tuple[str, ...]
    phrases: tuple[str, ...]
    eos_token: str
    pad_token: str
    settings: dict[str, Any] = field(default_factory=dict)


QWEN2_VL = Dialect(SPECIAL, ROLE_PHRASES, "<|im_end|>", "<|endoftext|>", {"chat_template": CHAT_TEMPLATE})


def build_tokenizer(dialect: Dialect = QWEN2_VL) -> PreTrainedTokenizerFast:
    """A lossless byte-level tokenizer with the template phrases as added pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in dialect.special])
    core.add_tokens([AddedToken(text, normalized=False) for text in (*dialect.phrases, *vocabulary.phrases())])
    core.add_tokens([AddedToken(word, normalized=False, single_word=True) for word in vocabulary.words()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=dialect.eos_token,
        pad_token=dialect.pad_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **dialect.settings,
    )


def render_prompt(prompt: str, num_visual_tokens: int) -> str:
    """The chat template applied to one user turn, with the image placeholder repeated; ends where the answer starts."""
    visual = f"<|vision_start|>{'<|image_pad|>' * num_visual_tokens}<|vision_end|>" if num_visual_tokens else ""
    return f"<|im_start|>user\n{visual}{prompt}<|im_end|>\n<|im_start|>assistant\n"
