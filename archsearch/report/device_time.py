"""Where the device's time went: what workers trained and measured, and what they did or waited for besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from archsearch.search.study import Candidate

TRAINING = ("train", "recall")
MEASURING = ("latency",)


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Seconds of all workers together, by phase, as the evaluations recorded them.

    ``idle`` is the time between two evaluations of a worker, and from the start of its process to the first;
    ``prepare`` and ``wait`` come before a measurement: building and checking, and other measurements on the device;
    ``total`` is all that is known of evaluations whose worker was lost.
    """

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    def share(self, *phases: str) -> float:
        """Part of the total that went into these phases."""
        return sum(self.seconds.get(phase, 0.0) for phase in phases) / self.total if self.total else 0.0

    @property
    def overhead(self) -> float:
        """Part of the total that was neither training nor measuring."""
        return 1 - self.share(*TRAINING, *MEASURING) if self.total else 0.0

    @property
    def others(self) -> list[str]:
        """The other phases, the longest first."""
        rest = self.seconds.keys() - {*TRAINING, *MEASURING}
        return sorted(rest, key=lambda phase: -self.seconds[phase])

    def __str__(self) -> str:
        shares = (
            f"{self.share(*TRAINING):.0%} training, {self.share(*MEASURING):.0%} measuring, {self.overhead:.1%} else"
        )
        rest = ", ".join(f"{phase} {self.share(phase):.1%}" for phase in self.others if self.share(phase) >= 5e-4)
        return f"{self.total / 60:.1f} minutes of the workers: {shares}" + (f" ({rest})" if rest else "")


def device_time(candidates: Iterable[Candidate]) -> DeviceTime:
    """The time of all evaluations, duplicates left out."""
    seconds: dict[str, float] = {}
    for candidate in candidates:
        if candidate.is_distinct and candidate.evaluation is not None:
            for phase, value in candidate.evaluation.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + value
    return DeviceTime(seconds)
