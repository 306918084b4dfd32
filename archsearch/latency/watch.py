"""A look at the GPU before, between and after the passes of a measurement, never while one is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from archsearch.latency.canary import canary_bytes, time_canary
from archsearch.latency.lock import count_present, device_key
from archsearch.latency.nvml import GpuState, gpu_state, peak_bandwidth
from archsearch.latency.validity import Disturbed

MOVES, SLOWER, SLOWEST = 0.01, 0.05, 0.6
"""What the canary may do: its relative change during a measurement; how much slower it may be than ever before in this
process, as heat explains some of that; the share of the memory's peak rate that it must reach at least."""
_best: dict[torch.device, float] = {}
ATTEMPTS = 3
"""Measurements before a disturbed one is given up."""
POWER_CAP = 0x4
T = TypeVar("T")
CPU_NOTE = "on a CPU: no clocks, throttle reasons, energy or canary; times are wall clock"


class Watch:
    """What NVML and the canary said.

    Args:
        device: that is timed.
        others: whether signs of other processes on a GPU make a measurement invalid, or are noted.

    Attributes:
        states: NVML's view at each look; empty on a CPU, or without NVML.
        canary: its milliseconds a step, before and after.
        notes: what is missing, or weakens the numbers.
    """

    def __init__(self, device: torch.device, others: Literal["refuse", "note"]) -> None:
        self.device, self.others = device, others
        self.states: list[GpuState] = []
        self.canary: list[float] = []
        self.notes: list[str] = [CPU_NOTE] if device.type == "cpu" else []

    def look(self) -> None:
        """Ask NVML.

        Raises:
            Disturbed: the GPU slows itself down, or somebody else uses it.
        """
        if self.device.type == "cpu":
            return
        state, problem = gpu_state(device_key(self.device))
        if state is None:
            self.notes.append(problem)
            return
        self.states.append(state)
        if state.hard_throttle:
            cause = f"the GPU throttled while it was timed: {', '.join(state.hard_throttle)}"
            raise Disturbed(cause, "let it cool down or mend its power supply, then measure again")
        if state.throttle & POWER_CAP:
            self.notes.append("the power cap lowered the clocks")
        if (strangers := state.processes - count_present(self.device)) > 0:
            self._shared(f"{strangers} other process(es) use the GPU")
        elif state.processes == 0:
            self.notes.append("NVML shows no processes here, not even this one: the canary alone tells of others")

    def sing(self) -> None:
        """Time the canary.

        Raises:
            Disturbed: it moved since the last time, is slower than it was before in this process, or so slow that
                somebody else must have the GPU most of the time.
        """
        if self.device.type == "cpu":
            return
        now = time_canary(self.device)
        self.canary.append(now)
        best = _best[self.device] = min(now, _best.get(self.device, now))
        peak = peak_bandwidth(device_key(self.device))
        if abs(now - self.canary[0]) > MOVES * self.canary[0]:
            self._shared(f"the canary's step went from {self.canary[0]:.4f} to {now:.4f} ms during the measurement")
        elif now > (1 + SLOWER) * best:
            self._shared(f"the canary's step takes {now:.4f} ms and took {best:.4f} ms before")
        elif canary_bytes() / (now * 1e-3) < SLOWEST * peak:
            self._shared(f"the canary reads {canary_bytes() / now / 1e9:.2f} TB/s of the {peak / 1e12:.2f} possible")

    def _shared(self, cause: str) -> None:
        if self.others == "refuse":
            remedy = "leave the GPU to the measurement, or accept a weaker number with latency.others=note"
            raise Disturbed(cause, remedy)
        self.notes.append(cause)


def watched(device: torch.device, others: Literal["refuse", "note"], run: Callable[[], T]) -> tuple[T, list[str]]:
    """Run a measurement until nothing disturbs it: its result, and what weakens it.

    Raises:
        Disturbed: something did each time.
    """
    for attempt in range(1, ATTEMPTS + 1):
        watch = Watch(device, others)
        try:
            watch.sing()
            watch.look()
            result = run()
            watch.sing()
            watch.look()
            return result, watch.notes
        except Disturbed:
            if attempt == ATTEMPTS:
                raise
    raise AssertionError("unreachable")
