"""The one class that drives a GPU, against fakes of torch.cuda, and what it asks of passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes.tiny_qwen2_vl import tiny_batch, tiny_config, tiny_model
from mqbench.harness.runtime.build import build_runtime
from mqbench.harness.runtime.graph import WARM_UPS, PassRunner, with_index
from mqbench.harness.runtime.interface import RuntimeInputs
from mqbench.harness.runtime.systems import SYSTEMS, Engine


class FakeCuda:
    """What ``PassRunner`` calls of ``torch.cuda``: a capture runs the pass, a replay runs it again."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captures: list[Any] = []
        self.replays = 0
        self.recording: list[Any] | None = None
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        for name, fake in {
            "CUDAGraph": lambda: self,
            "Stream": stream,
            "current_stream": stream,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "current_device": lambda: 1,
            "graph_pool_handle": lambda: (0, 1),
            "graph": self.graph,
            "memory_snapshot": lambda: [
                {"segment_pool_id": (0, 1), "total_size": 100}, {"segment_pool_id": (0, 0), "total_size": 7},
            ],
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, fake)

    @contextmanager
    def graph(self, graph: Any, pool: Any) -> Iterator[None]:
        self.captures.append(pool)
        yield

    def replay(self) -> None:
        self.replays += 1


def runner_on_fakes(patch: pytest.MonkeyPatch) -> tuple[PassRunner, FakeCuda]:
    cuda = FakeCuda(patch)
    return PassRunner(Engine.GRAPH, [torch.device("cuda")], ("flash", "math")), cuda


def test_a_pass_is_captured_once_per_key_and_replayed_on_static_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, cuda = runner_on_fakes(monkeypatch)
    seen: list[int] = []

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        seen.append(tensors["x"].data_ptr())
        return tensors["x"] * 2

    first = torch.ones(3)
    output = runner("a", run, {"x": first})
    assert len(seen) == WARM_UPS + 1 and len(set(seen)) == 1 and seen[0] != first.data_ptr()
    assert runner("a", run, {"x": torch.full((3,), 5.0)}) is output  # the graph's own output, which a replay rewrites
    static = runner._captured["a"].inputs["x"]
    assert torch.equal(static, torch.full((3,), 5.0)) and static.data_ptr() == seen[0]
    runner("b", run, {"x": torch.ones(2)})
    assert (len(cuda.captures), cuda.replays) == (2, 3)
    assert cuda.captures[0] is cuda.captures[1]  # one pool for all graphs
    assert runner.workspace_bytes == 3 * 4 + 2 * 4 + 100
    runner.drop()
    assert runner.workspace_bytes == 0


def test_an_instrumented_pass_and_several_devices_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, cuda = runner_on_fakes(monkeypatch)
    runner.paused = True
    assert runner("a", lambda tensors: tensors["x"], {"x": torch.ones(1)}) == 1
    assert not cuda.captures
    assert with_index("cuda") == torch.device("cuda:1")
    assert with_index("cuda:0") == torch.device("cuda:0")
    assert PassRunner(Engine.GRAPH, [torch.device("cuda"), torch.device("cuda:1")]).captures  # two names of one device
    both = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert not PassRunner(Engine.GRAPH, both).captures
    assert not PassRunner(Engine.EAGER, both[:1]).captures
    assert PassRunner(Engine.COMPILE, both[:1]).compiles
    assert not PassRunner(Engine.COMPILE, [torch.device("cpu")]).captures


@pytest.mark.parametrize("name", ["mquant-w4a8", "w4a8-msq", "bf16-graph"])
def test_passes_leave_the_same_behind_however_often_they_run(name: str) -> None:
    """A capture warms up first: each pass runs several times on the same cache."""
    batch = RuntimeInputs.from_batch(tiny_batch(tiny_model(torch.float32), num_images=2, batch_size=2))
    found = []
    for repeats in (1, 3):
        runtime: Any = build_runtime(tiny_config(), SYSTEMS[name], device="cpu", dtype=torch.float32)
        runtime.runner = Repeating(repeats)
        logits = [runtime.prefill(batch)]
        logits += [runtime.decode(torch.tensor([token, token + 1])) for token in (3, 5)]
        logits.append(runtime.prefill(RuntimeInputs(torch.tensor([[7, 8], [9, 10]]))))
        cache = runtime.cache
        found.append((logits, cache.keys, cache.values, cache.position, cache.valid, cache.next_position))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_compiler_sees_a_pass_whole() -> None:
    """Engine ``compile`` needs passes without a graph break; Inductor itself is left out."""
    config = tiny_config()
    config.vision_config.depth = config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = ["full_attention"]
    batch = RuntimeInputs.from_batch(tiny_batch(tiny_model(torch.float32), num_images=1, batch_size=2))
    found = []
    for runner in (Repeating(1), Traced()):
        runtime: Any = build_runtime(config, SYSTEMS["mquant-w4a8"], device="cpu", dtype=torch.float32)
        runtime.runner = runner
        found.append(runtime.prefill(batch))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


class Traced(PassRunner):
    """Runs what Dynamo made of each pass, and raises where it cannot follow."""

    def __init__(self) -> None:
        super().__init__(Engine.EAGER, [torch.device("cpu")])

    def __call__(self, key: Any, run: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = torch.compile(run, dynamic=False, fullgraph=True, backend="eager")(tensors)
        return output


class Repeating(PassRunner):
    """Runs each pass several times over copies of its inputs, as a capture does, and keeps keys apart."""

    def __init__(self, repeats: int) -> None:
        super().__init__(Engine.EAGER, [torch.device("cpu")])
        self.repeats = repeats
        self.shapes: dict[Any, Any] = {}

    def __call__(self, key: Any, run: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        shapes = {name: x.shape for name, x in tensors.items()}
        assert self.shapes.setdefault(key, shapes) == shapes
        copies = {name: x.clone() for name, x in tensors.items()}
        outputs = [run(copies) for _ in range(self.repeats)]
        return outputs[-1]
