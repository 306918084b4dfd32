"""How a search goes: a live line on a terminal, one line a minute elsewhere; always on stderr."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from archsearch.commands.console import say
from archsearch.commands.spaces import duration

if TYPE_CHECKING:
    from archsearch.search.progress import Progress

SECONDS_A_LINE = 60.0


class SearchProgress:
    """Shows the last ``Progress`` it was given, between ``with`` and its end.

    Args:
        objective: name of the first objective, whose least value is shown.
        every: seconds between two lines where there is no terminal.
    """

    def __init__(self, objective: str, every: float = SECONDS_A_LINE) -> None:
        self._objective = objective
        self._every = every
        self._last: Progress | None = None
        self._given = time.monotonic()
        self._ended = threading.Event()
        self._live: Live | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SearchProgress:
        console = Console(stderr=True, highlight=False)
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)
            self._live.start()
        else:
            self._thread = threading.Thread(target=self._write_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()
        if self._thread is not None:
            self._thread.join()
            self._write()

    def update(self, progress: Progress) -> None:
        """Take the newest state."""
        self._last, self._given = progress, time.monotonic()

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of everything that is shown."""
        now = self._last
        if now is None:
            return [("", "starting")]
        facts = [("done", f"{now.done}/{now.total}"), ("running", str(now.running)), ("failed", str(now.failed))]
        if now.stopped:
            facts.append(("stopped", str(now.stopped)))
        if now.best_loss is not None:
            facts.append((f"best {self._objective.replace('_', ' ')}", f"{now.best_loss:.4g}"))
        if now.front_size is not None:
            facts.append(("front", str(now.front_size)))
        if now.hypervolume is not None:
            facts.append(("hypervolume", f"{now.hypervolume:.4g}"))
        if now.seconds_left is not None:
            facts.append(("left", duration(max(0.0, now.seconds_left - (time.monotonic() - self._given)))))
        return facts

    def _render(self) -> RenderableType:
        row = Table.grid(padding=(0, 1))
        line = Text("  ").join(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in self.facts())
        if self._last is None:
            row.add_row(line)
        else:
            row.add_row(ProgressBar(total=self._last.total, completed=self._last.done, width=16), line)
        return row

    def _write_lines(self) -> None:
        while not self._ended.wait(self._every):
            self._write()

    def _write(self) -> None:
        say(", ".join(f"{name} {value}".strip() for name, value in self.facts()))
