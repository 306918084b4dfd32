"""Each way in which a GPU is not left alone makes a measurement invalid; what can be measured again is."""

from __future__ import annotations

import pytest
import torch

from archsearch.latency import watch
from archsearch.latency.canary import canary_bytes
from archsearch.latency.nvml import GpuState
from archsearch.latency.validity import Disturbed, InvalidMeasurement
from archsearch.latency.watch import ATTEMPTS, Watch, watched

GPU = torch.device("cuda", 0)
QUIET = GpuState(sm_clock=1980, memory_clock=2619, temperature=50, power=400.0, energy=1.0, throttle=0, processes=1)


class Machine:
    """A GPU as the watch sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state: GpuState | None = QUIET
        self.ours = 1
        self.canary = [0.1]
        self.peak = canary_bytes() / 0.08e-3
        monkeypatch.setattr(watch, "device_key", str)
        monkeypatch.setattr(watch, "gpu_state", lambda key: (self.state, "" if self.state else "NVML: absent"))
        monkeypatch.setattr(watch, "count_present", lambda device: self.ours)
        monkeypatch.setattr(watch, "time_canary", self.time_canary)
        monkeypatch.setattr(watch, "peak_bandwidth", lambda key: self.peak)
        monkeypatch.setattr(watch, "_best", {})

    def time_canary(self, device: torch.device) -> float:
        return self.canary.pop(0) if len(self.canary) > 1 else self.canary[0]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_quiet_gpu_is_recorded(machine: Machine) -> None:
    found = Watch(GPU, "refuse")
    found.sing()
    found.look()
    found.sing()
    assert (found.states, found.canary, found.notes) == ([QUIET], [0.1, 0.1], [])


@pytest.mark.parametrize(("bit", "name"), [(0x8, "slowdown"), (0x20, "thermal"), (0x40, "thermal"), (0x80, "power")])
def test_throttling_is_refused(machine: Machine, bit: int, name: str) -> None:
    machine.state = QUIET.model_copy(update={"throttle": bit})
    with pytest.raises(Disturbed, match=name):
        Watch(GPU, "refuse").look()


def test_power_cap_is_noted(machine: Machine) -> None:
    machine.state = QUIET.model_copy(update={"throttle": 0x4})
    found = Watch(GPU, "refuse")
    found.look()
    assert found.notes == ["the power cap lowered the clocks"]


def test_second_process_is_refused_unless_it_is_accepted(machine: Machine) -> None:
    machine.state = QUIET.model_copy(update={"processes": 2})
    with pytest.raises(Disturbed, match=r"1 other process\(es\) use the GPU"):
        Watch(GPU, "refuse").look()
    accepting = Watch(GPU, "note")
    accepting.look()
    assert "other process" in accepting.notes[0]


def test_processes_of_ours_are_no_strangers(machine: Machine) -> None:
    machine.state, machine.ours = QUIET.model_copy(update={"processes": 3}), 3
    Watch(GPU, "refuse").look()


@pytest.mark.parametrize("after", [0.0985, 0.1015])
def test_canary_that_moves_is_refused(machine: Machine, after: float) -> None:
    machine.canary = [0.1, 0.1005, after]
    found = Watch(GPU, "refuse")
    found.sing()
    found.sing()
    with pytest.raises(Disturbed, match="canary"):
        found.sing()


def test_canary_slower_than_before_is_refused(machine: Machine) -> None:
    machine.canary = [0.1, 0.106]
    Watch(GPU, "refuse").sing()
    with pytest.raises(Disturbed, match=r"takes 0.1060 ms and took 0.1000 ms before"):
        Watch(GPU, "refuse").sing()


def test_canary_far_below_the_memory_rate_is_refused(machine: Machine) -> None:
    machine.canary = [0.2]
    with pytest.raises(Disturbed, match="TB/s"):
        Watch(GPU, "refuse").sing()
    accepting = Watch(GPU, "note")
    accepting.sing()
    assert "TB/s" in accepting.notes[0]
    machine.peak = 0.0  # NVML does not say
    Watch(GPU, "refuse").sing()


def test_hidden_processes_are_noted(machine: Machine) -> None:
    machine.state = QUIET.model_copy(update={"processes": 0})
    found = Watch(GPU, "refuse")
    found.look()
    assert "not even this one" in found.notes[0]


def test_absent_nvml_is_noted(machine: Machine) -> None:
    machine.state = None
    found = Watch(GPU, "refuse")
    found.look()
    assert found.notes == ["NVML: absent"]


def test_disturbed_measurement_is_taken_again(machine: Machine) -> None:
    machine.canary = [0.1, 0.102, 0.102, 0.102]
    runs: list[int] = []
    found, notes = watched(GPU, "refuse", lambda: runs.append(1) or len(runs))
    assert (found, notes) == (2, [])


def test_measurement_that_is_always_disturbed_is_no_number(machine: Machine) -> None:
    machine.state = QUIET.model_copy(update={"processes": 2})
    runs: list[int] = []
    with pytest.raises(InvalidMeasurement):
        watched(GPU, "refuse", lambda: runs.append(1))
    assert len(runs) == 0
    machine.state = QUIET

    def disturb() -> None:
        runs.append(1)
        machine.canary = [machine.canary[0] * 1.02]

    with pytest.raises(InvalidMeasurement, match="canary"):
        watched(GPU, "refuse", disturb)
    assert len(runs) == ATTEMPTS


def test_cpu_says_what_is_not_there() -> None:
    found = Watch(torch.device("cpu"), "refuse")
    found.sing()
    found.look()
    assert found.states == []
    assert "no clocks" in found.notes[0]
