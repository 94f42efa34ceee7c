"""What a model family declares beside its adapters, so that its layout can be proved without any weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.session import Batch

PAD_ID, FIRST_TEXT_ID = 0, 3
"""Of tiny models: ids between ``FIRST_TEXT_ID`` and their image token's are text."""

GAINS = (0.5, 1.5)
SPREAD = 0.3


@dataclass(frozen=True)
class Family:
    """A family of models with one layout.

    Attributes:
        name: As the layout's ``family``.
        build: Makes a module tree with random weights from a config.
        layout: The layout of a model or of a config.
        tiny_config: A config of a few thousand parameters in which every kind of module occurs.
        tiny_inputs: Inputs for a tiny model: left-padded rows without, with one and with two images.
        configs: Configs of the released sizes, by name; built on the meta device only.
    """

    name: str
    build: Callable[[Any], nn.Module]
    layout: Callable[[Any], Layout]
    tiny_config: Callable[[], Any]
    tiny_inputs: Callable[[nn.Module, torch.Generator], Batch]
    configs: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


def tiny_model(family: Family, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A random tiny model in evaluation mode in which every gain, bias and scale matters."""
    model = family.build(family.tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomize(name, parameter, generator)
    model = model.to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        _keep_float64(model)
    return model


def prompts(
    image_counts: tuple[int, ...],
    tokens_per_image: int,
    image_id: int,
    generator: torch.Generator,
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> dict[str, Tensor]:
    """Left-padded rows of random text with image placeholders between.

    Args:
        image_counts: Images of each row.
        tokens_per_image: Placeholders of each image.
        image_id: The placeholder; text ids are below it.
        generator: Of tokens and lengths.
        around: Ids in front of and behind the placeholders of an image.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, T).
    """
    rows = [_prompt(count, tokens_per_image, image_id, generator, around) for count in image_counts]
    longest = max(map(len, rows))
    input_ids = torch.tensor([[PAD_ID] * (longest - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(longest) >= longest - lengths[:, None]).long()}


def random_pixels(model: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal pixels in the model's dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)


def _prompt(
    num_images: int,
    tokens_per_image: int,
    image_id: int,
    generator: torch.Generator,
    around: tuple[tuple[int, ...], tuple[int, ...]],
) -> list[int]:
    last = min((image_id, *around[0], *around[1]))
    ids = _text(last, generator)
    for _ in range(num_images):
        ids += [*around[0], *[image_id] * tokens_per_image, *around[1], *_text(last, generator)]
    return ids


def _text(last: int, generator: torch.Generator) -> list[int]:
    length = int(torch.randint(1, 6, (), generator=generator))
    return torch.randint(FIRST_TEXT_ID, last, (length,), generator=generator).tolist()


def _randomize(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices keep their inputs' size; gains and LayerScales lie around one, biases and tokens around zero."""
    noise = torch.rand(parameter.shape, generator=generator)
    is_bias = name.endswith("bias")
    if parameter.dim() == 1 and not is_bias:
        parameter.copy_(GAINS[0] + noise * (GAINS[1] - GAINS[0]))
    elif parameter.dim() >= 2 and not is_bias and "position" not in name:
        fan_in = parameter[0].numel()
        parameter.copy_((noise - 0.5) * (12 / fan_in) ** 0.5)
    else:
        parameter.copy_((noise - 0.5) * 2 * SPREAD)


class _WideRMSNorm(nn.Module):
    """RMSNorm with a gain that stays in float64: transformers' own computes in float32, whatever the dtype."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def _keep_float64(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("RMSNorm") and eps is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _WideRMSNorm(module.weight, eps))
