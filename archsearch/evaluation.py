"""What a worker returns for one architecture, and the protocol of everything that evaluates."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, Protocol

from pydantic import Field, model_validator

from archsearch.architecture import Architecture
from archsearch.schema import Frozen
from archsearch.stopping import StoppingRule, Verdict


class Outcome(StrEnum):
    """How an evaluation ended. Every outcome is a fact about the candidate, or about its worker."""

    OK = "OK"
    STOPPED = "STOPPED"
    INFEASIBLE = "INFEASIBLE"
    NAN = "NAN"
    OOM = "OOM"
    TIMEOUT = "TIMEOUT"
    CRASH = "CRASH"
    NODE_LOST = "NODE_LOST"
    INVALID_MEASUREMENT = "INVALID_MEASUREMENT"
    CANCELLED = "CANCELLED"

    @property
    def is_failure(self) -> bool:
        """Whether something went wrong, as opposed to a verdict on the candidate."""
        return self not in (Outcome.OK, Outcome.STOPPED, Outcome.INFEASIBLE)

    @property
    def poisons_worker(self) -> bool:
        """Whether the worker that met it must be replaced, so that the next candidate finds a clean one."""
        return self in (Outcome.OOM, Outcome.TIMEOUT, Outcome.CRASH, Outcome.NODE_LOST)

    @property
    def max_attempts(self) -> int | None:
        """How often a candidate with this outcome is run in all; None where it is run until it ends otherwise."""
        if self in (Outcome.NODE_LOST, Outcome.CANCELLED):
            return None
        return 2 if self is Outcome.CRASH else 1


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats a token, finite for losses that a diverging training ends with."""
    return math.exp(min(loss, 700.0))


class Rung(Frozen):
    """What was known of a candidate at a rung of its training: ``loss`` as it was there, the others as measured."""

    tokens: int
    objectives: dict[str, float]


class Evaluation(Frozen):
    """The record of one evaluation. Written as JSON; never holds NaN or infinity.

    ``objectives`` are minimised and present when the outcome is OK, and only then. ``seconds`` holds the
    wall-clock time of each phase. ``paths`` says which implementation ran (an operator kind or a
    phase to a name), so that a slow path cannot hide. ``curve`` is the proxy's
    (tokens, loss in nats a token) at each validation, ``rungs`` what was known at each rung that was reached,
    ``verdict`` why a stopped candidate stopped at the last of them.
    """

    architecture: Architecture
    outcome: Outcome
    objectives: dict[str, float] = {}
    metrics: dict[str, Any] = {}
    curve: tuple[tuple[int, float], ...] = ()
    rungs: tuple[Rung, ...] = ()
    verdict: Verdict | None = None
    seconds: dict[str, float] = {}
    paths: dict[str, str] = {}
    device: str = ""
    seed: int = 0
    attempts: int = Field(1, ge=1)
    error: str = ""

    @model_validator(mode="after")
    def _verdict_if_stopped(self) -> Evaluation:
        stopped = self.outcome is Outcome.STOPPED
        if stopped != (self.verdict is not None) or (stopped and not self.rungs):
            raise ValueError("a stopped evaluation has a rung and a verdict, and no other has a verdict")
        return self

    @property
    def ok(self) -> bool:
        """Whether the objectives count."""
        return self.outcome is Outcome.OK


class Evaluator(Protocol):
    """Turns an architecture into an evaluation. Called in a worker; must be picklable."""

    def __call__(self, architecture: Architecture, *, seed: int, stopping: StoppingRule | None = None) -> Evaluation:
        """Evaluate once. Ordinary failures come back as outcomes; only bugs and lost processes raise.

        ``stopping`` is passed where ``proxy.rungs`` are set, and only there.
        """
        ...
