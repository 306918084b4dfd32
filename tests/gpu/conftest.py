"""``TRITON_FIRST_CONFIG=1`` makes Triton's autotuners keep the first configuration that runs.

Timing all of them takes minutes for a kind of operator; what the tests check is right or wrong for any of them.
"""

from __future__ import annotations

import os
from typing import Any


def pytest_configure() -> None:
    if os.environ.get("TRITON_FIRST_CONFIG") == "1":
        _keep_first_configuration()


def _keep_first_configuration() -> None:
    from triton.runtime.autotuner import Autotuner

    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def begin(self: Any, kwargs: Any) -> Any:
        # nothing of this may reach the cache on disk, where later runs would find it
        self.found, self.cache_results = False, False
        return prune(self, kwargs)

    def first(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        if self.found:
            return [float("inf")] * 3
        times = bench(self, *args, config=config, **meta)
        self.found = times[0] != float("inf")
        return times

    Autotuner.prune_configs, Autotuner._bench = begin, first
