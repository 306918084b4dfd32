"""Reporter: tells whoever watches a search how it stands, once for every result."""

from __future__ import annotations

import time
from collections.abc import Callable

from archsearch.evaluation import Outcome
from archsearch.search.progress import Progress, Standing

OnProgress = Callable[[Progress], None]


class Reporter:
    """The news of one session.

    Args:
        standing: of the search, kept up to date by the loop.
        total: the budget in evaluations.
        tell: called for every piece of news; nobody listens where None.
    """

    def __init__(self, standing: Standing, total: int, tell: OnProgress | None) -> None:
        self._standing, self._total, self._tell = standing, total, tell
        self._news: list[tuple[int | None, Outcome | None]] = [(None, None)]
        self._begin = time.monotonic()
        self._done_before = 0

    def begin(self) -> None:
        """What is done by now does not count for the pace."""
        self._done_before = self._standing.done

    def note(self, number: int, outcome: Outcome) -> None:
        """The end of a trial, to be told."""
        self._news.append((number, outcome))

    def report(self, running: int) -> None:
        """Tell what was noted since the last time, with ``running`` evaluations in flight."""
        news, self._news = self._news, []
        if self._tell is not None:
            for latest, outcome in news:
                self._tell(self.progress(running, latest, outcome))

    def progress(self, running: int, latest: int | None = None, outcome: Outcome | None = None) -> Progress:
        """How the search stands now."""
        standing, elapsed = self._standing, time.monotonic() - self._begin
        pace = elapsed / fresh if (fresh := standing.done - self._done_before) > 0 else None
        return Progress(
            done=standing.done,
            total=self._total,
            running=running,
            failed=standing.failed,
            stopped=standing.stopped,
            best_loss=standing.best,
            front_size=standing.front_size,
            hypervolume=standing.hypervolume,
            elapsed=elapsed,
            seconds_left=None if pace is None else pace * max(self._total - standing.done, 0),
            latest=latest,
            outcome=outcome,
        )
