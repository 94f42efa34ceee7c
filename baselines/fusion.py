"""Exact removal of what stands between a residual stream and its rotation: norm affines and LayerNorm's mean.

Every step computes in float64, casts back to the parameter's dtype, and leaves the model's function unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.layout import Norm, NormKind, NormPlace, Reader, Tower
from mqbench.harness.quant.session import Session
from mqbench.harness.quant.transforms import AffineNorm, CentredNorm, RMSNorm

VectorMap = Callable[[Tensor], Tensor]
"""A linear map of the last dimension of a float64 tensor."""

ROWS_PER_BLOCK = 8192
"""Rows turned into float64 at a time: an embedding of 152k rows would otherwise need several GB."""


def map_rows(matrix: Tensor, function: VectorMap) -> Tensor:
    """Applies ``function`` to every row in float64. Shapes: (rows, n) -> (rows, m), in the dtype of ``matrix``."""
    blocks = matrix.detach().split(ROWS_PER_BLOCK)
    return torch.cat([function(block.double()).to(matrix.dtype) for block in blocks])


def map_input(module: nn.Module, function: VectorMap, chunks: int = 1) -> None:
    """Maps the input side of a linear's weight, each of ``chunks`` consecutive input vectors alike.

    With an orthogonal ``function`` T, the linear then answers to inputs T(x) as it did to x.
    """
    weight = weight_of(module)
    rows = weight.reshape(weight.shape[0] * chunks, -1)
    set_parameter(module, "weight", map_rows(rows, function).reshape(weight.shape[0], -1))


def map_reader(session: Session, reader: Reader, function: VectorMap) -> None:
    """``map_input`` for everything that reads a stream, also with the channels of its vectors standing together."""
    module = session.model.get_submodule(reader.name)
    if not reader.channels_first:
        map_input(module, function, reader.chunks)
        return
    weight = weight_of(module)
    vectors = weight.reshape(weight.shape[0], -1, reader.chunks).transpose(1, 2)
    mapped = map_rows(vectors.reshape(-1, vectors.shape[-1]), function).reshape(vectors.shape)
    set_parameter(module, "weight", mapped.transpose(1, 2).reshape(weight.shape).contiguous())


def map_writer(session: Session, name: str, function: VectorMap) -> None:
    """``map_output`` for a module, or, where ``name`` is a parameter's or buffer's, its last dimension."""
    parent, _, attribute = name.rpartition(".")
    owner = session.model.get_submodule(parent)
    own = getattr(owner, attribute, None)
    if isinstance(own, nn.Module):
        map_output(own, function)
    elif isinstance(own, Tensor):
        mapped = map_rows(own.reshape(-1, own.shape[-1]), function).reshape(own.shape)
        setattr(owner, attribute, nn.Parameter(mapped, False) if isinstance(own, nn.Parameter) else mapped)
    else:
        raise LayoutError(f"'{name}' is neither a module nor a tensor, so it cannot write a residual stream")


def map_output(module: nn.Module, function: VectorMap) -> None:
    """Maps what a module writes: columns of an embedding, output channels and bias of a linear or convolution."""
    weight = weight_of(module)
    if isinstance(module, nn.Embedding):
        set_parameter(module, "weight", map_rows(weight, function))
        return
    columns = map_rows(weight.flatten(1).T, function)
    set_parameter(module, "weight", columns.T.reshape(weight.shape).contiguous())
    bias = getattr(module, "bias", None)
    if bias is not None:
        set_parameter(module, "bias", map_rows(bias[None], function)[0])


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear, convolution or embedding, outside autograd.

    Raises:
        LayoutError: the module has none, so it neither reads nor writes a residual stream.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise LayoutError(
            f"a {type(module).__name__} has no weight to transform; name a linear, convolution or embedding"
        )
    return weight.detach()


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replaces a parameter by a new tensor, so that tied or shared storage is never written to."""
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def untie_head(session: Session) -> None:
    """Gives a language-model head that shares the embedding's tensor its own copy.

    Needed before the head is fused or rotated: the embedding takes another transform.
    """
    text = session.layout.text
    written = [parameter for name in text.entry for parameter in _parameters(session, name)]
    for reader in _modules(session, tuple(reader.name for reader in text.readers)):
        if any(parameter is reader.weight for parameter in written):
            set_parameter(reader, "weight", weight_of(reader).clone())
    config = getattr(session.model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False  # or saving and loading would tie them again


@torch.no_grad()
def fold_layer_scales(session: Session) -> None:
    """Moves each LayerScale into the linears in front of it: W <- diag(lambda) W, b <- lambda b; lambda is then one."""
    for tower in session.layout.towers:
        for name, writers in (scale for block in tower.blocks for scale in block.scales):
            factors = session.model.get_parameter(name).detach().double()
            for writer in _modules(session, writers):
                map_output(writer, _scaling(factors))
            map_writer(session, name, torch.ones_like)


@torch.no_grad()
def fuse_norms(session: Session) -> None:
    """Moves LayerScales into their writers, and each norm's gain and bias into its readers: W <- W diag(gamma),
    b <- b + W beta.

    A reader of ``chunks`` concatenated vectors takes gamma and beta once per chunk; a missing bias is created. RMSNorms
    become affine-free ``RMSNorm`` modules; LayerNorms keep their kind with gains of one and biases of zero. Norms that
    write the stream (behind branches, in front of block 0) have no reader to take their affine: they keep it.

    Raises:
        LayoutError: a norm of a tower is not of the declared kind.
    """
    untie_head(session)
    fold_layer_scales(session)
    for tower in session.layout.towers:
        for norm in tower.stream_norms:
            _fuse_norm(session, tower, norm)


@torch.no_grad()
def layernorm_to_rmsnorm(session: Session) -> None:
    """Replaces every LayerNorm by a norm that commutes with rotations of what it reads or writes; needs ``fuse_norms``.

    LayerNorm without affine is RMSNorm of the centred input, so each writer of a residual stream (patch embedding and
    its bias included) is centred over its OUTPUT dimension (paper Sec. 3.3; SliceGPT's identity). Where somebody reads
    the stream's mean, as no norm stands between (LLaVA, Qwen-VL) or one over several vectors (InternVL), writers stay
    as they are and each norm takes the mean out itself. Behind branches (paper A.14) it is the branch's last linear
    that is centred, and the norm keeps its affine. Towers built with RMSNorm are left alone: subtracting a mean there
    would change the function.

    Raises:
        LayoutError: a LayerNorm still has its affine, or a stream that begins with a norm is not read as it is.
    """
    for tower in session.layout.towers:
        if tower.norm_kind is not NormKind.LAYERNORM:
            continue
        if tower.norm_place is NormPlace.POST:
            _convert_post_norms(session, tower)
        else:
            _convert_pre_norms(session, tower)
        if tower.entry_norm is not None:
            _replace_by_affine_norm(session, tower.entry_norm, tower.hidden_size, centre=True)


def is_rotatable(session: Session, tower: Tower) -> bool:
    """Every norm of the tower commutes with an orthogonal change of basis of its stream."""
    names = [norm.name for norm in tower.norms] + ([tower.entry_norm] if tower.entry_norm else [])
    return all(isinstance(session.model.get_submodule(name), RMSNorm | CentredNorm | AffineNorm) for name in names)


def _convert_pre_norms(session: Session, tower: Tower) -> None:
    if not tower.keeps_mean:
        if tower.entry_norm is not None:
            raise LayoutError(
                f"'{tower.entry_norm}' begins a stream that ends in a norm; this order is not covered yet"
            )
        for writer in dict.fromkeys(tower.writers):
            map_writer(session, writer, _centre)
    for norm in tower.norms:
        eps, like = _affine_free_epsilon(session, norm), _parameters(session, norm.name)
        width = tower.hidden_size * (norm.chunks if norm.joint else 1)
        new = _as_wide(CentredNorm(width, eps), like) if tower.keeps_mean else RMSNorm(eps)
        _set_module(session, norm.name, new)


def _convert_post_norms(session: Session, tower: Tower) -> None:
    for writer in _modules(session, tuple(name for block in tower.blocks for name in block.writers)):
        map_output(writer, _centre)
    for norm in tower.norms:
        _replace_by_affine_norm(session, norm.name, tower.hidden_size, centre=False)


def _replace_by_affine_norm(session: Session, name: str, width: int, centre: bool) -> None:
    old: nn.Module = session.model.get_submodule(name)
    new = _as_wide(AffineNorm(width, _epsilon(old, name), centre), _parameters(session, name))
    for own, theirs in (("gain", "weight"), ("shift", "bias")):
        if isinstance(getattr(old, theirs, None), Tensor):
            getattr(new, own).copy_(getattr(old, theirs))
    _set_module(session, name, new)


def _fuse_norm(session: Session, tower: Tower, norm: Norm) -> None:
    module = session.model.get_submodule(norm.name)
    gain, shift = getattr(module, "weight", None), getattr(module, "bias", None)
    for reader in _modules(session, norm.readers):
        if shift is not None:
            _add_to_bias(reader, shift.double().repeat(norm.affine_repeats))
        if gain is not None:
            map_input(reader, _scaling(gain.double()), norm.affine_repeats)
    eps = _epsilon(module, norm.name)
    if tower.norm_kind is NormKind.RMSNORM:
        _set_module(session, norm.name, RMSNorm(eps))
    elif isinstance(module, nn.LayerNorm):
        _reset_affine(module)
    else:
        raise LayoutError(f"'{norm.name}' is a {type(module).__name__}, but its tower declares LayerNorm")


def _reset_affine(module: nn.LayerNorm) -> None:
    # Neutral parameters, not none at all: a saved model then differs from the float one in tensors alone.
    for name, parameter in list(module.named_parameters(recurse=False)):
        set_parameter(module, name, torch.full_like(parameter, float(name == "weight")))


def _add_to_bias(reader: nn.Module, shift: Tensor) -> None:
    """b <- b + W shift. Shapes: shift (in_features,) float64."""
    weight, old = weight_of(reader), getattr(reader, "bias", None)
    bias = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for start in range(0, len(bias), ROWS_PER_BLOCK):
        rows = slice(start, start + ROWS_PER_BLOCK)
        bias[rows] = weight[rows].double() @ shift.to(weight.device)
    if old is not None:
        bias += old.detach().double()
    set_parameter(reader, "bias", bias.to(weight.dtype))


def _as_wide(module: nn.Module, like: list[nn.Parameter]) -> nn.Module:
    """On the device of a norm's parameters, in their dtype, but at least float32."""
    return module.to(like[0].device, torch.promote_types(like[0].dtype, torch.float32)) if like else module


def _affine_free_epsilon(session: Session, norm: Norm) -> float:
    module = session.model.get_submodule(norm.name)
    gain, shift = getattr(module, "weight", None), getattr(module, "bias", None)
    if (gain is not None and (gain != 1).any()) or (shift is not None and shift.any()):
        raise LayoutError(f"'{norm.name}' still has its affine map; run fuse_norms before layernorm_to_rmsnorm")
    return _epsilon(module, norm.name)


def _epsilon(module: nn.Module, name: str) -> float:
    for attribute in ("eps", "variance_epsilon"):
        if isinstance(getattr(module, attribute, None), float):
            return getattr(module, attribute)
    raise LayoutError(f"'{name}' is a {type(module).__name__} without a known epsilon, so it is no norm we can replace")


def _scaling(gain: Tensor) -> VectorMap:
    return lambda x: x * gain.to(x.device)


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _modules(session: Session, names: tuple[str, ...]) -> list[nn.Module]:
    """The named modules, each once (a stream may list a module as entry and as writer)."""
    return [session.model.get_submodule(name) for name in dict.fromkeys(names)]


def _parameters(session: Session, name: str) -> list[nn.Parameter]:
    """Of a module, or the parameter itself."""
    found = [parameter for key, parameter in session.model.named_parameters(remove_duplicate=False) if key == name]
    return found or list(session.model.get_submodule(name).parameters(recurse=False))


def _set_module(session: Session, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(session.model.get_submodule(parent), attribute, module)
