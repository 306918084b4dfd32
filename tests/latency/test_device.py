from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from archsearch.errors import EnvironmentUnfit, UsageError
from archsearch.latency import device as device_module
from archsearch.latency import nvml
from archsearch.latency.device import (
    DoesNotFit,
    describe,
    device_errors,
    free_memory,
    require_memory,
    resolve_device,
)
from archsearch.latency.nvml import GpuState, ask_nvml

CPU = torch.device("cpu")


def test_cpu_is_described() -> None:
    info = describe(CPU)
    assert info.kind == "cpu"
    assert info.name
    assert 1 <= info.cores <= (os.cpu_count() or 1)
    assert info.memory > 2**28
    assert info.versions["torch"] == torch.__version__
    assert type(info).model_validate_json(info.model_dump_json()) == info


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "CPU", "mps"])
def test_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        resolve_device(name)


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(EnvironmentUnfit, match="no CUDA device"):
        resolve_device("cuda")


def test_missing_gpu_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(EnvironmentUnfit, match="2 CUDA devices are visible"):
        resolve_device("cuda:2")


def test_memory_is_checked_before_anything_is_allocated() -> None:
    assert 0 < free_memory(CPU) <= describe(CPU).memory
    require_memory(CPU, 1, "a byte")
    with pytest.raises(DoesNotFit, match="a planet needs"):
        require_memory(CPU, 2**60, "a planet")


def test_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_CGROUP", tmp_path)
    unlimited = free_memory(CPU)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4500\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 300\n")
    assert free_memory(CPU) == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == pytest.approx(unlimited, rel=0.2)


# NVML


class FakeNvml:
    """Just enough of pynvml's surface to answer, refuse or hang."""

    def __init__(self, version: object) -> None:
        self.version = version

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        if callable(self.version):
            self.version()
        return str(self.version)


def driver(fake: object, monkeypatch: pytest.MonkeyPatch) -> tuple[str | None, str]:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return ask_nvml(lambda library: library.nvmlSystemGetDriverVersion())


def test_nvml_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver(FakeNvml("570.1"), monkeypatch) == ("570.1", "")


def test_absent_nvml_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, note = driver(None, monkeypatch)
    assert answer is None
    assert "ModuleNotFoundError" in note or "ImportError" in note


def test_refusing_nvml_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("Driver Not Loaded")

    assert driver(FakeNvml(refuse), monkeypatch) == (None, "NVML: RuntimeError: Driver Not Loaded")


def test_hanging_nvml_does_not_hang_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "NVML_TIMEOUT", 0.05)
    release = threading.Event()
    assert driver(FakeNvml(release.wait), monkeypatch) == (None, "NVML did not answer within 0.05 s")
    release.set()


def test_only_hard_throttling_counts() -> None:
    quiet = GpuState(
        sm_clock=1980, memory_clock=3201, temperature=60, power=300.0, energy=1.0, throttle=0x1 | 0x4, processes=1
    )
    assert quiet.hard_throttle == []
    assert quiet.model_copy(update={"throttle": 0x48}).hard_throttle == ["slowdown", "thermal (hardware)"]


# Failures of the device


def test_full_gpu_does_not_fit() -> None:
    with pytest.raises(DoesNotFit, match="ran out of memory: CUDA out of memory"), device_errors(CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


@pytest.mark.parametrize(
    "message", ["CUDA error: device lost", "CUDA driver error: unknown", "No CUDA GPUs are available"]
)
def test_lost_gpu_is_no_bug(message: str) -> None:
    gpu = torch.device("cuda", 0)
    with pytest.raises(EnvironmentUnfit, match="cuda:0 failed"), device_errors(gpu):
        raise RuntimeError(message)


def test_other_failures_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), device_errors(torch.device("cuda", 0)):
        raise RuntimeError("shapes do not match")
