"""The task catalog over all kinds of cells."""

from __future__ import annotations

import pytest

from mqbench.harness.datasets.catalog import TASKS
from mqbench.harness.errors import UnknownNameError
from mqbench.harness.tasks import TASK_INFOS, Needs, TaskKind, find_infos, task_info


def test_benchmarks_come_first_in_the_order_of_the_paper() -> None:
    assert list(TASK_INFOS)[: len(TASKS)] == list(TASKS)


def test_all_means_the_benchmarks_and_other_kinds_are_asked_for_by_name() -> None:
    assert [info.name for info in find_infos(["all"])] == list(TASKS)
    assert [info.name for info in find_infos(["eq9", "ALL", "textvqa"])] == [*TASKS, "eq9"]


def test_vlmevalkits_names_work_in_any_case() -> None:
    assert task_info("DocVQA_VAL").name == "docvqa"
    assert task_info(" WikiText2 ").name == "wikitext2"


def test_an_unknown_name_is_matched_against_every_kind() -> None:
    with pytest.raises(UnknownNameError, match="unknown task 'wikitext'; did you mean 'wikitext2'"):
        task_info("wikitext")


def test_only_perplexity_is_better_when_low() -> None:
    assert [info.name for info in TASK_INFOS.values() if not info.higher_is_better] == ["wikitext2"]
    assert task_info("wikitext2").needs is Needs.TEXT
    assert {info.kind for info in TASK_INFOS.values()} == set(TaskKind)
