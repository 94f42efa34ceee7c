"""Feeds a stand-in through its family's own adapter: prompts and pixels as ``mqbench eval`` makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerFast

from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.standin import tasks
from mqbench.harness.models.standin.objective import TrainBatch, real_tokens, right_padded
from mqbench.harness.models.standin.prompts import PromptStyle, is_vqa
from mqbench.harness.models.standin.tasks import Example
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.session import Batch

ROWS = ("input_ids", "attention_mask")


def adapter_feed(
    adapter: Any,
    save_processor: Callable[[PreTrainedTokenizerFast, Path], None],
    style: PromptStyle,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    answer_start: str = "",
) -> AdapterFeed:
    """The feed of a model whose adapter reads the files that ``save_processor`` writes."""
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_processor(tokenizer, Path(folder))
        processor = adapter.load_processor(Path(folder))
    return AdapterFeed(adapter, processor, style, model, adapter.layout(model), answer_start)


class AdapterFeed:
    """The feed of every family whose model takes many pictures at once.

    Args:
        adapter: Of the stand-in; it knows how its family reads pictures and asks questions.
        processor: The adapter's, loaded from the stand-in's files.
        style: How the family asks.
        model: The stand-in.
        layout: Its layout.
        answer_start: What stands between a prompt and its answer.
    """

    def __init__(
        self,
        adapter: Any,
        processor: Any,
        style: PromptStyle,
        model: nn.Module,
        layout: Layout,
        answer_start: str = "",
    ) -> None:
        self.adapter, self.style, self.layout, self.answer_start = adapter, style, layout, answer_start
        self.loaded = LoadedModel(adapter.name, model, processor, layout)
        self.starts: dict[bool, int] = {}

    def collate(self, examples: Sequence[Example], device: str = "cpu") -> TrainBatch:
        """Examples that all have an image, or all have none, as one right-padded batch."""
        tokenizer = self.loaded.processor.tokenizer
        encoded = self._encode(examples)
        end = tokenizer.eos_token
        answers = [tokenizer(f"{self.answer_start}{example.answer}{end}")["input_ids"] for example in examples]
        prompts = _unpadded(encoded)
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[-100] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        pictures = {name: tensor.to(device) for name, tensor in encoded.items() if name not in ROWS}
        image_id = self.layout.image_token_id
        assert image_id is not None
        start = self._question_start(examples[0])
        return right_padded(rows, labels, tokenizer.pad_token_id, image_id, pictures, start, device)

    def logits_and_activations(self, model: Any, batch: TrainBatch) -> tuple[Tensor, list[Tensor]]:
        """(B, T, vocabulary) logits, and the input of each LLM block's last linear (B, T, intermediate)."""
        activations: list[Tensor] = []
        hooks = [
            model.get_submodule(block.mlp_out).register_forward_pre_hook(lambda _, args: activations.append(args[0]))
            for block in self.layout.text.blocks
        ]
        try:
            with _wide_attention():
                # No mask: padding stands behind the answers, where causal attention does not look.
                logits = model(input_ids=batch.input_ids, use_cache=False, **batch.pictures).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits, activations

    def model_inputs(self, batch: TrainBatch) -> Batch:
        """The batch as arguments of the model's ``forward``."""
        return {"input_ids": batch.input_ids, "attention_mask": real_tokens(batch).long(), **batch.pictures}

    def _encode(self, examples: Sequence[Example]) -> Batch:
        with TemporaryDirectory() as folder:
            paths = (Path(folder) / f"{number}.bmp" for number in range(len(examples)))
            messages = [message_of(example, path, self.style) for example, path in zip(examples, paths, strict=True)]
            return self.adapter.encode(self.loaded, messages)

    def _question_start(self, example: Example) -> int:
        """Where two prompts part that differ in the whole question, and are no benchmark's of special form."""
        has_image = example.image is not None
        if has_image not in self.starts:
            questions = [Example(example.image, text, "") for text in ("?", "!")]
            first, second = _unpadded(self._encode(questions))
            self.starts[has_image] = next(
                i for i, pair in enumerate(zip(first, second, strict=True)) if len({*pair}) > 1
            )
        return self.starts[has_image]


def message_of(example: Example, path: Path, style: PromptStyle) -> Message:
    """An example as ``mqbench eval`` passes it to an adapter; its picture is written to ``path``."""
    dataset = {"dataset": name} if (name := _dataset_of(example)) else {}
    text = {"type": "text", "value": style.text(example)}
    if example.image is None:
        return [text | dataset]
    example.image.save(path)
    front = [{"type": "text", "value": style.before_image}] if style.before_image and is_vqa(example) else []
    return [item | dataset for item in (*front, {"type": "image", "value": str(path)}, text)]


def _dataset_of(example: Example) -> str | None:
    """VLMEvalKit's name of a benchmark whose prompts some families change."""
    if example.subject:
        return "ScienceQA_TEST"
    return "MME" if example.category in tasks.MME else None


def _unpadded(batch: Batch) -> list[list[int]]:
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


class _Float32Attention(TorchFunctionMode):
    """The CPU's bfloat16 attention backward is several times slower than its float32 one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()}).to(
                args[0].dtype
            )


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


@contextmanager
def _wide_attention() -> Iterator[None]:
    with _Float32Attention():
        yield
