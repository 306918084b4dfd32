"""NVML: what a GPU is doing. Works without it, and says so; a sick GPU cannot hang the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from archsearch.schema import Frozen

NVML_TIMEOUT = 5.0
"""Seconds that one question may take: on a sick GPU it hangs for ever."""
_HARD_THROTTLE = {"slowdown": 0x8, "thermal (software)": 0x20, "thermal (hardware)": 0x40, "power brake": 0x80}
T = TypeVar("T")


class GpuState(Frozen):
    """What NVML says of a GPU at one moment: MHz, degrees Celsius, watts, joules since the driver was loaded."""

    sm_clock: int
    memory_clock: int
    temperature: int
    power: float
    energy: float
    throttle: int
    processes: int

    @property
    def hard_throttle(self) -> list[str]:
        """Reasons for which the GPU slows itself down beyond its usual power limit."""
        return [name for name, bit in _HARD_THROTTLE.items() if self.throttle & bit]


def ask_nvml(question: Callable[[Any], T]) -> tuple[T | None, str]:
    """(answer, ""), or (None, why there is none): NVML may be missing, refuse, or hang."""
    box: list[tuple[T | None, str]] = []

    def ask() -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            box.append((question(pynvml), ""))
        except Exception as error:
            box.append((None, f"NVML: {type(error).__name__}: {error}"))

    thread = threading.Thread(target=ask, daemon=True, name="nvml")
    thread.start()
    thread.join(NVML_TIMEOUT)
    return box[0] if box else (None, f"NVML did not answer within {NVML_TIMEOUT:g} s")


def peak_bandwidth(uuid: str) -> float:
    """Bytes a second that a GPU's memory clock and bus allow; 0 where NVML does not say."""
    found, _ = ask_nvml(lambda nvml: _read_peak(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)))
    return found or 0.0


def _read_peak(nvml: Any, handle: Any) -> float:
    clock = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
    # two transfers a clock
    return float(2 * clock * 1e6 * nvml.nvmlDeviceGetMemoryBusWidth(handle) / 8)


def gpu_state(uuid: str) -> tuple[GpuState | None, str]:
    """Clocks, power, throttling and processes of a GPU, or None and the reason; never asked while timing."""
    return ask_nvml(lambda nvml: _read_state(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)))


def _read_state(nvml: Any, handle: Any) -> GpuState:
    return GpuState(
        sm_clock=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        memory_clock=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        temperature=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        power=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        energy=nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
        throttle=nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        processes=len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    )
