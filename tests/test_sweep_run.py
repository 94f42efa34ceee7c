"""Records of sweeps: what they hold, resuming after a kill, failures, and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fakes.repository import ROOT
from fakes.sweep_runtime import FakeDevice, PlainMemory
from mqbench.harness.cli import main
from mqbench.harness.errors import RequestError
from mqbench.harness.record import Backend, Record
from mqbench.harness.runtime.systems import SYSTEMS
from mqbench.harness.store import RecordStore
from mqbench.harness.sweep import measure as measure_module
from mqbench.harness.sweep import run as run_module
from mqbench.harness.sweep.measure import Settings, measure_sequences
from mqbench.harness.sweep.model import STANDIN_FOLDER, find_sweep_model
from mqbench.harness.sweep.outcome import Outcome
from mqbench.harness.sweep.progress import complaints, outcome_text, results_table
from mqbench.harness.sweep.request import SweepRequest, resolve
from mqbench.harness.sweep.run import Job, device_label, jobs_of, missing, run_jobs, store_in
from mqbench.harness.sweep.spec import ATTENTION, CHECK, LATENCY, PAPER, SWEEPS, Point, points_of

SETTINGS = Settings("cpu", "float32", 0, find_sweep_model("standin-qwen2-vl", None, {}))
PAIR = ("bf16-eager", "mquant-w4a8")
SIDES = [56, 112, 168]


class FakeWorker:
    """Measures in this process with a made-up runtime."""

    def __init__(self, place: FakeDevice, interrupt: Callable[[Point], None] = lambda point: None) -> None:
        self.place, self.interrupt = place, interrupt
        self.points: list[Point] = []

    def __call__(self, settings: Settings) -> FakeWorker:
        return self

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def measure(self, point: Point) -> Outcome:
        self.points.append(point)
        self.interrupt(point)
        with patch.object(measure_module, "memory_of", lambda *devices: PlainMemory()):
            return measure_sequences(point, SETTINGS, {}, self.place.build)


def make_jobs(systems: tuple[str, ...] = PAIR, sweep: str = "turns") -> tuple[Job, ...]:
    return jobs_of(points_of(sweep, CHECK, {"image_px": SIDES, "turns": [1]}, systems, 1), SETTINGS)


def run(folder: Path, place: FakeDevice, jobs: tuple[Job, ...] | None = None) -> tuple[list[Record], FakeWorker]:
    jobs = make_jobs() if jobs is None else jobs
    store, worker = store_in(folder), FakeWorker(place)
    store.prepare()
    return run_jobs(missing(jobs, store), SETTINGS, store, lambda job, record: None, worker), worker


def test_record_of_a_point(tmp_path: Path) -> None:
    records, _ = run(tmp_path, FakeDevice())
    record = records[0]
    cell = record.cell
    assert (cell.task, cell.model, cell.device, cell.weights_sha256) == (
        "sweep_turns",
        "standin-qwen2-vl",
        "cpu",
        "random:0",
    )
    assert cell.recipe.options == {
        "image_px": 56,
        "images": 1,
        "text_tokens": 15,
        "text_before": 5,
        "text_step": 0,
        "batch": 1,
        "turns": 1,
        "decode_tokens": 4,
        "systems": "bf16-eager,mquant-w4a8",
    }
    assert (cell.backend, record.backend, cell.limit) == ("integer", Backend.REAL, 1)
    assert [(one.index, one.prediction) for one in record.samples] == [(name, "ok") for name in PAIR]
    assert record.score == record.samples[0].score == record.metrics["bf16-eager.total_ms"]
    assert record.environment["sweep"]["l2"] == "not controlled"
    assert store_in(tmp_path).path.name == "sweeps.jsonl"
    assert [one.to_json() for one in store_in(tmp_path).load()] == [one.to_json() for one in records]


def test_measured_points_are_not_measured_again(tmp_path: Path) -> None:
    run(tmp_path, FakeDevice())
    records, worker = run(tmp_path, FakeDevice())
    assert records == [] and worker.points == []


def test_other_settings_are_other_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, FakeDevice())
    store = store_in(tmp_path)
    for other in (
        points_of("turns", CHECK, {"image_px": SIDES, "turns": [1]}, PAIR, 2),
        points_of("turns", CHECK, {"image_px": SIDES, "turns": [1]}, PAIR[:1], 1),
        points_of("turns", CHECK, {"image_px": SIDES, "turns": [1], "decode_tokens": [5]}, PAIR, 1),
    ):
        assert len(missing(jobs_of(other, SETTINGS), store)) == 3
    monkeypatch.setattr(run_module, "code_version", lambda: "1-other")
    assert len(missing(make_jobs(), store)) == 3, "other kernels are measured anew"


def test_out_of_memory_is_recorded_and_not_tried_again(tmp_path: Path) -> None:
    records, _ = run(tmp_path, FakeDevice(capacity=5))
    assert [record.ok for record in records] == [False] * 3
    assert records[0].reason == "out of memory: bf16-eager, mquant-w4a8"
    assert records[0].metrics["visual_tokens"] == 4.0
    assert complaints(records) == [] and outcome_text(records[0]).startswith("out of memory")
    assert run(tmp_path, FakeDevice())[0] == []


def test_one_system_out_of_memory_is_a_note_of_an_ok_record(tmp_path: Path) -> None:
    place = FakeDevice(capacity=30, size_of=lambda name: 100 if name == "bf16-eager" else 10)
    records, _ = run(tmp_path, place)
    notes = {one.index: one.prediction for one in records[0].samples}
    assert records[0].ok and notes["bf16-eager"].startswith("out of memory: CUDA out of memory")
    assert records[0].score == records[0].metrics["mquant-w4a8.total_ms"], "the first that ran"
    assert complaints(records) == []
    assert run(tmp_path, FakeDevice())[0] == []


def test_inputs_that_do_not_fit_are_out_of_memory(tmp_path: Path) -> None:
    worker = FakeWorker(FakeDevice(), interrupt=lambda point: _raise(torch.OutOfMemoryError("CUDA out of memory")))
    store = store_in(tmp_path)
    store.prepare()
    records = run_jobs(make_jobs()[:1], SETTINGS, store, lambda job, record: None, worker)
    assert records[0].reason == "out of memory: CUDA out of memory"
    assert len(missing(make_jobs()[:1], store)) == 0


def test_failed_point_is_named_and_tried_again(tmp_path: Path) -> None:
    place = FakeDevice(failures={("build", name): ValueError("no such kernel") for name in PAIR})
    records, _ = run(tmp_path, place)
    assert records[0].reason == "bf16-eager, mquant-w4a8 failed: ValueError: no such kernel"
    assert len(complaints(records)) == 3
    again, _ = run(tmp_path, FakeDevice())
    assert [record.ok for record in again] == [True] * 3
    assert not missing(make_jobs(), store_in(tmp_path))


def test_failed_system_of_an_ok_point_is_complained_about(tmp_path: Path) -> None:
    place = FakeDevice(failures={("build", "mquant-w4a8"): ValueError("no such kernel")})
    records, _ = run(tmp_path, place)
    assert records[0].ok
    assert complaints(records)[0] == "sweep_turns, mquant-w4a8: failed: ValueError: no such kernel"


def test_broken_point_does_not_end_the_others(tmp_path: Path) -> None:
    worker = FakeWorker(FakeDevice(), lambda point: _raise(KeyError("x")) if point.work.image_px == 112 else None)  # type: ignore[union-attr]
    store = store_in(tmp_path)
    store.prepare()
    jobs = make_jobs()
    records = run_jobs(jobs, SETTINGS, store, lambda job, record: None, worker)
    assert [record.ok for record in records] == [True, False, True]
    assert "KeyError" in (tmp_path / "failures" / f"{jobs[1].cell.key}.txt").read_text()
    assert [job.point for job in missing(jobs, store)] == [jobs[1].point]


KILLED = """
    import os, sys, time
    from pathlib import Path
    sys.path.insert(0, os.environ["TESTS"])
    import test_sweep_run as tests

    folder = Path(sys.argv[1])
    def stop(point):
        if point.work.image_px == 112:
            (folder / "begun").touch()
            time.sleep(600)
    store = tests.store_in(folder)
    store.prepare()
    worker = tests.FakeWorker(tests.FakeDevice(), stop)
    tests.run_jobs(tests.make_jobs(), tests.SETTINGS, store, lambda job, record: None, worker)
