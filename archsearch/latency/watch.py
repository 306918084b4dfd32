"""A look at the GPU before, between and after the passes of a measurement, never while one is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from archsearch.latency.canary import time_canary
from archsearch.latency.lock import count_present, device_key
from archsearch.latency.nvml import GpuState, gpu_state
from archsearch.latency.validity import Disturbed

CANARY_MOVES = 0.01
"""Relative change of the canary's step time above which a measurement does not count."""
ATTEMPTS = 3
"""Measurements before a disturbed one is given up."""
POWER_CAP = 0x4
T = TypeVar("T")
CPU_NOTE = "on a CPU: no clocks, throttle reasons, energy or canary; times are wall clock"


class Watch:
    """What NVML and the canary said.

    Args:
        device: that is timed.
        others: whether other processes on a GPU make a measurement invalid, or are noted.

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
            cause = f"{strangers} other process(es) use the GPU"
            if self.others == "refuse":
                raise Disturbed(cause, "end them, or accept a weaker number with latency.others=note")
            self.notes.append(cause)

    def sing(self) -> None:
        """Time the canary.

        Raises:
            Disturbed: it moved since the last time.
        """
        if self.device.type == "cpu":
            return
        self.canary.append(time_canary(self.device))
        before, after = self.canary[0], self.canary[-1]
        if abs(after - before) > CANARY_MOVES * before:
            cause = f"the canary's step went from {before:.4f} to {after:.4f} ms during the measurement"
            raise Disturbed(cause, "leave the machine alone while it measures")


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
