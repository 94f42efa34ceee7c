"""Which convolutions a quantized linear can stand for: those over patches that do not overlap, without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mqbench.harness.quant.linear import QuantLinear


@pytest.mark.parametrize("padding", [0, "valid"])
def test_no_padding_has_two_spellings(padding: Any) -> None:
    convolution = nn.Conv2d(3, 8, kernel_size=4, stride=4, padding=padding, dtype=torch.float64)
    images = torch.randn(2, 3, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = QuantLinear.from_module(convolution, "patches")(images)
        torch.testing.assert_close(found, convolution(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 4, "stride": 4, "padding": 1},
        {"kernel_size": 1, "stride": 1, "padding": "same", "dilation": 2},
        {"kernel_size": 4, "stride": 2},
        {"kernel_size": 4, "stride": 4, "groups": 3},
    ],
)
def test_other_convolutions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="'patches' is a Conv2d"):
        QuantLinear.from_module(nn.Conv2d(3, 6, **options), "patches")
