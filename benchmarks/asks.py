"""How long proposals take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from archsearch.search.ledger import Ledger


class TimedLedger(Ledger):
    """Notes the seconds that each proposal takes: of this process's CPU, so that other processes do not count."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.seconds: list[float] = []

    def propose(self, sampler: BaseSampler) -> FrozenTrial:
        """Ask."""
        start = time.process_time()
        trial = super().propose(sampler)
        self.seconds.append(time.process_time() - start)
        return trial


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: the median, the mean, the 95th percentile and the longest."""
    ms = 1e3 * np.array(seconds)
    found = {"median": np.median(ms), "mean": ms.mean(), "p95": np.quantile(ms, 0.95), "max": ms.max()}
    return {name: round(float(value), 2) for name, value in found.items()}
