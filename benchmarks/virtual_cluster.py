"""A cluster in virtual time: an executor with thousands of workers that compute nothing."""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass

import numpy as np

from archsearch.architecture import Architecture
from archsearch.evaluation import Evaluation, Evaluator, Outcome
from archsearch.search.executors import Finished, failed


@dataclass(frozen=True)
class Workload:
    """What an evaluation on the cluster is like; times in seconds."""

    mean: float
    sigma: float
    failures: float
    restart: float
    seed: int


class VirtualCluster:
    """An executor whose workers live in virtual time.

    The clock stands still while the simulation itself computes, and runs while the driver does.
    """

    interruptible = False

    def __init__(self, workers: int, evaluator: Evaluator, load: Workload) -> None:
        self._workers = workers
        self._evaluator = evaluator
        self._load = load
        self._rng = np.random.default_rng(load.seed)
        self._events: list[tuple[float, int, int, Architecture | None, int]] = []
        self._order = 0
        self._restarting = 0
        self._clock = 0.0
        self._handed_over = time.process_time()
        self._spans: list[tuple[float, float]] = []
        self._seen: set[int] = set()
        self._last_new = 0.0
        self.driver_seconds = 0.0
        self.results = 0

    @property
    def capacity(self) -> int:
        """Workers that are not restarting."""
        return self._workers - self._restarting

    @property
    def clock(self) -> float:
        """Virtual seconds since the start, the driver's present thought included."""
        return self._clock + time.process_time() - self._handed_over

    def submit(self, key: int, architecture: Architecture, seed: int, stopping: object = None) -> None:
        """Draw how long it will take."""
        now, load = self.clock, self._load
        # Mean of a log-normal distribution: exp(mu + sigma^2 / 2).
        seconds = float(self._rng.lognormal(math.log(load.mean) - load.sigma**2 / 2, load.sigma))
        self._spans.append((now, now + seconds))
        self._push(now + seconds, key, architecture, seed)
        if key not in self._seen:
            self._seen.add(key)
            self._last_new = now

    def _push(self, at: float, key: int, architecture: Architecture | None, seed: int) -> None:
        self._order += 1
        heapq.heappush(self._events, (at, self._order, key, architecture, seed))

    def wait(self, timeout: float | None = None) -> Finished:
        """Let time pass until something ends; give all that has ended by then."""
        self._clock = self.clock
        self.driver_seconds += time.process_time() - self._handed_over
        if self._events:
            self._clock = max(self._clock, self._events[0][0])
        finished: Finished = []
        while self._events and self._events[0][0] <= self._clock:
            at, _, key, architecture, seed = heapq.heappop(self._events)
            if architecture is None:
                self._restarting -= 1
            else:
                finished.append((key, self._end(at, architecture, seed)))
        self.results += len(finished)
        self._handed_over = time.process_time()
        return finished

    def _end(self, at: float, architecture: Architecture, seed: int) -> Evaluation:
        if self._rng.random() >= self._load.failures:
            return self._evaluator(architecture, seed=seed)
        if self._load.restart > 0:
            self._restarting += 1
            self._push(at + self._load.restart, -1, None, 0)
        outcome = Outcome.CRASH if self._rng.random() < 0.5 else Outcome.NODE_LOST
        return failed(architecture, outcome, "simulated", seed=seed)

    def close(self) -> None:
        """Forget what is in flight."""
        self._events.clear()

    @property
    def utilisation(self) -> float:
        """Busy worker time over all worker time until the last new candidate was handed out."""
        busy = sum(min(end, self._last_new) - start for start, end in self._spans if start < self._last_new)
        return busy / (self._workers * self._last_new) if self._last_new > 0 else 1.0
