"""Signals: the first asks a search to stop and leaves it some seconds, the second ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 0}


class Interrupted(BaseException):
    """Raised inside ``waiting`` when the search must end at once."""


class Interrupts:
    """Catches SIGINT, SIGTERM and SIGUSR1 while it is entered. In other threads than the main one it does nothing.

    Args:
        grace: seconds between the first signal and the forced end.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._waiting = False
        self._since: float | None = None
        self._forced = False
        self._previous: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """What a process that was asked to stop by this signal ends with."""
        return 0 if self.received is None else EXIT_CODES[self.received]

    @property
    def forced(self) -> bool:
        """Whether the search must end now."""
        return self._forced or (self._since is not None and time.monotonic() - self._since >= self._grace)

    @contextmanager
    def waiting(self, *, interruptible: bool) -> Iterator[None]:
        """Around a wait in which nothing is half done.

        Raises Interrupted before it where the search must end now, and inside it at such a signal
        where it is ``interruptible``: where no foreign code is in between that an exception would upset.
        """
        if self.forced:
            raise Interrupted
        self._waiting = interruptible
        try:
            yield
        finally:
            self._waiting = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._on_signal)
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            self._force()
            return
        self.received, self._since = signal.Signals(number), time.monotonic()
        # An evaluation in this very thread gives the loop no chance to look at the clock.
        signal.setitimer(signal.ITIMER_REAL, max(self._grace, 1e-3))

    def _on_alarm(self, number: int, _: FrameType | None) -> None:
        self._force()

    def _force(self) -> None:
        self._forced = True
        if self._waiting:
            raise Interrupted
