"""Breakers: what ends a search before it wastes a night or fills a disk. The run stays resumable."""

from __future__ import annotations

from collections import deque
from textwrap import shorten

from archsearch.config import ExecutionConfig
from archsearch.errors import SearchStopped, StorageError
from archsearch.evaluation import Evaluation
from archsearch.search.filesystem import free_bytes
from archsearch.search.folder import RunFolder

WINDOW = 20
SHOWN = 160


class Breaker:
    """Looks at the last evaluations of this session and at the free disk."""

    def __init__(self, config: ExecutionConfig) -> None:
        self._config = config
        self._recent: deque[bool] = deque(maxlen=max(WINDOW, config.failure_minimum))

    def count(self, evaluation: Evaluation) -> None:
        """Take note of how one ended. Raises SearchStopped where it failed, as too many of the last ones did."""
        failed = evaluation.outcome.is_failure
        self._recent.append(failed)
        tries, failures = len(self._recent), sum(self._recent)
        if failed and tries >= self._config.failure_minimum and failures > self._config.failure_rate * tries:
            # Of a traceback, the line that counts is the last.
            line = (evaluation.error.strip().splitlines() or [""])[-1]
            last = f"{evaluation.outcome} {shorten(line, SHOWN)}".rstrip()
            raise SearchStopped(
                f"{failures} of the last {tries} evaluations failed; the last one: {last}",
                "mend the cause (see the run's trials/*.json), then `archsearch resume`",
            )

    def check_disk(self, folder: RunFolder | None) -> None:
        """Raise StorageError when the disk of the run is nearly full."""
        if folder is None or (free := free_bytes(folder.path)) >= self._config.min_free_bytes:
            return
        least = self._config.min_free_bytes
        raise StorageError(
            f"{folder.path}: {free / 2**20:,.0f} MiB free, the search stops below {least / 2**20:,.0f} MiB",
            "free space, then `archsearch resume`",
        )
