"""``mqbench models check``: the proofs of one, several or all families, and a table of what came of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mqbench.harness import discover
from mqbench.harness.errors import MissingWeightsError
from mqbench.harness.listing import PIPE_WIDTH, warn_of_broken
from mqbench.harness.models.check import Outcome, Proof, check_layout, outcome_of, proofs
from mqbench.harness.models.family import Family

ALL = "all"
SHAPES = "shapes"
Outcomes = Mapping[str, Sequence[Outcome]]
"""By what was checked: a family, or a registered model."""


def run_checks(name: str, models_dir: Path | None, every: bool) -> bool:
    """Runs the proofs and prints a table.

    Args:
        name: A family, a registered model, or ``all``: every family.
        models_dir: The user's folder of weights; a model's config.json there is checked too.
        every: One line per proof; otherwise one per kind of proof, and one per proof that fails.

    Returns:
        Whether everything is as it should be.

    Raises:
        UnknownNameError: neither a family nor a registered model.
        PluginError: the model's family is broken or missing.
    """
    registry = discover.all_families()
    if name == ALL:
        wanted = {found: list(proofs(family)) for found, family in registry.found.items()}
        warn_of_broken(registry.broken)
    else:
        wanted = {name: list(proofs_of(name, models_dir))}
    outcomes = _run(wanted, Console(stderr=True))
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    console.print(table_of(outcomes, every), markup=False)
    failed = sum(not outcome.ok for found in outcomes.values() for outcome in found)
    total = sum(map(len, outcomes.values()))
    print(f"{failed} of {total} proofs fail" if failed else f"all {total} proofs hold")
    return not failed and not (name == ALL and registry.broken)


def proofs_of(name: str, models_dir: Path | None) -> Iterator[Proof]:
    """The proofs of a family, or those that concern a registered model.

    Raises:
        UnknownNameError: neither a family nor a registered model.
        PluginError: the model's family is broken or missing.
    """
    families = discover.all_families()
    if name in families.found:
        yield from proofs(families.found[name])
        return
    family = discover.family_of(name)
    others = {size: config for size, config in family.configs.items() if size == name}
    yield from proofs(replace(family, configs=others))
    folder = discover.find_model(name).find_weights(models_dir)
    if folder is not None:
        yield Proof(f"files {name}", partial(_files, family, folder))


def table_of(outcomes: Outcomes, every: bool) -> Table:
    """The outcomes: what was checked, how many proofs hold, what was seen or is wrong."""
    table = Table("checked", "proof", "holds", "seen")
    for checked, found in outcomes.items():
        for row in _each(found) if every else _by_kind(found):
            table.add_row(checked, *row)
    return table


def _run(wanted: Mapping[str, Sequence[Proof]], notes: Console) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=notes, disable=not notes.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=sum(map(len, wanted.values())))
        for checked, found in wanted.items():
            for proof in found:
                bar.update(task, description=f"{checked}: {proof.name}")
                outcomes.setdefault(checked, []).append(_outcome(proof))
                bar.advance(task)
    return outcomes


def _outcome(proof: Proof) -> Outcome:
    # A family runs foreign code, which can fail in any way: what comes out is told, and the other proofs go on.
    try:
        return outcome_of(proof)
    except Exception as error:
        return Outcome(proof.name, False, " ".join(f"{type(error).__name__}: {error}".split()))


def _each(found: Sequence[Outcome]) -> Iterator[tuple[str, str, str]]:
    for outcome in found:
        yield outcome.name, "yes" if outcome.ok else "NO", outcome.detail


def _by_kind(found: Sequence[Outcome]) -> Iterator[tuple[str, str, str]]:
    kinds = dict.fromkeys(outcome.name.split()[0] for outcome in found)
    for kind in kinds:
        same = [outcome for outcome in found if outcome.name.split()[0] == kind]
        held = [outcome for outcome in same if outcome.ok]
        about = dict.fromkeys(outcome.name.split()[1] for outcome in held if " " in outcome.name)
        seen = ", ".join(about) if len(same) > 1 else " ".join(outcome.detail for outcome in held)
        yield kind, f"{len(held)} of {len(same)}", seen
        yield from _each([outcome for outcome in same if not outcome.ok])


def _files(family: Family, folder: Path) -> str:
    """A model built from the folder's own config.json, on the meta device, agrees with the layout."""
    config_class: Any = type(family.tiny_config())
    try:
        config = config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MissingWeightsError(f"config.json of '{folder}' cannot be read ({error}); get it again") from None
    with torch.device("meta"):
        model = family.build(config)
    check_layout(family.layout(model), model)
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e9:.3g} billion parameters in '{folder}'"
