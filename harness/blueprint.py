"""Blueprints: what a model of the paper is made of, as numbers. Enough to count parameters, FLOPs and visual tokens.

Each file of ``harness/blueprints`` describes one model (``internvl2-8b.toml``) and names where its numbers come from.
No weights are needed: ``blueprint_count`` builds the parts on torch's meta device, ``blueprint_tokens`` follows the
rules of the image preprocessors.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from mqbench.harness.errors import RequestError, UnknownNameError

FOLDER = Path(__file__).with_name("blueprints")
WEIGHTS_PREFIX = "blueprint:"
"""Of ``Cell.weights_sha256``: the rest is the blueprint's own hash."""

Spec = TypeVar("Spec")


@dataclass(frozen=True)
class VisionSpec:
    """A vision transformer.

    Attributes:
        kind: ``internvit``, ``siglip``, ``clip`` and ``qwen2_vl`` are transformers' classes; ``plain`` is ours.
        norm: LayerNorm before (``pre``) or after (``post``) each branch.
        hidden_size: Width.
        intermediate_size: Width inside the MLP.
        num_layers: Blocks.
        num_heads: Attention heads.
        patch_size: Side of a patch in pixels.
        image_px: Side of the image that its positions were trained for.
        num_positions: Learned positions, the class token's included; 0 for rotary ones.
        hidden_act: Activation, as transformers spells it.
        class_token: A learned token before the patches (``plain`` only).
        patch_bias: The patch embedding has a bias (``plain`` only).
        entry_norm: LayerNorm before the first block (``plain`` only).
    """

    kind: str
    norm: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_px: int
    num_positions: int
    hidden_act: str
    class_token: bool = True
    patch_bias: bool = True
    entry_norm: bool = False


@dataclass(frozen=True)
class ProjectorSpec:
    """What turns patches into visual tokens.

    Attributes:
        kind: ``pixel_shuffle``, ``merger``, ``resampler``, ``conv_glu`` or ``mlp``.
        input_size: Width of what it reads.
        hidden_size: Width of a visual token.
        intermediate_size: Width inside the gated MLP of ``conv_glu``.
        num_queries: Visual tokens that a ``resampler`` makes of any image.
        num_heads: Attention heads of a ``resampler``.
        stored_positions: Sine positions that a ``resampler`` keeps among its parameters.
    """

    kind: str
    input_size: int
    hidden_size: int
    intermediate_size: int = 0
    num_queries: int = 0
    num_heads: int = 0
    stored_positions: int = 0


@dataclass(frozen=True)
class TextSpec:
    """The LLM.

    Attributes:
        kind: The transformers class with the same layers: ``llama``, ``qwen2`` (biased q, k, v) or ``glm``.
        hidden_size: Width.
        intermediate_size: Width inside the gated MLP.
        num_layers: Blocks.
        num_heads: Query heads.
        num_key_value_heads: Key and value heads.
        vocab_size: Rows of the embedding and of the output layer.
        tied: Both are one matrix.
    """

    kind: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied: bool = False

    @property
    def embedding_params(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class InputSpec:
    """What a FLOP count is of.

    Attributes:
        views: Square images (tiles, slices) that the vision tower sees.
        view_px: Their side.
        llm_tokens: Tokens of the LLM's prefill.
        attention: The products inside attention count; False for linear layers and convolutions only.
        share: The counts are multiplied by this.
    """

    views: int
    view_px: int
    llm_tokens: int
    attention: bool = True
    share: float = 1.0


@dataclass(frozen=True)
class Blueprint:
    """One model.

    Attributes:
        name: As in the paper's Table 19, in our spelling: ``internvl2-8b``.
        title: As the paper prints it.
        sources: Where the numbers come from.
        explanation: Why the paper's figures differ from plain ones, when they do; a note for tables.
        vision: The vision tower.
        projector: What follows it.
        llm: The language model.
        image: Rule of the image preprocessor (key ``rule``) and its constants, see ``blueprint_tokens``.
        input: One image of 256 visual tokens (or what the model makes of its only size), no text.
        paper_input: What the FLOPs of the paper's Table 19 turn out to be of.
        sha256: Hash of the file.
    """

    name: str
    title: str
    sources: tuple[str, ...]
    explanation: str
    vision: VisionSpec
    projector: ProjectorSpec
    llm: TextSpec
    image: Mapping[str, Any] = field(hash=False)
    input: InputSpec
    paper_input: InputSpec
    sha256: str


SECTIONS: Mapping[str, type] = MappingProxyType(
    {
        "vision": VisionSpec,
        "projector": ProjectorSpec,
        "llm": TextSpec,
        "input": InputSpec,
        "paper_input": InputSpec,
    }
)
"""Tables of a blueprint file that become dataclasses."""


def blueprint_names() -> tuple[str, ...]:
    """Every shipped blueprint, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_blueprint(name: str) -> Blueprint:
    """Reads a shipped blueprint.

    Raises:
        UnknownNameError: there is none of this name.
        RequestError: the file lacks an entry or has an unknown one.
    """
    names = blueprint_names()
    if name not in names:
        raise UnknownNameError("blueprint", name, names)
    return read_blueprint(FOLDER / f"{name}.toml")


def load_blueprints(names: Iterable[str] | None = None) -> tuple[Blueprint, ...]:
    """Reads several; None for all.

    Raises:
        UnknownNameError: a name is unknown.
        RequestError: a file lacks an entry or has an unknown one.
    """
    return tuple(load_blueprint(name) for name in (blueprint_names() if names is None else names))


def read_blueprint(path: Path) -> Blueprint:
    """Reads a blueprint file; its name is the model's.

    Raises:
        RequestError: the file lacks an entry or has an unknown one.
    """
    content = path.read_bytes()
    try:
        data = tomllib.loads(content.decode())
        sections: dict[str, Any] = {key: _section(path, data, key, kind) for key, kind in SECTIONS.items()}
        rest = {key: value for key, value in data.items() if key not in SECTIONS}
        rest["sources"] = tuple(rest["sources"])
        return Blueprint(name=path.stem, sha256=hashlib.sha256(content).hexdigest(), **sections, **rest)
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(f"'{path.name}' is no blueprint ({error}); compare it with the shipped ones") from None


def _section(path: Path, data: Mapping[str, Any], key: str, kind: type[Spec]) -> Spec:
    try:
        return kind(**data[key])
    except TypeError as error:
        raise RequestError(f"'{path.name}', section [{key}]: {error}; compare it with the shipped ones") from None
