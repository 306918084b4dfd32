"""What surrounds the decode latency: prefill, throughput, full runs in fresh processes, all of it together."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import pytest
import torch

from archsearch.architecture import Architecture, make_architecture
from archsearch.config import LatencyConfig
from archsearch.errors import EnvironmentUnfit
from archsearch.latency import exact, prefill, suite, throughput
from archsearch.latency.bandwidth import Bandwidth, measure_bandwidth
from archsearch.latency.device import DoesNotFit
from archsearch.latency.exact import measure_exact
from archsearch.latency.prefill import measure_prefill
from archsearch.latency.result import DecodeLatency
from archsearch.latency.suite import LatencyReport, measure_all
from archsearch.latency.throughput import measure_throughput
from archsearch.latency.validity import TOLERANCE, Errors, InvalidMeasurement, check_prefill
from archsearch.model.hybrid import HybridLM, build_model

CPU = torch.device("cpu")
QUICK = LatencyConfig(tokens=48, strata=3, steps=4, repeats=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def architecture() -> Architecture:
    options = {"a": {"head_dim": 16}, "d": {"head_dim": 16}, "f": {"multiple_of": 32}}
    return make_architecture(hidden_size=32, vocab_size=64, operators="a f d f", options=options, meta_tokens=2)


def model() -> HybridLM:
    return build_model(architecture())


def test_bandwidth_is_measured_once_a_process() -> None:
    found = measure_bandwidth(CPU)
    assert 1e8 < found.read < 1e13
    assert measure_bandwidth(CPU) is found


def test_prefill_of_each_length() -> None:
    found = measure_prefill(model(), 2, lengths=(16, 64))
    assert [(p.length, p.batch) for p in found.measured] == [(16, 2), (64, 2)]
    for one in found.measured:
        assert 0 < one.lowest_ms <= one.ms
        assert one.tokens_per_second == pytest.approx(2e3 * one.length / one.ms)
    assert found.omitted == {}
    assert found.paths == {"a": "torch", "f": "torch", "d": "torch"}


def test_prefill_that_does_not_fit_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "free_memory", lambda device: 10**5)
    found = measure_prefill(model(), 1, lengths=(16, 10**6))
    assert [p.length for p in found.measured] == [16]
    assert "0.0 GB are free" in found.omitted[10**6]


def test_prefill_that_takes_a_cpu_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "CPU_SECONDS", 1e-9)
    assert "would take a CPU" in measure_prefill(model(), 1, lengths=(16, 64)).omitted[64]


def test_prefill_that_is_wrong_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> float:
        raise InvalidMeasurement("prefill (fla) gives other logits", "report this")

    monkeypatch.setattr(prefill, "check_prefill", wrong)
    monkeypatch.setattr(prefill, "implementation", lambda device: "fla")
    network = model()
    found = measure_prefill(network, 1, lengths=(16, 64))
    assert (found.measured, found.errors) == ((), None)
    assert found.omitted == dict.fromkeys((16, 64), "prefill (fla) gives other logits")
    assert set(network.paths().values()) == {"torch"}


def test_prefill_beyond_the_kernels_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "implementation", lambda device: "fla")
    network = model()
    monkeypatch.setattr(network.layers[2].op, "unsupported", lambda: ("head_dim 16", "choose another"))
    assert measure_prefill(network, 1, lengths=(16,)).omitted == {16: "operator d: head_dim 16"}


def test_prefill_that_differs_from_the_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model()

    def use(path: str) -> HybridLM:
        network.layers[0].norm.weight.data.fill_(1.0 if path == "torch" else 1.3)
        return network

    monkeypatch.setattr(network, "use", use)
    with torch.inference_mode():
        assert check_prefill(network, "torch", 20) == Errors(reference=0.0)
        with pytest.raises(InvalidMeasurement, match=r"prefill \(other\) gives other logits or states"):
            check_prefill(network, "other", 20)


def test_rounding_of_a_deep_model_is_told_from_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is off by a little or by much, where the bound for shallow models allows neither."""
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 1e-4)
    network = build_model(architecture(), dtype=torch.bfloat16)
    mixer, off = network.layers[0].op, {"torch": 1.0, "rounded": 1 + 2**-7, "wrong": 1.5}
    prefill_, scale = mixer.prefill, 1.0

    def use(path: str) -> HybridLM:
        nonlocal scale
        scale = off[path]
        return network

    monkeypatch.setattr(network, "use", use)
    monkeypatch.setattr(mixer, "prefill", lambda x, state: scale * prefill_(x, state))
    with torch.inference_mode():
        errors = check_prefill(network, "rounded", 20).fp32
        assert errors is not None
        for kernels, reference in errors.values():
            assert 0 < kernels <= 1.5 * reference
        with pytest.raises(InvalidMeasurement, match="off fp32"):
            check_prefill(network, "wrong", 20)


