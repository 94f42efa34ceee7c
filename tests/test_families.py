"""Every registered family passes every proof; a layout that lies is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mqbench.harness import discover
from mqbench.harness.errors import LayoutError
from mqbench.harness.models.check import Proof, check_shapes, outcome_of, proofs
from mqbench.harness.models.family import Family, tiny_model
from mqbench.harness.quant.layout import Layout, Tower

FAMILIES: dict[str, Family] = discover.all_families().found
PROOFS = [(name, proof) for name, family in FAMILIES.items() for proof in proofs(family)]


@pytest.mark.parametrize("proof", [pytest.param(proof, id=f"{name}: {proof.name}") for name, proof in PROOFS])
def test_proof(proof: Proof) -> None:
    outcome = outcome_of(proof)
    assert outcome.ok, outcome.detail


def _vision(change: Callable[[Tower], Tower]) -> Callable[[Layout], Layout]:
    def apply(layout: Layout) -> Layout:
        assert layout.vision is not None
        return replace(layout, vision=change(layout.vision))

    return apply


LIES: dict[str, Callable[[Layout], Layout]] = {
    "centred although read without a norm": _vision(lambda tower: replace(tower, exits=())),
    "no entry norm": _vision(lambda tower: replace(tower, entry_norm=None)),
    "a linear is forgotten": lambda layout: replace(layout, projector=layout.projector[:1]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_layout_that_lies_fails(lie: str) -> None:
    """LLaVA's vision tower needs its entry norm and its exit without a norm."""
    true = FAMILIES["llava"]
    family = replace(true, layout=lambda model: LIES[lie](true.layout(model)), configs={})
    wanted = [proof for proof in proofs(family) if "exact" in proof.name or proof.name == "names"]
    assert not all(outcome_of(proof).ok for proof in wanted)


def test_wrong_widths_are_named() -> None:
    family = FAMILIES["internvl"]
    model = tiny_model(family, torch.float32)
    layout = family.layout(model)
    assert layout.vision is not None
    wrong = replace(layout, vision=replace(layout.vision, hidden_size=16))
    with pytest.raises(LayoutError, match=r"'model\.vision_tower.*' is 32, but the layout makes it 16"):
        check_shapes(wrong, model)
