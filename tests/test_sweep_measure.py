"""Measuring a point with a made-up runtime: order of work, memory that runs out, what a record gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fakes.sweep_runtime import FakeDevice, PlainMemory
from mqbench.harness.bench.worker import DeviceLost
from mqbench.harness.runtime.systems import SYSTEMS as SYSTEMS_OF
from mqbench.harness.sweep import measure as measure_module
from mqbench.harness.sweep.device import HostClock, Watched, watched_of
from mqbench.harness.sweep.figures import launch_gap
from mqbench.harness.sweep.measure import Settings, measure_sequences
from mqbench.harness.sweep.model import find_sweep_model
from mqbench.harness.sweep.outcome import Outcome, is_out_of_memory, note_of, ratio, split_group, summary
from mqbench.harness.sweep.protocol import Shape
from mqbench.harness.sweep.session import run_pass
from mqbench.harness.sweep.spec import LATENCY, LINEARS, MEMORY, TURNS, Point

EAGER, GRAPH, TOKEN, MQUANT = "bf16-eager", "bf16-graph", "w4a8-token", "mquant-w4a8"
SYSTEMS = (EAGER, GRAPH, TOKEN, MQUANT)
SETTINGS = Settings("cpu", "float32", 0, find_sweep_model("standin-qwen2-vl", None, {}))
SHAPE = Shape(56, decode_tokens=3)


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "memory_of", lambda *devices: PlainMemory())


def run(
    place: FakeDevice,
    sweep: str = TURNS,
    shape: Shape = SHAPE,
    systems: tuple[str, ...] = SYSTEMS,
    repeats: int = 3,
    skip: Mapping[str, str] | None = None,
) -> Outcome:
    point = Point(sweep, shape, systems, repeats)
    return measure_sequences(point, SETTINGS, skip or {}, place.build)


def prefills(place: FakeDevice) -> list[str]:
    return [system for what, system in place.calls if what == "prefill"]


def test_everyone_has_a_turn_in_every_round() -> None:
    place = FakeDevice()
    outcome = run(place, repeats=3)
    rounds = prefills(place)[2 * 4 :]  # behind two warm-up passes each
    assert len(rounds) == 4 * (3 + 1)
    for number in range(4):
        assert rounds[4 * number : 4 * number + 4] == [*SYSTEMS[number:], *SYSTEMS[:number]]
    assert outcome.metrics["interleaved"] == 1.0
    assert outcome.notes == dict.fromkeys(SYSTEMS, "ok")
    assert place.used == 0, "every runtime is closed"


def test_raw_samples_and_their_summary() -> None:
    outcome = run(FakeDevice(), repeats=3)
    for name in SYSTEMS:
        assert len(outcome.arrays[f"{name}.prefill_ms"]) == 3
        assert len(outcome.arrays[f"{name}.prefill_wall_ms"]) == 3
        assert len(outcome.arrays[f"{name}.decode_ms"]) == 3
        middle = sorted(outcome.arrays[f"{name}.total_ms"])[1]
        assert outcome.metrics[f"{name}.total_ms"] == outcome.scores[name] == middle
        assert outcome.metrics[f"{name}.prefill_iqr_ms"] >= 0
        assert outcome.metrics[f"{name}.weights_bytes"] == 10
    assert outcome.metrics[f"{EAGER}.ratio"] == 1.0
    assert outcome.metrics["llm_tokens"] == 4 + 15


def test_cache_holds_all_turns_and_every_token_is_decoded() -> None:
    """The fake runtime fails when its cache is too short."""
    place = FakeDevice()
    run(place, shape=replace(SHAPE, turns=3, decode_tokens=20), systems=(EAGER,), repeats=1)
    assert place.count("prefill", EAGER) == 3 * (2 + 2)
    assert place.count("decode", EAGER) == 3 * 20 * (2 + 2), "turns are warm only after every length"


def test_single_turn_warms_up_with_few_steps() -> None:
    place = FakeDevice()
    run(place, shape=replace(SHAPE, decode_tokens=40), systems=(EAGER,), repeats=1)
    assert place.count("decode", EAGER) == 2 * 2 + 2 * 40


@pytest.mark.parametrize(
    ("capacity", "groups"),
    [
        (40, [SYSTEMS]),
        (39, [(EAGER, GRAPH, TOKEN), (EAGER, MQUANT)]),
        (29, [(EAGER, GRAPH), (EAGER, TOKEN), (EAGER, MQUANT)]),
        (19, [(EAGER,), (GRAPH,), (TOKEN,), (MQUANT,)]),
    ],
)
def test_what_does_not_fit_is_measured_in_groups(capacity: int, groups: list[tuple[str, ...]]) -> None:
    outcome = run(FakeDevice(capacity=capacity), repeats=2)
    assert outcome.notes == dict.fromkeys(SYSTEMS, "ok")
    assert outcome.metrics["interleaved"] == float(len(groups) == 1)
    for number, group in enumerate(groups):
        for name in group if number == 0 else group[-1:]:
            assert outcome.metrics[f"{name}.group"] == float(number)
    times = sum(EAGER in group for group in groups)
    assert len(outcome.arrays[f"{EAGER}.prefill_ms"]) == 2 * times, "the baseline is timed again with every group"
    assert (f"{MQUANT}.ratio" in outcome.metrics) == (EAGER in groups[-1]), "a ratio is one of a common group"


def test_larger_points_start_with_what_fitted() -> None:
    place, hints = FakeDevice(capacity=29), {}  # type: ignore[var-annotated]

    def builds(shape: Shape) -> int:
        before = len(place.calls)
        measure_sequences(Point(TURNS, shape, SYSTEMS, 1), SETTINGS, {}, place.build, hints)
        return [what for what, _ in place.calls[before:]].count("build")

    first, again, smaller = (
        builds(replace(SHAPE, decode_tokens=4)),
        builds(replace(SHAPE, decode_tokens=5)),
        builds(SHAPE),
    )
    assert again == 6, "three groups of two, nothing in vain"
    assert first == smaller > again, "less memory is needed, so all together are tried again"


def test_out_of_memory_is_an_outcome_of_that_system() -> None:
    place = FakeDevice(capacity=35, size_of=lambda name: 40 if name == EAGER else 10)
    outcome = run(place)
    assert outcome.notes[EAGER].startswith("out of memory: ")
    assert set(outcome.scores) == {GRAPH, TOKEN, MQUANT} and f"{EAGER}.prefill_ms" not in outcome.metrics
    assert next(iter(outcome.scores)) == GRAPH
    assert place.used == 0


def test_out_of_memory_while_running() -> None:
    """The pass needs more than building: the group shrinks until it fits."""
    outcome = run(FakeDevice(capacity=45, pass_bytes=20), systems=SYSTEMS[:3])
    assert outcome.notes == dict.fromkeys(SYSTEMS[:3], "ok")
    assert outcome.metrics["interleaved"] == 0.0


def test_all_out_of_memory() -> None:
    outcome = run(FakeDevice(capacity=5))
    assert not outcome.scores
    assert outcome.reason == f"out of memory: {', '.join(SYSTEMS)}"
    assert outcome.metrics["visual_tokens"] == 4.0, "tables show the size of what did not fit"


def test_failure_ends_one_system_only() -> None:
    place = FakeDevice(failures={("decode", TOKEN): ValueError("no kernel\nfor this")})
    outcome = run(place)
    assert outcome.notes[TOKEN] == "failed: ValueError: no kernel for this"
    assert set(outcome.scores) == {EAGER, GRAPH, MQUANT}
    assert place.used == 0


def test_failure_in_a_round_keeps_the_others() -> None:
    class FailsLater(FakeDevice):
        def log(self, what: str, system: str) -> None:
            super().log(what, system)
            if system == TOKEN and what == "prefill" and self.count(what, system) == 5:
                raise RuntimeError("misaligned")

    place = FailsLater()
    outcome = run(place, repeats=4)
    assert outcome.notes[TOKEN] == "failed: RuntimeError: misaligned"
    assert len(outcome.arrays[f"{MQUANT}.prefill_ms"]) == 4
    assert place.used == 0


def test_system_that_breaks_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = False

    class BrokenClock(HostClock):
        def wait(self) -> None:
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Breaks(FakeDevice):
        def log(self, what: str, system: str) -> None:
            nonlocal broken
            broken = system == TOKEN
            if broken:
                raise RuntimeError("illegal memory access")

    monkeypatch.setattr(measure_module, "clock_of", lambda *devices: BrokenClock())
    place = Breaks()
    with pytest.raises(DeviceLost) as caught:
        run(place)
    assert (caught.value.contender, caught.value.message) == (TOKEN, "RuntimeError: illegal memory access")
    assert place.used == 20, "nobody asks a lost device to free anything"


def test_skipped_and_unavailable_systems_are_not_built() -> None:
    place = FakeDevice()
    outcome = run(place, systems=(EAGER, "fp8-token", MQUANT), skip={MQUANT: "failed: broke the GPU's context"})
    assert {system for _, system in place.calls} == {EAGER}
    assert outcome.notes["fp8-token"].startswith("unavailable: needs float8")
    assert outcome.notes[MQUANT] == "failed: broke the GPU's context"


def test_nothing_can_run() -> None:
    outcome = run(FakeDevice(), systems=("fp8-token",))
    assert outcome.reason.startswith("no system can run here; fp8-token unavailable: ")


def test_memory_is_measured_one_by_one() -> None:
    place = FakeDevice(capacity=12)
    outcome = run(place, MEMORY, replace(SHAPE, decode_tokens=0), systems=(EAGER, MQUANT), repeats=1)
    assert outcome.metrics[f"{EAGER}.device_peak_bytes"] == outcome.metrics["device_before_bytes"] == 123.0
    assert outcome.metrics[f"{EAGER}.build_peak_bytes"] == 7.0
    assert outcome.metrics[f"{EAGER}.peak_bytes"] == outcome.scores[EAGER] == 13.0, "no less than its parts"
    assert outcome.metrics[f"{EAGER}.activations_bytes"] == 0.0
    assert outcome.metrics["interleaved"] == 0.0


def test_latency_has_a_time_split() -> None:
    outcome = run(FakeDevice(), LATENCY, systems=(EAGER,), repeats=2)
    metrics = outcome.metrics
    parts = [metrics[f"{EAGER}.part:{name}_ms"] for name in ("vision gemm", "llm gemm", "quantize and norm", "other")]
    assert min(parts[:3]) > 0
    assert sum(parts) == pytest.approx(metrics[f"{EAGER}.kernels_ms"])
    assert 0 < metrics[f"{EAGER}.vision_ms"] < metrics[f"{EAGER}.kernels_ms"]
    assert f"{EAGER}.launch_gap_ms" not in metrics, "an operation on the CPU is no launch"
    assert outcome.scores[EAGER] == metrics[f"{EAGER}.prefill_ms"]


def test_launch_gaps_by_hand() -> None:
    assert launch_gap("a", {"a.prefill_ms": 5.0, "a.kernels_ms": 4.5}) == {"a.launch_gap_ms": 0.5}
    assert launch_gap("a", {"a.prefill_ms": 5.0}) == {}


def test_time_split_that_fails_is_named_and_keeps_the_times() -> None:
    place = FakeDevice(failures={("instrumented", EAGER): torch.OutOfMemoryError("CUDA out of memory")})
    outcome = run(place, LATENCY, systems=(EAGER,), repeats=2)
    assert outcome.notes[EAGER] == "ok, but no time split: out of memory: CUDA out of memory"
    assert f"{EAGER}.prefill_ms" in outcome.metrics


def test_linears_are_kernels_of_the_instrumented_pass() -> None:
    place = FakeDevice()
    outcome = run(place, LINEARS, replace(SHAPE, decode_tokens=0), systems=(EAGER, MQUANT), repeats=2)
    assert place.count("instrumented", MQUANT) == 1 + 2
    assert len(outcome.arrays[f"{MQUANT}.total_ms"]) == 2
    for index in range(2):
        pieces = [outcome.arrays[f"{MQUANT}.part:{name}_ms"][index] for name in ("vision gemm", "llm gemm")]
        assert outcome.arrays[f"{MQUANT}.gemm_ms"][index] == pytest.approx(sum(pieces))
        assert outcome.arrays[f"{MQUANT}.total_ms"][index] > sum(pieces)


def test_decoding_is_timed_in_chunks_between_marks() -> None:
    class CountingClock(HostClock):
        """A mark is how many calls came before it."""

        def mark(self) -> float:
            return float(len(place.calls))

        def between_ms(self, start: float, end: float) -> float:
            return end - start

    place = FakeDevice()
    runtime = place.build(None, type("S", (), {"name": EAGER}))
    runtime.reserve(1, 100)
    turn = type("T", (), {"batch_size": 1, "num_tokens": 5})
    times = run_pass(runtime, [turn, turn], torch.zeros(1), 20, CountingClock())  # type: ignore[list-item]
    assert times.prefill_ms == 2.0 and times.decode_total_ms == 40.0 and times.total_ms == 42.0
    assert times.decode_ms == [1.0] * 4, "16 and 4 steps, twice"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    assert note_of(error).startswith("out of memory: " if expected else "failed: ")


def test_memory_behind_another_error() -> None:
    """A graph whose capture runs out of memory complains about the capture."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert note_of(error).startswith("out of memory: operation failed")