"""


def test_killed_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    environment = os.environ | {"TESTS": str(ROOT / "tests")}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    path = store_in(tmp_path).path
    with path.open("ab") as stream:
        stream.write(b'{"half a rec')  # a kill can also hit a write
    with pytest.warns(UserWarning, match="half-written"):
        records, worker = run(tmp_path, FakeDevice())
    assert [point.work.image_px for point in worker.points] == [112, 168]  # type: ignore[union-attr]
    assert len(records) == 2 and not missing(make_jobs(), store_in(tmp_path))


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("profile", [PAPER, CHECK])
def test_specification_names_what_exists(sweep: str, profile: str) -> None:
    points = points_of(sweep, profile)
    assert points and len({point.work for point in points}) == len(points)
    if sweep not in ("attention", "quantize"):
        assert set(points[0].systems) <= set(SYSTEMS)
        assert points[0].systems[0] == "bf16-eager", "the paper's baseline"


def test_papers_protocol() -> None:
    """Tables 9, 12, 13, 14 and 17, as the captions say."""
    sides = [280, 560, 840, 1120, 1400, 1680, 1960, 2240, 2520, 2800, 3080, 3360, 3640, 4480, 5600]
    latency = points_of("latency", PAPER)
    assert [point.work.image_px for point in latency[:-1]] == sides  # type: ignore[union-attr]
    assert {point.work.text_tokens for point in latency[:-1]} == {15}  # type: ignore[union-attr]
    assert set(latency[0].systems) == set(SYSTEMS)
    assert (latency[-1].work.decode_tokens, latency[-1].work.images) == (2000, 3)  # type: ignore[union-attr]
    assert [point.work.batch for point in points_of("batch", PAPER)] == [1, 2, 3, 4]  # type: ignore[union-attr]
    turns = points_of("turns", PAPER)
    assert [point.work.turns for point in turns] == [1, 2, 3]  # type: ignore[union-attr]
    assert {(point.work.text_tokens, point.work.decode_tokens) for point in turns} == {(60, 512)}  # type: ignore[union-attr]
    assert [point.work.tokens for point in points_of("attention", PAPER)] == [100, 900, 2500, 4900, 8100]  # type: ignore[union-attr]
    assert points_of("quantize", PAPER)[0].work.samples == 256  # type: ignore[union-attr]


def test_sizes_that_a_user_names_replace_the_protocol() -> None:
    points = points_of("latency", PAPER, {"image_px": [840, 28], "decode_tokens": [0]}, ("bf16-graph",), 2)
    assert [(point.work.image_px, point.repeats, point.systems) for point in points] == [  # type: ignore[union-attr]
        (840, 2, ("bf16-graph",)),
        (28, 2, ("bf16-graph",)),
    ]


def sweep(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["sweep", *words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latency"], "no NVIDIA GPU for 'cuda'; '--device cpu' checks on small inputs that everything runs"),
        (["latency", "--device", "tpu"], "unknown device 'tpu'; use cuda, cuda:N or cpu"),
        (["latency", "--device", "cpu,cpu:0"], "several devices are different GPUs with numbers, cuda:0,cuda:1"),
        (["memory", "--device", "cpu", "--systems", "w4a8-tokens"], "did you mean 'w4a8-token'?"),
        (["latency", "--device", "cpu", "--systems", "rtn"], "'rtn' is a method: its arithmetic is simulated"),
        (["latency", "--device", "cpu", "--systems", ","], "--systems names nothing"),
        (["linears", "--device", "cpu", "--image-px", "2x"], "--image-px takes whole numbers"),
        (["linears", "--device", "cpu", "--image-px", "-5"], "image_px must be at least 1, got -5"),
        (["batch", "--device", "cpu", "--batch", "0"], "batch must be at least 1"),
        (["turns", "--device", "cpu", "--repeats", "0"], "--repeats must be at least 1"),
        (["turns", "--device", "cpu", "--seed", "-1"], "--seed must be at least 0"),
        (["turns", "--device", "cpu", "--model", "qwen2-vl"], "unknown model of sweeps 'qwen2-vl'"),
        (["latency", "--device", "cpu", "--config", "nowhere.json"], "cannot read --config 'nowhere.json'"),
        (["latency", "--device", "cpu", "--set", "text_config.layers=2"], "unknown entry of the configuration"),
        (["latency", "--device", "cpu", "--set", "text_config.hidden_size=big"], "must be of type int"),
        (["latency", "--device", "cpu", "--set", "text_config.num_attention_heads=3"], "heads of 'standin-qwen2-vl"),
        (["latency", "--device", "cpu", "--max-pixels", "100"], "--max-pixels must be at least 3136"),
        (["attention", "--device", "cpu", "--tokens", "20"], "tokens must be at least 30"),
        (["attention", "--device", "cpu", "--systems", "mquant-w4a8"], "unknown attention 'mquant-w4a8'"),
        (["quantize", "--device", "cpu", "--bits", "w1a8"], "unknown bit setting 'w1a8'"),
        (["quantize", "--device", "cpu", "--systems", "magic"], "unknown method 'magic'"),
    ],
)
def test_wrong_requests_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = sweep(*words, "--out", os.devnull, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {0: "GPU A", 1: "GPU A", 2: "GPU B"}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("text", "others", "label"),
    [
        ("cuda:1", (), "GPU A"),
        ("cuda:0, cuda:1", ("cuda:1",), "2 x GPU A"),
        ("cuda:2,cuda:0", ("cuda:0",), "GPU B + GPU A"),
    ],
)
def test_several_devices(text: str, others: tuple[str, ...], label: str) -> None:
    _, settings = resolve(SweepRequest(LATENCY, device=text))
    assert settings.others == others
    assert device_label(settings) == label


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("sweep_name", "text", "message"),
    [
        (LATENCY, "cuda:0,cuda:0", "different GPUs"),
        (LATENCY, "cuda,cuda:1", "different GPUs"),
        (LATENCY, "cuda:0,cpu", "different GPUs"),
        (LATENCY, "cuda:0,cuda:3", "no NVIDIA GPU for 'cuda:3'"),
        (ATTENTION, "cuda:0,cuda:1", "'mqbench sweep attention' runs on one device"),
    ],
)
def test_several_devices_that_make_no_sense(sweep_name: str, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve(SweepRequest(sweep_name, device=text))


def test_dry_run_lists_points_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    code, out, err = sweep("memory", "--device", "cpu", "--dry-run", "--out", str(folder), capsys=capsys)
    assert code == 0 and not folder.exists()
    assert err == "3 point(s) on cpu: 0 done, 3 to measure\n"
    assert all(text in out for text in ("56 px", "224 px", "280 px", "standin-qwen2-vl", "to measure"))


def test_command_measures_the_stand_in_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "latency",
        "--device",
        "cpu",
        "--image-px",
        "56,280",
        "--repeats",
        "2",
        "--systems",
        "bf16-eager,mquant-w4a8",
    ]
    words += ["--decode-tokens", "2", "--out", str(tmp_path)]
    code, out, err = sweep(*words, capsys=capsys)
    assert code == 0, err
    assert "functional check on a CPU: no speed" in out and "mquant-w4a8" in out
    records = RecordStore(tmp_path, "sweeps.jsonl").load()
    assert [record.metrics["clamped"] for record in records] == [0.0, 1.0]
    assert [record.metrics["visual_tokens"] for record in records] == [4.0, 64.0]
    for record in records:
        for name in PAIR:
            assert record.metrics[f"{name}.part:llm gemm_ms"] > 0
            assert len(record.arrays[f"{name}.prefill_ms"]) == 2
        assert record.metrics["mquant-w4a8.weights_bytes"] < 0.3 * record.metrics["bf16-eager.weights_bytes"]
        assert not any(name.endswith((".limit_ms", ".launch_gap_ms")) for name in record.metrics), "a CPU has no peaks"
    code, _, err = sweep(*words, capsys=capsys)
    assert code == 0 and "2 done, 0 to measure" in err


def test_command_takes_a_reduced_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((STANDIN_FOLDER / "config.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps(data))
    words = ["turns", "--device", "cpu", "--config", str(tmp_path / "small.json"), "--set"]
    words += ["text_config.num_hidden_layers=1", "--turns", "2", "--systems", "mquant-w4a8", "--repeats", "1"]
    code, _, err = sweep(*words, "--image-px", "56", "--out", str(tmp_path), capsys=capsys)
    assert code == 0, err
    (record,) = RecordStore(tmp_path, "sweeps.jsonl").load()
    assert record.cell.model == "small[text_config.num_hidden_layers=1]"
    assert record.ok and record.metrics["mquant-w4a8.decode_total_ms"] > 0


def test_attention_and_quantizing_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = sweep("attention", "--device", "cpu", "--out", str(tmp_path), capsys=capsys)
    assert code == 0, err
    words = ["quantize", "--device", "cpu", "--samples", "2", "--set", "text_config.num_hidden_layers=1"]
    code, _, err = sweep(*words, "--set", "vision_config.depth=1", "--out", str(tmp_path), capsys=capsys)
    assert code == 0, err
    attention, quantize = RecordStore(tmp_path, "sweeps.jsonl").load()
    assert attention.score == attention.metrics["causal.total_ms"] and "aifs.total_ms" in attention.metrics
    assert quantize.score == quantize.metrics["mquant.total_ms"]
    assert quantize.metrics["mquant.step:round_weights_gptq_ms"] < quantize.score


def test_results_of_failed_points_are_listed(tmp_path: Path) -> None:
    from rich.console import Console

    jobs = make_jobs()
    records, _ = run(tmp_path, FakeDevice(capacity=5), jobs)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(results_table(jobs, {record.cell.key: record for record in records}))
    assert captured.get().count("out of memory: CUDA out of memory") == 6


def _raise(error: Exception) -> None:
    raise error
