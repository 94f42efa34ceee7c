"""Reports of the kernels' benchmark against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fakes.kernel_bench import CASE, make_record
from mqbench.harness.bench import spec
from mqbench.harness.bench.catalog import CONTENDERS
from mqbench.harness.bench.command import DATA, MARKDOWN, write_report
from mqbench.harness.bench.report import Report, reports
from mqbench.harness.bench.run import store_in
from mqbench.harness.bench.spec import Case, Target
from mqbench.harness.cli import main
from mqbench.harness.record import Record

GOLDEN = Path(__file__).parent / "golden"
PEAK = Case("kernel_peaks", "made-up", "device", 1, {"side": 8, "copy_mib": 1})
GIGA, TERA = 1e9, 1e12

Times = tuple[Sequence[float], float, float]


ALPHA_PEAKS: Mapping[str, Times] = {
    "copy": ([1.0, 1.0, 1.0], 2 * GIGA, 0),  # 2 GB in 1 ms: 2000 GB/s
    "bf16_matmul": ([2.0, 2.0, 2.0], GIGA, TERA),  # 500 TFLOP/s
    "int8_matmul": ([2.0, 2.0, 2.0], GIGA, 1.6 * TERA),  # 800 TOP/s
    "int8_linear": ([1.0, 1.0, 1.0], GIGA, TERA),  # 1000 TOP/s, the better one
}


def linear(rows: int, name: str = "llm.down") -> Case:
    return Case("kernel_linear", "made-up", name, rows, {"n": 8, "k": 16, "bias": 0})


def alpha() -> list[Record]:
    """A GPU with peaks: targets of all three verdicts."""
    make = partial(make_record, "Alpha 100")
    gemv = {
        "bf16": ([2.0, 4.0, 9.0], 4 * GIGA, TERA / 1000),
        "w4a8": ([1.0, 1.0, 3.0], GIGA, TERA / 1000),  # ratios 2, 4, 3; 1 GB in 1 ms is half of the copy bandwidth
        "w4a16": ([0.5, 0.5, 0.5], 0.8 * GIGA, TERA / 1000),  # ratios 4, 8, 18; 80 % of the copy bandwidth
    }
    large = {
        "bf16": ([10.0, 10.0, 10.0], GIGA, 4 * TERA),  # 400 of 500 TFLOP/s
        "w8a8": ([5.0, 5.0, 5.0], GIGA, 4 * TERA),  # 800 of 1000 TOP/s
        "w4a8": ([8.0, 8.0, 8.0], GIGA, 4 * TERA),
        "fp8": ([8.0, 8.0, 8.0], GIGA, 4 * TERA),  # no measured peak of FP8
    }
    absent = {"fp8": "unavailable: this GPU has no FP8", "torchao": "unavailable: not installed"}
    return [
        make(PEAK, ALPHA_PEAKS, {"fp8_matmul": "unavailable: this GPU has no FP8"}),
        make(linear(1), gemv, absent),
        make(linear(1, "llm.gate_up"), {name: gemv[name] for name in ("bf16", "w4a16")}),
        make(
            linear(4096), large, {"w4a8_fused": "wrong: error 1, limit 0.01", "torchao": "unavailable: not installed"}
        ),
        make(linear(512), {"bf16": large["bf16"]}, {"w4a8_fused": "failed: RuntimeError: out of resource"}),
    ]


def beta() -> list[Record]:
    """A GPU whose peaks were not measured."""
    case = Case("kernel_hadamard", "made-up", "5120", 2048, {"k": 5120})
    timed = {"memcpy": ([0.01, 0.01, 0.01], GIGA / 50, 0), "hadamard": ([0.0125, 0.0125, 0.0125], GIGA / 50, 0)}
    return [make_record("Beta | 200", case, timed, {"fast_hadamard": "unavailable: not installed"})]


@pytest.fixture
def report() -> Report:
    return reports(alpha())[0]


def entry_of(report: Report, rows: int, name: str) -> Any:
    return next(e for e in report.entries if (e.task, e.rows, e.contender) == ("kernel_linear", rows, name))


def target_of(title: str) -> Target:
    return next(target for target in spec.targets() if target.title == title)


def test_ratio_is_the_median_over_rounds_not_of_medians(report: Report) -> None:
    entry = entry_of(report, 1, "w4a8")
    assert entry.ratio == 3.0 and entry.time_ms == 1.0  # 4 / 1 would be the ratio of the medians
    assert entry.iqr_ms == pytest.approx(1.0)  # of 1, 1, 3: quartiles 1 and 2


def test_peaks_are_the_best_of_a_unit(report: Report) -> None:
    assert report.copy_bytes_per_ms == 2 * GIGA
    assert report.peak_ops_per_ms(CONTENDERS["bf16"].rate) == TERA / 2
    assert report.peak_ops_per_ms(CONTENDERS["w8a8"].rate) == TERA
    assert report.peak_ops_per_ms(CONTENDERS["fp8"].rate) is None


@pytest.mark.parametrize(
    ("rows", "name", "floor_ms", "percent"),
    [
        (1, "w4a8", 0.5, 50.0),  # bytes: 1 GB at 2 GB per ms
        (1, "w4a16", 0.4, 80.0),
        (4096, "bf16", 8.0, 80.0),  # arithmetic: 4 T at 0.5 T per ms
        (4096, "w8a8", 4.0, 80.0),  # 4 T at 1 T per ms
        (4096, "fp8", None, None),
    ],
)
def test_roofline_and_percent_of_peak(
    report: Report, rows: int, name: str, floor_ms: float | None, percent: float | None
) -> None:
    entry = entry_of(report, rows, name)
    assert report.floor_ms(entry) == (None if floor_ms is None else pytest.approx(floor_ms))
    assert report.percent_of_peak(entry) == (None if percent is None else pytest.approx(percent))


@pytest.mark.parametrize(
    ("title", "state", "worst", "places"),
    [
        ("int8 GEMM", "met", 2.0, 1),
        ("W4A8, unpacking included", "missed", 1.25, 1),
        ("W4A8 at any number of rows", "met", 1.25, 2),
        ("GEMV W4A8, bandwidth", "missed", 50.0, 1),
        ("GEMV W4A16, bandwidth", "met", 80.0, 2),
        ("GEMV W4A8", "met", 3.0, 1),
        ("fused W4A8", "missed", None, 1),  # it failed where it was wanted; what happened outside does not count
        ("Hadamard against memcpy", "not measured", None, 0),
    ],
)
def test_verdicts(report: Report, title: str, state: str, worst: float | None, places: int) -> None:
    verdict = report.verdict(target_of(title))
    assert (verdict.state, verdict.places) == (state, places)
    assert verdict.worst == (None if worst is None else pytest.approx(worst))
    assert bool(verdict.missed) == (state == "missed")


def test_costs_are_the_reverse_of_speedups() -> None:
    found = reports(beta())[0]
    verdict = found.verdict(target_of("Hadamard against memcpy"))
    assert verdict.state == "met" and verdict.worst == pytest.approx(1.25)
    assert found.verdict(target_of("Hadamard against fast-hadamard-transform")).state == "not measured"


def test_reports_take_the_newest_code_and_the_most_rounds() -> None:
    def at(time_ms: float, rounds: int, version: str) -> Record:
        return make_record("Alpha 100", CASE, {"bf16": ([time_ms] * rounds, 1, 1)}, version=version)

    old, full, quick = at(1.0, 9, "1-old"), at(2.0, 5, "1-new"), at(3.0, 2, "1-new")
    (found,) = reports([old, full, quick])
    assert found.version == "1-new" and [entry.time_ms for entry in found.entries] == [2.0]
    assert reports([make_record("cpu", CASE, {"bf16": ([1.0, 1.0], 1, 1)})]) == []


def test_rendered_report(tmp_path: Path) -> None:
    """Two GPUs; shares of peaks, all verdicts, a dash for what is missing."""
    write_report([*alpha(), *beta()], tmp_path)
    for name, golden in ((MARKDOWN, "kernels.md"), (DATA, "kernels.csv")):
        assert (tmp_path / name).read_text(encoding="utf-8") == (GOLDEN / golden).read_text(encoding="utf-8")


def test_without_records_nothing_is_claimed(tmp_path: Path) -> None:
    files = write_report([], tmp_path)
    text = (tmp_path / MARKDOWN).read_text(encoding="utf-8")
    assert "Nothing was measured" in text and text.count("| - | - | not measured |") == len(spec.targets())
    assert sorted(path.suffix for path in files) == [".csv", ".md", ".txt"]
    assert (tmp_path / DATA).read_text(encoding="utf-8").count("\n") == 1


def test_figure_has_speedups_and_rooflines_over_m(tmp_path: Path) -> None:
    files = {path.suffix: path for path in write_report(alpha(), tmp_path) if path.stem == "kernels_speedup"}
    assert set(files) == {".png", ".svg", ".csv", ".txt"}
    data = [line.split(",") for line in files[".csv"].read_text(encoding="utf-8").splitlines()]
    assert data[0] == ["panel", "title", "series", "x", "y", "low"]
    found = {(row[2], float(row[3])): float(row[4]) for row in data[1:]}
    assert found["W8A8", 4096] == 2.0 and found["W4A8", 1] == 3.0
    assert found["roofline of W4A8", 1] == 4.0  # 4 GB over 1 GB
    assert found["roofline of W8A8", 4096] == 2.0  # 8 ms over 4 ms
    assert "Alpha 100" in files[".txt"].read_text(encoding="utf-8")


def test_report_renders_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_in(tmp_path / "records")
    store.prepare()
    for record in beta():
        store.append(record)
    assert main(["bench", "report", f"--out={tmp_path / 'records'}"]) == 0
    assert "Beta" in (tmp_path / "rendered" / MARKDOWN).read_text(encoding="utf-8")
    assert "files:" in capsys.readouterr().out
