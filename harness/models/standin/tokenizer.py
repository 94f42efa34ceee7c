"""The stand-in's tokenizer: bytes, plus one piece per fixed stretch of the prompt templates and per lexicon word.

Characters that are read from images stay single pieces, so reading is per character, while VLMEvalKit's long prompts
cost a few tokens.
"""

from __future__ import annotations

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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless byte-level tokenizer with the template phrases as added pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(text, normalized=False) for text in (*ROLE_PHRASES, *vocabulary.phrases())])
    core.add_tokens([AddedToken(word, normalized=False, single_word=True) for word in vocabulary.words()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def render_prompt(prompt: str, num_visual_tokens: int) -> str:
    """The chat template applied to one user turn, with the image placeholder repeated; ends where the answer starts."""
    visual = f"<|vision_start|>{'<|image_pad|>' * num_visual_tokens}<|vision_end|>" if num_visual_tokens else ""
    return f"<|im_start|>user\n{visual}{prompt}<|im_end|>\n<|im_start|>assistant\n"
