"""Rotations of a multimodal model that leave its function unchanged (QuaRot, arXiv 2404.00456; MQuant, Sec. 3.3).

Steps over a session, all in float64 and cast back: residual rotation, per-head rotation of the values, and online
Hadamard transforms with their inverse in the weights. A map T with T T^t = I on an input is undone by mapping the
rows of the reading weight with the same T, since <T(w), T(x)> = <w, x>; no matrix is ever built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mqbench.baselines.fusion import (
    VectorMap,
    fuse_norms,
    is_rotatable,
    layernorm_to_rmsnorm,
    map_input,
    map_reader,
    map_rows,
    map_writer,
    set_parameter,
    untie_head,
)
from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.kv_cache import kv_cache_steps
from mqbench.harness.quant.layout import Attention, Part, Tower
from mqbench.harness.quant.options import Option
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Session, Step
from mqbench.harness.quant.transforms import AffineNorm, CentredNorm, HeadHadamard, OnlineHadamard
from mqbench.kernels.hadamard import hadamard_transform, padded_size

OPTIONS = (
    Option("ln2rms", True, kind=bool, help="LayerNorm towers become RMSNorm towers; without it they are not rotated"),
    Option("rotation", True, kind=bool, help="residual stream and value heads are rotated"),
    Option("online_hadamard", True, kind=bool, help="online Hadamard in front of fc2 and down_proj"),
    Option("online_out_hadamard", False, kind=bool, help="QuaRot's online Hadamard across heads before each o_proj"),
)
"""The switches of ``rotation_steps``."""


def rotation_steps(recipe: Recipe) -> list[Step]:
    """The exact transforms of a rotation method, in order.

    Each switch of ``OPTIONS`` turns its steps on or off; norm affines are always fused.
    """
    on = {option.name: recipe.options.get(option.name, option.default) for option in OPTIONS}
    switches: tuple[tuple[str, Step], ...] = (
        ("ln2rms", layernorm_to_rmsnorm),
        ("rotation", rotate_residual),
        ("rotation", rotate_values),
        ("online_hadamard", attach_online_hadamard),
        ("online_out_hadamard", attach_out_hadamard),
    )
    return [fuse_norms, *(step for key, step in switches if on[key])]


def rotated_kv_steps(recipe: Recipe) -> tuple[Step, ...]:
    """KV-cache quantization behind online Hadamards of queries and keys, unless ``online_hadamard`` is off."""
    return kv_cache_steps(recipe, rotate=bool(recipe.options.get("online_hadamard", True)))


@torch.no_grad()
def rotate_residual(session: Session) -> None:
    """Rotates each tower's residual stream by Q = diag(random signs) H, signs drawn from ``recipe.seed``.

    Readers take W Q (per chunk where they concatenate vectors), writers Q^T W and Q^T b, embeddings and position tables
    rotate their columns. The projector's last linear writes the LLM's stream, so its output takes the LLM's rotation.
    Norms that write a stream (paper A.14, Fig. 10) change the basis behind their affine by a fast Hadamard transform.
    A tower that still has LayerNorm is left as it is: mean subtraction does not commute with Q.

    Raises:
        LayoutError: the residual width has no Hadamard matrix.
    """
    untie_head(session)
    for tower in session.layout.towers:
        if is_rotatable(session, tower):
            _rotate_tower(session, tower)


@torch.no_grad()
def rotate_values(session: Session) -> None:
    """Hadamard of size head_dim on every value head and, to undo it, on each head of the output projection's input.

    Attention weights mix tokens, not channels, so the transform passes through; under GQA every query head of a group
    reads the same rotated value head.

    Raises:
        LayoutError: head_dim has no Hadamard matrix.
    """
    for attention in session.layout.attentions:
        _rotate_heads(session, attention)


@torch.no_grad()
def attach_online_hadamard(session: Session) -> None:
    """Online Hadamard on the input of each block's last linear (vision fc2, LLM down_proj), W <- W H^T.

    Deterministic, without signs, so that output row 0 of H is the scaled mean (RMS, Eq. 8). Widths without a Hadamard
    matrix are padded with zeros (4304 -> 4320, 13696 -> 13824).
    """
    for tower in session.layout.towers:
        for path in (path for block in tower.blocks for path in block.paths):
            _attach(session, path.mlp_out, OnlineHadamard(session.linears[path.mlp_out].in_features))


@torch.no_grad()
def attach_out_hadamard(session: Session) -> None:
    """QuaRot's online Hadamard across heads on the input of every attention's output projection.

    With ``rotate_values`` it makes H_heads (x) H_head_dim over the whole width.
    """
    for tower in session.layout.towers:
        for attention in (path.attention for block in tower.blocks for path in block.paths):
            _attach(session, attention.out, HeadHadamard(attention.num_heads, attention.head_dim))


def residual_rotation(hidden_size: int, part: Part, seed: int) -> VectorMap:
    """The map x -> x diag(signs) H of a tower's stream.

    Raises:
        LayoutError: ``hidden_size`` has no Hadamard matrix.
    """
    _require_hadamard(hidden_size, f"the residual width of the {part} tower")
    signs = rotation_signs(hidden_size, part, seed)
    return lambda x: hadamard_transform(x * signs.to(x.device))


def rotation_signs(hidden_size: int, part: Part, seed: int) -> Tensor:
    """The random signs of a tower's rotation, (hidden_size,) float64.

    Each part has a stream of its own: leaving a tower out must not change another's.
    """
    generator = torch.Generator().manual_seed(2 * seed + (part is Part.TEXT))
    return torch.randint(0, 2, (hidden_size,), generator=generator).double() * 2 - 1


def _rotate_tower(session: Session, tower: Tower) -> None:
    rotation = residual_rotation(tower.hidden_size, tower.part, session.recipe.seed)
    for reader in tower.readers:
        map_reader(session, reader, rotation)
    for name in tower.writers:
        map_writer(session, name, rotation)
    signs = rotation_signs(tower.hidden_size, tower.part, session.recipe.seed)
    for norm in tower.norms:
        module = session.model.get_submodule(norm.name)
        if isinstance(module, CentredNorm):
            chunks = module.direction.double().view(-1, tower.hidden_size)
            module.direction = rotation(chunks).flatten().to(module.direction.dtype)
        elif isinstance(module, AffineNorm):
            _rotate_affine_norm(module, signs)
    if tower.entry_norm is not None:
        _rotate_affine_norm(session.model.get_submodule(tower.entry_norm), signs)


def _rotate_affine_norm(module: nn.Module, signs: Tensor) -> None:
    """From now on the norm writes in the rotated basis."""
    assert isinstance(module, AffineNorm)
    signs = signs.to(module.gain.device)
    module.gain = (module.gain * signs).to(module.gain.dtype)
    module.shift = hadamard_transform(module.shift.double() * signs).to(module.shift.dtype)
    module.rotate = True


def _rotate_heads(session: Session, attention: Attention) -> None:
    _require_hadamard(attention.head_dim, f"head_dim of '{attention.out}'")
    value = session.linears[attention.value]
    rows = attention.value_index
    weight = value.weight.detach().clone()
    weight[rows] = _per_head(weight[rows].T, attention.head_dim).T
    set_parameter(value, "weight", weight)
    if value.bias is not None:
        bias = value.bias.detach().clone()
        bias[rows] = _per_head(bias[None, rows], attention.head_dim)[0]
        set_parameter(value, "bias", bias)
    map_input(session.linears[attention.out], hadamard_transform, attention.num_heads)


def _per_head(rows: Tensor, head_dim: int) -> Tensor:
    """Transforms each head. Shapes: (rows, heads * head_dim) -> the same."""
    return map_rows(rows, lambda x: hadamard_transform(x.unflatten(-1, (-1, head_dim)).contiguous()).flatten(-2))


def _attach(session: Session, name: str, transform: OnlineHadamard | HeadHadamard) -> None:
    linear = session.linears[name]
    if linear.input_transform is not None:
        raise LayoutError(f"'{name}' already has an online transform; attach it once")
    map_input(linear, transform)
    linear.input_transform = transform


def _require_hadamard(n: int, what: str) -> None:
    if padded_size(n) != n:
        raise LayoutError(f"{what} is {n}, for which no Hadamard matrix is known; the next size is {padded_size(n)}")