def test_batches_double_to_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = architecture().state_bytes(20 + throughput.ROOM, batch=4, width=4) + 2 * 4 * 64 * 4
    monkeypatch.setattr(throughput, "free_memory", lambda device: needed / throughput.SHARE["cpu"])
    found = measure_throughput(model(), 20, Bandwidth(read=1e10, copied=1e10))
    assert [b.batch for b in found.batches] == [1, 2, 4]
    assert found.ended == "batch 8 does not fit the memory"
    for one in found.batches:
        assert one.tokens_per_second == pytest.approx(1e3 * one.batch / one.step_ms)
        assert one.state_bytes == architecture().state_bytes(20 + throughput.ROOM, batch=one.batch, width=4)
        assert one.logits_error < 1e-3
    assert found.best in found.batches


def test_context_that_does_not_fit_has_no_throughput() -> None:
    found = measure_throughput(model(), 10**12, Bandwidth(read=1e10, copied=1e10))
    assert (found.batches, found.best, found.ended) == ((), None, "batch 1 does not fit the memory")


def test_doubling_ends_before_a_cpu_is_busy_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "CPU_SECONDS", 0.0)
    found = measure_throughput(model(), 20, Bandwidth(read=1e10, copied=1e10))
    assert [b.batch for b in found.batches] == [1]
    assert "too long" in found.ended


def test_all_of_it_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "LENGTHS", (16,))
    monkeypatch.setattr(throughput, "CPU_SECONDS", 0.2)
    told: list[str] = []
    found = measure_all(architecture(), QUICK, device=CPU, context=24, say=told.append)
    assert LatencyReport.model_validate_json(found.model_dump_json()) == found
    assert found.decode.floor_fraction == pytest.approx(found.decode.floor_ms / found.decode.tpot_ms)
    assert found.throughput.context == 24
    assert found.energy is None
    assert found.exact is None
    assert any("energy is not measured" in note for note in found.notes)
    assert told == ["decode", "prefill", "throughput"]


@pytest.fixture(scope="module")
def fresh() -> DecodeLatency:
    """What one process of its own found."""
    return exact._fresh(architecture(), QUICK, "cpu")


def test_full_run_in_a_fresh_process(fresh: DecodeLatency, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh.full is not None
    assert fresh.full.seconds > 0
    assert fresh.full.strata_error == abs(fresh.seconds - fresh.full.seconds) / fresh.full.seconds
    monkeypatch.setattr(exact, "_fresh", lambda *arguments: fresh)
    found = measure_exact(architecture(), QUICK, "cpu")
    assert (found.seconds, found.spread, len(found.runs)) == (fresh.full.seconds, 0, 3)
    assert (found.strata_error > 0.01) == any("off the full run" in note for note in found.notes)


def test_spread_between_processes_is_told(fresh: DecodeLatency, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh.full is not None
    slow = fresh.model_copy(update={"full": fresh.full.model_copy(update={"seconds": 1.05 * fresh.full.seconds})})
    runs = iter([fresh, slow, fresh])
    monkeypatch.setattr(exact, "_fresh", lambda *arguments: next(runs))
    found = measure_exact(architecture(), QUICK, "cpu")
    assert found.spread == pytest.approx(0.05)
    assert found.notes[0] == "the processes differ by 5.0%"


def test_error_of_a_fresh_process_keeps_its_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LatencyConfig(tokens=10**9, batch=1000)
    request = {"architecture": architecture().to_dict(), "config": config.model_dump(mode="json"), "device": "cpu"}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    assert exact.main() == 4
    told = exact._error(capsys.readouterr().out, 4, "")
    assert isinstance(told, DoesNotFit)
    assert "decoding 1000000000 tokens" in told.cause
    died = exact._error("", -9, "Killed\n")
    assert isinstance(died, EnvironmentUnfit)
    assert died.cause == "a measuring process ended with code -9: Killed"


def test_exact_runs_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise InvalidMeasurement("disturbed", "again")

    monkeypatch.setattr(suite, "measure_exact", failing)
    monkeypatch.setattr(suite, "measure_decode", lambda *a, **k: pytest.fail("measured too early"))
    with pytest.raises(InvalidMeasurement, match="disturbed"):
        measure_all(architecture(), QUICK, device=CPU, exact=True)
