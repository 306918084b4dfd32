"""Measurements on a GPU: what is recorded, and each way to be wrong is found on the captured graph itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from archsearch.architecture import make_architecture
from archsearch.config import LatencyConfig
from archsearch.latency.bandwidth import measure_bandwidth
from archsearch.latency.decode import measure_decode
from archsearch.latency.device import DoesNotFit
from archsearch.latency.energy import measure_energy
from archsearch.latency.prefill import measure_prefill
from archsearch.latency.throughput import measure_throughput
from archsearch.latency.validity import Disturbed, InvalidMeasurement, check_depth, check_runtime
from archsearch.model.decode import DecodeGraph
from archsearch.model.hybrid import HybridLM, build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
QUICK = LatencyConfig(tokens=600, strata=3, steps=16, repeats=2, others="note")
BUSY = """
import sys, torch
x = torch.ones(2**28, device="cuda")
print("here", flush=True)
while True:
    for _ in range(20):
        x.mul_(1.0)
    torch.cuda.synchronize()
"""


def model_of(operators: str, **options: dict[str, Any]) -> HybridLM:
    fields = {"hidden_size": 512, "vocab_size": 4096, "operators": operators, "options": options}
    return build_model(make_architecture(**fields), 0, "cuda", torch.bfloat16)


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def stranger() -> Iterator[None]:
    """Another program that keeps the GPU busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    yield
    process.kill()
    process.communicate()


def test_second_process_is_found(gpu: torch.device, stranger: None) -> None:
    """By NVML, or, where processes are hidden from us, by the canary."""
    architecture = model_of("f").architecture
    with pytest.raises(Disturbed, match=r"use the GPU|canary"):
        measure_decode(architecture, QUICK.model_copy(update={"others": "refuse"}), device=gpu)
    noted = measure_decode(architecture, QUICK, device=gpu).notes
    assert any("use the GPU" in note or "the canary's step" in note or "the canary reads" in note for note in noted)


class Graph(DecodeGraph):
    """A graph over 600 tokens of an attention, a window and a linear mixer."""

    def __init__(self) -> None:
        self.model = model_of("a w d f", a={"head_dim": 64}, w={"head_dim": 64, "window": 100}, d={"head_dim": 64})
        super().__init__(self.model, 1, 600)


@torch.inference_mode()
def test_right_graph_passes() -> None:
    graph = Graph()
    assert check_runtime(graph, graph.model, 1, 600).reference < 0.05
    assert check_depth(graph, graph.model, 600).reference < 0.05


@torch.inference_mode()
def test_stale_buffer_is_found() -> None:
    class Stale(Graph):
        def feed(self, token: torch.Tensor) -> None:
            self.plan.token.copy_(token)

    graph = Stale()
    with pytest.raises(InvalidMeasurement, match="other logits"):
        check_runtime(graph, graph.model, 1, 600)


@torch.inference_mode()
def test_wrong_position_is_found() -> None:
    class Shifted(Graph):
        def step(self) -> None:
            self.plan.position.sub_(1)
            super().step()
            self.plan.position.add_(1)

    graph = Shifted()
    with pytest.raises(InvalidMeasurement):
        check_depth(graph, graph.model, 600)


@torch.inference_mode()
def test_poisoned_tail_changes_nothing_and_poisoned_tokens_are_found() -> None:
    graph = Graph()
    want = check_depth(graph, graph.model, 600).reference
    for chain in graph.plan.chains:
        for name in {"k", "v"} & set(chain.state):
            chain.state[name].fill_(torch.nan)
    assert check_runtime(graph, graph.model, 1, 600).reference < 0.05  # begins again: all of the cache is its tail
    assert check_depth(graph, graph.model, 600).reference == pytest.approx(want, rel=0.5)

    class Poisoned(Graph):
        def load(self, *args: Any) -> None:
            super().load(*args)
            self.plan.chains[0].state["k"][:, :, 17] = torch.nan

    graph = Poisoned()
    with pytest.raises(InvalidMeasurement, match="nan"):
        check_depth(graph, graph.model, 600)


EXTREMES = [
    ("a", {"head_dim": 8, "kv_heads": 1}),
    ("a", {"head_dim": 250, "heads": 3, "kv_heads": 1, "qk_norm": True}),
    ("a", {"head_dim": 256, "kv_heads": 2}),
    ("w", {"head_dim": 256, "kv_heads": 1, "window": 1}),
    ("d", {"head_dim": 8}),
    ("d", {"head_dim": 256, "conv": 1}),
    ("gd", {"head_dim": 100, "heads": 3, "expand_v": 2.0, "conv": 8}),
    ("gl", {"head_dim": 256, "expand_k": 1.0, "gate_rank": 200}),
    ("m2", {"head_dim": 8, "state": 256}),
    ("m2", {"head_dim": 256, "state": 8, "groups": 4}),
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("kind", "options"), EXTREMES, ids=str)
@torch.inference_mode()
def test_all_sizes_that_an_operator_may_have(kind: str, options: dict[str, Any], batch: int) -> None:
    model = model_of(kind, **{kind: options})
    graph = DecodeGraph(model, batch, 300)
    check_runtime(graph, model, batch, 300)
    check_depth(graph, model, 300)


def test_record_is_complete(gpu: torch.device) -> None:
    found = measure_decode(model_of("a f d f", a={"head_dim": 64}).architecture, QUICK, device=gpu, full=True)
    assert found.bandwidth == measure_bandwidth(gpu)
    assert found.bandwidth.read > 5e11
    assert found.floor_fraction == pytest.approx(found.floor_ms / found.tpot_ms)
    assert found.samples.interval is not None
    assert len(found.canary_ms) == 2
    assert found.full is not None
    assert found.full.seconds == pytest.approx(found.full.wall_seconds, rel=0.2)
    assert len(found.full.curve_ms) == 2
    assert any("cache" in note for note in found.notes)  # the weights fit into the L2


@torch.inference_mode()
def test_what_surrounds_decoding(gpu: torch.device) -> None:
    model = model_of("a f", a={"head_dim": 64, "kv_heads": 2})
    prefill = measure_prefill(model, 1, lengths=(512, 2048))
    assert [p.length for p in prefill.measured] == [512, 2048]
    assert all(p.peak_bytes for p in prefill.measured)
    state = model.architecture.state_bytes(64 + 40)
    throughput = measure_throughput(model, 64, measure_bandwidth(gpu), largest=8)
    assert [b.batch for b in throughput.batches] == [1, 2, 4, 8]
    assert throughput.batches[-1].state_bytes == 8 * state
    energy, problem = measure_energy(DecodeGraph(model, 1, 600), 100)
    assert problem or energy.watts > 20


def test_model_that_does_not_fit_is_refused(gpu: torch.device) -> None:
    held = torch.cuda.memory_allocated(gpu)
    with pytest.raises(DoesNotFit, match="free"):
        measure_decode(model_of("a").architecture, LatencyConfig(tokens=2**22, batch=2**12), device=gpu)
    assert torch.cuda.memory_allocated(gpu) <= held + 2**25
