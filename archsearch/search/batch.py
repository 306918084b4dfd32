"""Batch: evaluates a list of architectures outside of any study, in the same workers, and keeps each result as a file.

For what is trained beside a search: replicates of the front, the sample of ``validate-proxy``. A file that is there
is never made again, so a batch goes on where it was killed.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.errors import ArchsearchError, StorageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.files import to_json, write_atomic
from archsearch.search.breaker import Breaker
from archsearch.search.executors import Executor
from archsearch.search.folder import RunFolder
from archsearch.search.interrupts import Interrupted, Interrupts
from archsearch.search.progress import Progress, Summary

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """One evaluation of a batch; ``name`` is that of its file, without the ending."""

    name: str
    architecture: Architecture
    seed: int


def read_result(folder: Path, name: str) -> Evaluation | None:
    """The result of a task, or None before it has one. Raises StorageError where it is damaged."""
    path = folder / f"{name}.json"
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise StorageError(f"cannot read {path}: {reason}", "remove the file to have it made again") from error


def run_batch(
    config: RunConfig,
    tasks: Sequence[Task],
    folder: Path,
    start_executor: Callable[[], Executor],
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Evaluate what has no result yet. The caller holds the lock of the run that ``folder`` belongs to.

    Args:
        config: its ``execution`` and, for the free disk, nothing else are read.
        tasks: with different names.
        folder: of the results, ``NAME.json`` each; made where it is missing.
        start_executor: called only if something is missing.
        on_progress: called after every result, in this thread.

    Raises:
        SearchStopped: too many evaluations failed; the batch goes on where it was.
        StorageError: the folder cannot be written, or the disk is nearly full.
        EnvironmentUnfit: the workers cannot be had.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {folder}: {error.strerror}", "make its folder writable") from error
    batch = _Batch(config, tasks, folder, on_progress)
    if batch.waiting:
        executor = start_executor()
        try:
            with batch.interrupts, suppress(Interrupted):
                while batch.step(executor):
                    pass
        finally:
            executor.close()
    if batch.error is not None:
        raise batch.error
    return batch.summary()


class _Batch:
    """One session of a batch."""

    def __init__(
        self, config: RunConfig, tasks: Sequence[Task], folder: Path, on_progress: Callable[[Progress], None] | None
    ) -> None:
        found = {task.name: read_result(folder, task.name) for task in tasks}
        self.tasks, self.folder, self.on_progress = tasks, folder, on_progress
        self.waiting = deque(index for index, task in enumerate(tasks) if found[task.name] is None)
        self.running: set[int] = set()
        self.done = len(tasks) - len(self.waiting)
        self.failed = sum(not result.ok for result in found.values() if result is not None)
        self.error: ArchsearchError | None = None
        self.interrupts = Interrupts(config.execution.grace)
        self.breaker, self.run = Breaker(config.execution), RunFolder(folder)
        self.attempts: Counter[tuple[int, Outcome]] = Counter()
        self.grace, self.patience = config.execution.grace, math.inf
        self.begin, self.before = time.monotonic(), self.done

    def step(self, executor: Executor) -> bool:
        """Submit, wait, keep; whether there is more to do."""
        while self.waiting and len(self.running) < executor.capacity and self._wanted():
            index = self.waiting.popleft()
            self.running.add(index)
            executor.submit(index, self.tasks[index].architecture, self.tasks[index].seed)
        self._report()
        if not self.running or time.monotonic() >= self.patience:
            return False
        with self.interrupts.waiting(interruptible=executor.interruptible):
            finished = executor.wait(POLL_SECONDS)
        for index, evaluation in finished:
            self._settle(index, evaluation)
        return True

    def _wanted(self) -> bool:
        """Whether to begin another one."""
        if self.error is None and self.interrupts.received is None:
            try:
                self.breaker.check_disk(self.run)
            except StorageError as error:
                self._stop(error)
        return self.error is None and self.interrupts.received is None

    def _settle(self, index: int, evaluation: Evaluation) -> None:
        self.running.remove(index)
        self.attempts[index, evaluation.outcome] += 1
        limit, tried = evaluation.outcome.max_attempts, self.attempts[index, evaluation.outcome]
        if limit is not None and tried < limit:
            self.waiting.appendleft(index)
            return
        try:
            self.breaker.count(evaluation)
        except ArchsearchError as error:
            self._stop(error)
        if limit is None:
            self.waiting.appendleft(index)
            return
        path = self.folder / f"{self.tasks[index].name}.json"
        write_atomic(path, to_json(evaluation.model_dump(mode="json")))
        self.done += 1
        self.failed += not evaluation.ok

    def _stop(self, error: ArchsearchError) -> None:
        """Leave what runs the grace of a signal, then end."""
        self.error = self.error or error
        self.patience = min(self.patience, time.monotonic() + self.grace)

    def _report(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self._progress())

    def _progress(self) -> Progress:
        elapsed = time.monotonic() - self.begin
        fresh, left = self.done - self.before, len(self.tasks) - self.done
        return Progress(
            done=self.done,
            total=len(self.tasks),
            running=len(self.running),
            failed=self.failed,
            best_loss=None,
            front_size=None,
            hypervolume=None,
            elapsed=elapsed,
            seconds_left=elapsed / fresh * left if fresh else None,
        )

    def summary(self) -> Summary:
        """How the session ended."""
        self._report()
        signal, left = self.interrupts.received, len(self.tasks) - self.done
        if signal is not None and left:
            message = f"stopped by {signal.name}; {left} of {len(self.tasks)} trainings are left"
            return Summary("interrupted", message, self.interrupts.exit_code, self._progress())
        return Summary("finished", f"{self.done} trainings done", 0, self._progress())