def test_summary_by_hand() -> None:
    found = summary("a", {"x_ms": [1.0, 2.0, 10.0, 3.0, 4.0], "y_ms": [5.0], "z_ms": []})
    assert found == {"a.x_ms": 3.0, "a.x_iqr_ms": 2.0, "a.y_ms": 5.0}


def test_ratio_compares_rounds() -> None:
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0
    assert ratio([], [1.0]) is None


def test_groups_end() -> None:
    assert split_group("ab") == [("a",), ("b",)]
    assert split_group("abc") == [("a", "b"), ("a", "c")]
    with pytest.raises(ValueError, match="cannot be split"):
        split_group("a")


def test_running_sum_of_memory() -> None:
    assert watched_of([5, 7, -5, 2, -9]) == Watched(12, 0)
    assert watched_of([]) == Watched(0, 0)


def test_a_model_over_several_devices_is_measured_and_says_what_ran_without_graphs() -> None:
    """The same device under two names; the real runtimes."""
    point = Point(TURNS, SHAPE, (EAGER, GRAPH, MQUANT), repeats=2)
    outcome = measure_sequences(point, replace(SETTINGS, others=("cpu:0",)), {})
    assert outcome.notes == {EAGER: "ok", GRAPH: measure_module.EAGER_NOTE, MQUANT: measure_module.EAGER_NOTE}
    assert all(len(outcome.arrays[f"{name}.prefill_ms"]) == 2 for name in point.systems)


def test_blocks_are_spread_over_all_devices() -> None:
    arguments = {"device": torch.device("cpu"), "dtype": torch.float32, "seed": 0}
    runtime = measure_module.build_random(
        SETTINGS.model.build_config(), SYSTEMS_OF[MQUANT], **arguments, others=("meta",)
    )
    types = [device.type for device in runtime.layer_devices]
    assert types == ["cpu"] * (len(types) // 2) + ["meta"] * (len(types) // 2)
