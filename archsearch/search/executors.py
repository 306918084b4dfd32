"""Executors run evaluations. The loop submits architectures under a key and waits for evaluations."""

from __future__ import annotations

import math
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.evaluation import Evaluation, Evaluator, Outcome
from archsearch.stopping import StoppingRule

Finished = list[tuple[int, Evaluation]]


class Executor(Protocol):
    """Where evaluations run. Not thread-safe."""

    @property
    def capacity(self) -> int:
        """How many evaluations may be in flight."""
        ...

    @property
    def interruptible(self) -> bool:
        """Whether a signal handler may raise inside ``wait``; one that waits much longer than told must say yes."""
        ...

    def submit(self, key: int, architecture: Architecture, seed: int, stopping: StoppingRule | None = None) -> None:
        """Start one evaluation. At most ``capacity`` are in flight, each under its own key."""
        ...

    def wait(self, timeout: float | None = None) -> Finished:
        """What has ended, in the order in which it did; waits ``timeout`` seconds at most for the first."""
        ...

    def close(self) -> None:
        """Stop everything at once. What was in flight never ends."""
        ...


class InlineExecutor:
    """Evaluates in the caller's own thread, one at a time: for debugging and tests.

    Exceptions become outcomes as on a worker. A deadline cannot be enforced here, ``wait`` always
    waits to the end, and an evaluator that takes its process down takes the search down with it.
    """

    capacity = 1
    interruptible = True

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._queue: deque[tuple[int, Architecture, int, StoppingRule | None]] = deque()

    def submit(self, key: int, architecture: Architecture, seed: int, stopping: StoppingRule | None = None) -> None:
        """Remember it; ``wait`` runs it."""
        self._queue.append((key, architecture, seed, stopping))

    def wait(self, timeout: float | None = None) -> Finished:
        """Run what was submitted first."""
        if not self._queue:
            return []
        key, architecture, seed, stopping = self._queue.popleft()
        return [(key, evaluate_once(self._evaluator, architecture, seed, stopping))]

    def close(self) -> None:
        """Forget what was submitted."""
        self._queue.clear()


def evaluate_once(
    evaluator: Evaluator, architecture: Architecture, seed: int, stopping: StoppingRule | None = None
) -> Evaluation:
    """Call an evaluator and let nothing but a sound Evaluation of this architecture come back."""
    begin = time.monotonic()
    options = {} if stopping is None else {"stopping": stopping}
    try:
        return _sound(evaluator(architecture, seed=seed, **options), architecture)
    except MemoryError as error:
        outcome, text = Outcome.OOM, _trace(error)
    except (Exception, SystemExit) as error:
        outcome, text = Outcome.CRASH, _trace(error)
    return failed(architecture, outcome, text, seed=seed, seconds=time.monotonic() - begin)


def failed(
    architecture: Architecture, outcome: Outcome, error: str, *, seed: int = 0, seconds: float = 0.0
) -> Evaluation:
    """The evaluation of what gave none itself."""
    return Evaluation(architecture=architecture, outcome=outcome, error=error, seed=seed, seconds={"total": seconds})


def with_objectives(evaluation: Evaluation, names: Sequence[str]) -> Evaluation:
    """``evaluation``, or a failed one where it is OK and lacks one of these objectives."""
    missing = [name for name in names if name not in evaluation.objectives]
    if not evaluation.ok or not missing:
        return evaluation
    error = f"the evaluation lacks the objective {missing[0]}"
    return failed(evaluation.architecture, Outcome.INVALID_MEASUREMENT, error, seed=evaluation.seed)


def _sound(result: object, architecture: Architecture) -> Evaluation:
    """``result`` once through JSON, which is how it travels and is kept."""
    if not isinstance(result, Evaluation):
        raise TypeError(f"the evaluator returned {type(result).__name__}, not an Evaluation")
    if result.architecture.id != architecture.id:
        raise ValueError("the evaluator returned the evaluation of another architecture")
    for name, value in result.objectives.items():
        if not isinstance(value, int | float):
            raise TypeError(f"the objective {name} is {value!r}, not a number")
        if not math.isfinite(value):
            error = f"the objective {name} is {value}"
            result = result.model_copy(update={"outcome": Outcome.NAN, "objectives": {}, "error": error})
            break
    return Evaluation.model_validate_json(result.model_dump_json())


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).strip()


def make_executor(config: RunConfig, evaluator: Evaluator) -> Executor:
    """The executor of ``config.execution``. Raises EnvironmentUnfit where its workers cannot be had."""
    if config.execution.executor == "inline":
        return InlineExecutor(evaluator)
    from archsearch.search.ray_cluster import prepare_environment

    prepare_environment()
    from archsearch.search.ray_executor import RayExecutor

    return RayExecutor(config.execution, evaluator)
