"""The text stand-in's tokenizer: byte-level BPE learnt on generated articles, digits one by one as LLaMA has them."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mqbench.harness.models.standin_text.corpus import joined_text, raw_text

BEGIN, END, PAD = "<s>", "</s>", "<pad>"
VOCABULARY_SIZE = 1024
TRAINING_ARTICLES = 1500


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A lossless tokenizer of ``VOCABULARY_SIZE`` pieces; the same for the same seed."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (BEGIN, END, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = raw_text("tokenizer", TRAINING_ARTICLES, seed)
    core.train_from_iterator([text, joined_text(text)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
