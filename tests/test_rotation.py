"""Every transform alone, and all of them together, leave the float64 logits of a tiny Qwen2-VL unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fakes.sessions import logits, session_for, tiny_session
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines.fusion import fuse_norms, layernorm_to_rmsnorm, map_input, map_output, untie_head
from mqbench.baselines.rotation import (
    attach_online_hadamard,
    attach_out_hadamard,
    residual_rotation,
    rotate_residual,
    rotate_values,
)
from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.session import Session, Step
from mqbench.harness.quant.transforms import RMSNorm

CHAINS: dict[str, tuple[Step, ...]] = {
    "untie": (untie_head,),
    "fuse": (fuse_norms,),
    "rmsnorm": (fuse_norms, layernorm_to_rmsnorm),
    "rotate_text_only": (fuse_norms, rotate_residual),
    "rotate": (fuse_norms, layernorm_to_rmsnorm, rotate_residual),
    "values": (rotate_values,),
    "online": (attach_online_hadamard,),
    "out": (attach_out_hadamard,),
    "values_out": (rotate_values, attach_out_hadamard),
    "all": (
        fuse_norms, layernorm_to_rmsnorm, rotate_residual, rotate_values, attach_online_hadamard, attach_out_hadamard,
    ),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_do_not_change(name: str, seed: int, tied: bool) -> None:
    session, batch, expected = tiny_session(seed, tied)
    before = {key: value.clone() for key, value in session.model.state_dict().items()}
    for step in CHAINS[name]:
        step(session)
    error = (logits(session.model, batch) - expected).abs().max()
    assert error < 1e-9 * expected.abs().max()
    changed = any(
        key not in before or before[key].shape != value.shape or not torch.equal(before[key], value)
        for key, value in session.model.state_dict().items()
    )
    assert changed == (name != "untie")


def test_text_only_batch_does_not_change() -> None:
    session, _, _ = tiny_session()
    batch = tiny_batch(session.model, text_rows=2)
    expected = logits(session.model, batch)
    for step in CHAINS["all"]:
        step(session)
    assert torch.allclose(logits(session.model, batch), expected, atol=1e-9, rtol=0)


def test_widths_without_a_hadamard_are_padded() -> None:
    model = tiny_model(torch.float64)
    fc1, fc2 = (nn.Linear(32, 67, dtype=torch.float64), nn.Linear(67, 32, dtype=torch.float64))
    mlp = model.get_submodule("model.visual.blocks.0.mlp")
    mlp.fc1, mlp.fc2 = fc1, fc2
    batch = tiny_batch(model)
    expected = logits(model, batch)
    session = session_for(model, tiny_layout(model))
    attach_online_hadamard(session)
    assert session.linears["model.visual.blocks.0.mlp.fc2"].in_features > 67
    assert torch.allclose(logits(model, batch), expected, atol=1e-9, rtol=0)


def test_norms_become_affine_free_rmsnorms_that_compute_in_float32() -> None:
    session, _, _ = tiny_session()
    for step in CHAINS["rmsnorm"]:
        step(session)
    norms = [session.model.get_submodule(norm.name) for tower in session.layout.towers for norm in tower.norms]
    assert all(isinstance(norm, RMSNorm) and not list(norm.parameters()) for norm in norms)
    x = torch.full((1, 512), 200.0, dtype=torch.float16)  # the squares overflow float16
    assert torch.equal(norms[0](x), torch.ones_like(x))


def test_untying_keeps_the_embedding_and_forbids_tying_again() -> None:
    session, _, _ = tiny_session(tied=True)
    model = session.model
    embedding = model.get_input_embeddings().weight.detach().clone()
    fuse_norms(session)
    model.tie_weights()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding)


def test_subtracting_the_embedding_mean_of_an_rmsnorm_llm_would_not_be_exact() -> None:
    """The known trap: the tiny model is sensitive to it, so the tests above would notice."""
    session, batch, expected = tiny_session()
    map_output(session.model.get_input_embeddings(), lambda x: x - x.mean(-1, keepdim=True))
    assert (logits(session.model, batch) - expected).abs().max() > 1e-2


def test_the_stream_is_really_rotated() -> None:
    """The residual stream equals the old one times Q, which a sign or transpose mistake on both sides would hide."""
    session, batch, _ = tiny_session(seed=3)
    fuse_norms(session)
    layernorm_to_rmsnorm(session)
    before = _stream(session, batch)
    rotate_residual(session)
    after = _stream(session, batch)
    for part in (Part.VISION, Part.TEXT):
        rotation = residual_rotation(before[part].shape[-1], part, seed=3)
        assert torch.allclose(after[part], rotation(before[part]), atol=1e-9)
        assert (after[part] - before[part]).abs().max() > 0.1


def test_rotation_follows_the_seed() -> None:
    maps = [residual_rotation(32, Part.TEXT, seed)(torch.eye(32, dtype=torch.float64)) for seed in (0, 0, 1)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    assert not torch.equal(maps[0], residual_rotation(32, Part.VISION, 0)(torch.eye(32, dtype=torch.float64)))
    assert torch.allclose(maps[0] @ maps[0].T, torch.eye(32, dtype=torch.float64), atol=1e-12)


def test_values_are_rotated_per_head() -> None:
    session, batch, _ = tiny_session()
    attention = session.layout.text.blocks[0].attention
    value = session.linears[attention.value]
    start, stop = attention.value_rows
    before = _outputs(session, value, batch)
    rotate_values(session)
    after = _outputs(session, value, batch)
    assert stop - start == attention.num_kv_heads * attention.head_dim
    norms = [x[..., start:stop].unflatten(-1, (-1, attention.head_dim)).norm(dim=-1) for x in (before, after)]
    assert torch.allclose(*norms, atol=1e-9)
    assert not torch.allclose(before, after, atol=1e-2)


def test_bfloat16_model_stays_close() -> None:
    """Computed in float64 and cast back once: the error is of the order of bfloat16's own rounding."""
    model = tiny_model(torch.float32)
    batch = tiny_batch(model)
    expected = logits(model, batch)
    rounded = tiny_model(torch.bfloat16)
    own = (logits(rounded, tiny_batch(rounded)).float() - expected).norm() / expected.norm()
    session = session_for(rounded, tiny_layout(rounded))
    for step in CHAINS["all"]:
        step(session)
    error = (logits(rounded, tiny_batch(rounded)).float() - expected).norm() / expected.norm()
    assert all(parameter.dtype is torch.bfloat16 for parameter in rounded.parameters())
    assert error < 3 * own


