"""What is known of an evaluation while it runs: results, times, and what a failure means.

The driver imports this module too, so torch is loaded only to classify what an evaluation raised.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from archsearch.architecture import Architecture
from archsearch.errors import ArchsearchError, InvalidArchitecture
from archsearch.evaluation import Evaluation, Outcome, Rung
from archsearch.stopping import Verdict

_CPU_OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")
_ended: float | None = None
"""When the last evaluation of this process ended, on the wall clock."""


@contextmanager
def accounted(seconds: dict[str, float]) -> Iterator[None]:
    """Add what the phases leave out: ``idle`` before, since the last one or the start of the process, and ``other``."""
    global _ended
    begin = time.time()
    idle = max(begin - (psutil.Process().create_time() if _ended is None else _ended), 0.0)
    try:
        yield
    finally:
        _ended = time.time()
        seconds["other"] = max(_ended - begin - sum(seconds.values()), 0.0)
        seconds["idle"] = idle


@dataclass
class Record:
    """What is known of an evaluation so far; it outlives the failure of a phase."""

    architecture: Architecture
    seed: int
    outcome: Outcome = Outcome.OK
    error: str = ""
    objectives: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    rungs: tuple[Rung, ...] = ()
    verdict: Verdict | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    device: str = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside, in seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start

    def fail(self, error: Exception) -> None:
        """The evaluation ended with ``error``; what came before it stays."""
        self.outcome = classify(error)
        self.curve = getattr(error, "curve", self.curve)
        self.error = _explain(error, self.outcome)

    def evaluation(self) -> Evaluation:
        """The finished evaluation; objectives count only where all went well."""
        objectives = self.objectives if self.outcome is Outcome.OK else {}
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Evaluation(**{**fields, "objectives": objectives})


def classify(error: Exception) -> Outcome:
    """The outcome that an exception of an evaluation means."""
    import torch

    from archsearch.latency.device import DoesNotFit
    from archsearch.latency.validity import InvalidMeasurement
    from archsearch.model.self_check import WrongKernels
    from archsearch.proxy.result import NonFiniteLoss
    from archsearch.proxy.rungs import Stopped

    outcomes: list[tuple[type[Exception], Outcome]] = [
        (Stopped, Outcome.STOPPED),
        (InvalidArchitecture, Outcome.INFEASIBLE),
        (InvalidMeasurement, Outcome.INVALID_MEASUREMENT),
        (WrongKernels, Outcome.INVALID_MEASUREMENT),
        (NonFiniteLoss, Outcome.NAN),
        (DoesNotFit, Outcome.OOM),
        (MemoryError, Outcome.OOM),
        (torch.OutOfMemoryError, Outcome.OOM),
    ]
    for kind, outcome in outcomes:
        if isinstance(error, kind):
            return outcome
    exhausted = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _CPU_OUT_OF_MEMORY)
    return Outcome.OOM if exhausted else Outcome.CRASH


def _explain(error: Exception, outcome: Outcome) -> str:
    if isinstance(error, ArchsearchError):
        return f"{type(error).__name__}: {error.cause}; {error.remedy}"
    if outcome is Outcome.CRASH:
        return "".join(traceback.format_exception(error)).strip()
    return str(error) if outcome is Outcome.STOPPED else f"{type(error).__name__}: {error}"