def test_errors_say_what_is_missing() -> None:
    session, _, _ = tiny_session()
    with pytest.raises(LayoutError, match="run fuse_norms before"):
        layernorm_to_rmsnorm(session)
    attach_online_hadamard(session)
    with pytest.raises(LayoutError, match="already has an online transform"):
        attach_online_hadamard(session)
    with pytest.raises(LayoutError, match="residual width of the text tower is 67"):
        residual_rotation(67, Part.TEXT, 0)


def test_map_input_repeats_per_chunk() -> None:
    linear = QuantLinear(torch.randn(3, 8, dtype=torch.float64), None, name="reader")
    gain = torch.randn(4, dtype=torch.float64)
    expected = linear.weight.detach() * gain.repeat(2)
    map_input(linear, lambda x: x * gain, chunks=2)
    assert torch.equal(linear.weight, expected)


def _stream(session: Session, batch: dict[str, torch.Tensor]) -> dict[Part, torch.Tensor]:
    """The input of each tower's final norm."""
    return {
        tower.part: _captured(session.model.get_submodule(tower.final_norm.name), lambda: logits(session.model, batch))
        for tower in session.layout.towers
    }


def _captured(module: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    run()
    handle.remove()
    return seen[0]


def _outputs(session: Session, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    logits(session.model, batch)
    handle.remove()
    return seen[0]
