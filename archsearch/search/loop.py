"""The search loop: ask, submit, wait, commit. No generations: a worker that is free gets the next candidate.

Every result is committed before it may influence anything, so the process can be killed at any
moment. What was in flight is evaluated again when the run is resumed, under its own trial number.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.errors import ArchsearchError, InvalidArchitecture
from archsearch.evaluation import Evaluation, Evaluator, Outcome
from archsearch.search.aging import AgingEvolutionSampler, SpaceExhausted
from archsearch.search.breaker import Breaker
from archsearch.search.executors import Executor, make_executor, with_objectives
from archsearch.search.folder import RunFolder
from archsearch.search.interrupts import Interrupted, Interrupts
from archsearch.search.ledger import REFERENCE, Ledger, outcome_of
from archsearch.search.progress import Reason, Standing, Summary
from archsearch.search.reporter import OnProgress, Reporter
from archsearch.search.rungs import Rungs
from archsearch.search.samplers import make_sampler
from archsearch.search.study import is_evaluated, is_refused

POLL_SECONDS = 0.5
MAX_REJECTED = 100


def run_search(folder: RunFolder, evaluator: Evaluator, *, on_progress: OnProgress | None = None) -> Summary:
    """Run or resume the search of a folder to its end. A finished run ends at once, unchanged.

    Args:
        folder: from ``RunFolder.create`` or ``RunFolder.open``.
        evaluator: goes to the workers.
        on_progress: called at the start and after every result, in this thread.

    Raises:
        RunInUse: another process is at work in the folder.
        SearchStopped: too many evaluations failed; the run can be resumed.
        StorageError: the disk is full or the study damaged; what was committed is safe.
        EnvironmentUnfit: the workers that the config asks for cannot be had.
    """
    config = folder.config
    with folder.lock():
        ledger = Ledger(config, folder)
        try:
            return Search(config, ledger, lambda: make_executor(config, evaluator), on_progress=on_progress).run()
        finally:
            ledger.close()


class Search:
    """One session of a search.

    Args:
        config: of the run.
        ledger: its study.
        start_executor: called only if there is something to evaluate.
        on_progress: called at the start and after every result, in this thread.
    """

    def __init__(
        self,
        config: RunConfig,
        ledger: Ledger,
        start_executor: Callable[[], Executor],
        *,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._start_executor = start_executor
        self._sampler_for = make_sampler(config)
        self._standing = Standing(config.search, ledger.attributes.get(REFERENCE))
        self._rungs = Rungs(config)
        self._breaker = Breaker(config.execution)
        self._interrupts = Interrupts(config.execution.grace)
        self._queue: deque[int] = deque()
        self._in_flight: dict[int, Architecture] = {}
        self._evaluating: dict[str, int] = {}
        self._copies: dict[int, list[int]] = {}
        self._attempts: Counter[tuple[int, Outcome]] = Counter()
        self._rejected = 0
        self._ended: tuple[Reason, str] | None = None
        self._error: ArchsearchError | None = None
        self._patience = math.inf
        self._reporter = Reporter(self._standing, config.search.evaluations, on_progress)

    def run(self) -> Summary:
        """Search until the budget is spent or something ends it. Raises as ``run_search`` does."""
        self._recover()
        self._reporter.begin()
        self._report()
        if self._wants_more:
            executor = self._start_executor()
            try:
                with self._interrupts, suppress(Interrupted):
                    while self._step(executor):
                        pass
            finally:
                executor.close()
            self._report()
        if self._error is not None:
            raise self._error
        return self._summary()

    # One round

    def _step(self, executor: Executor) -> bool:
        """Submit, wait, settle; whether there is more to do."""
        self._fill(executor)
        self._report()
        if not self._in_flight or time.monotonic() >= self._patience:
            return False
        with self._interrupts.waiting(interruptible=executor.interruptible):
            finished = executor.wait(POLL_SECONDS)
        for number, evaluation in finished:
            self._settle(executor, number, evaluation)
        return True

    @property
    def _wants_more(self) -> bool:
        return bool(self._queue or self._in_flight) or (self._ended is None and self._missing > 0)

    @property
    def _missing(self) -> int:
        """Evaluations that the budget still allows to propose."""
        return self._config.search.evaluations - self._standing.done - len(self._in_flight) - len(self._queue)

    @property
    def _stopping(self) -> bool:
        return self._error is not None or self._interrupts.received is not None

    @contextmanager
    def _breakers(self) -> Iterator[None]:
        """A breaker that trips inside leaves what is in flight the same grace as a signal does."""
        try:
            yield
        except ArchsearchError as error:
            self._error = self._error or error
            self._patience = min(self._patience, time.monotonic() + self._config.execution.grace)

    def _fill(self, executor: Executor) -> None:
        """Give every free slot something to do."""
        while len(self._in_flight) < executor.capacity and not self._stopping:
            with self._breakers():
                self._breaker.check_disk(self._ledger.folder)
            if self._error is not None:
                return
            if self._queue:
                self._resubmit(executor, self._queue.popleft())
            elif self._ended is not None or self._missing <= 0 or not self._propose(executor):
                return

    # Proposals

    def _propose(self, executor: Executor) -> bool:
        """Enter one more proposal; False where the sampler has nothing (for now, or at all)."""
        if self._rejected >= MAX_REJECTED:
            # What is in flight may teach the sampler something; if nothing is, it never will.
            if not self._in_flight:
                name = self._config.search.sampler
                self._ended = ("exhausted", f"sampler {name} proposed nothing new {MAX_REJECTED} times in a row")
            return False
        trials = self._ledger.trials
        sampler = self._sampler_for(len(trials), bool(trials) and is_refused(trials[-1]))
        try:
            trial = self._ledger.propose(sampler)
        except SpaceExhausted as error:
            self._ended = ("exhausted", error.cause)
            return False
        lineage = sampler.lineage(trial.number) if isinstance(sampler, AgingEvolutionSampler) else {}
        kind = "random" if isinstance(sampler, RandomSampler) else self._config.search.sampler
        self._enter(executor, trial, lineage or {"kind": kind})
        return True

    def _enter(self, executor: Executor, trial: FrozenTrial, lineage: dict[str, Any]) -> None:
        try:
            architecture = self._config.space.build(trial.params)
        except InvalidArchitecture as error:
            self._rejected += 1
            self._ledger.enter(trial.number, {"lineage": lineage, "reason": error.cause}, Outcome.INFEASIBLE)
            return
        attributes = {"architecture": architecture.id, "notation": architecture.notation, "lineage": lineage}
        original = self._number_of(architecture.id)
        if original is not None:
            self._rejected += 1
            self._copy(trial.number, attributes | {"duplicate_of": original}, original)
            return
        self._rejected = 0
        self._ledger.enter(trial.number, attributes | {"attempts": 1})
        self._submit(executor, trial.number, architecture)

    def _number_of(self, architecture_id: str) -> int | None:
        """The trial that evaluates or evaluated an architecture."""
        return self._standing.known.get(architecture_id, self._evaluating.get(architecture_id))

    def _copy(self, number: int, attributes: dict[str, Any], original: int) -> None:
        """Enter a proposal whose architecture is known: it shares the result and costs nothing."""
        known = self._ledger.trial(original)
        self._ledger.enter(number, attributes, outcome_of(known), known.values)
        if not known.state.is_finished():
            self._copies.setdefault(original, []).append(number)

    def _submit(self, executor: Executor, number: int, architecture: Architecture) -> None:
        self._evaluating[architecture.id] = number
        self._in_flight[number] = architecture
        executor.submit(number, architecture, self._config.search.seed, self._rungs.rule())

    def _resubmit(self, executor: Executor, number: int) -> None:
        trial = self._ledger.trial(number)
        self._ledger.note(number, {"attempts": trial.user_attrs["attempts"] + 1})
        self._submit(executor, number, self._config.space.build(trial.params))

    # Results

    def _settle(self, executor: Executor, number: int, evaluation: Evaluation) -> None:
        """Take back what a worker returned: try it again, or commit it."""
        evaluation = with_objectives(evaluation, self._config.search.objectives)
        del self._evaluating[self._in_flight.pop(number).id]
        self._attempts[number, evaluation.outcome] += 1
        limit = evaluation.outcome.max_attempts
        ended = limit is not None and self._attempts[number, evaluation.outcome] >= limit
        if ended or limit is None:
            with self._breakers():
                self._breaker.count(evaluation)
        if ended:
            self._commit(number, evaluation)
        elif not self._stopping:
            self._resubmit(executor, number)

    def _commit(self, number: int, evaluation: Evaluation) -> None:
        attempts = self._ledger.trial(number).user_attrs["attempts"]
        self._ledger.keep(number, evaluation.model_copy(update={"attempts": attempts}))
        values = [evaluation.objectives[name] for name in self._config.search.objectives] if evaluation.ok else None
        expected = self._rungs.expected(evaluation)
        for trial in (number, *self._copies.pop(number, ())):
            self._ledger.finish(trial, evaluation.outcome, values, expected)
        self._rungs.add(number, evaluation)
        self._count(number, evaluation.architecture.id, values, evaluation.outcome)
        self._drop_weights()
        self._reporter.note(number, evaluation.outcome)

    def _count(
        self, number: int, architecture_id: str, values: Sequence[float] | None, outcome: Outcome | None
    ) -> None:
        """Let a committed result count."""
        self._standing.add(number, architecture_id, values, outcome)
        self._rejected = 0
        reference = self._standing.reference
        if reference is not None and REFERENCE not in self._ledger.attributes:
            self._ledger.set_attribute(REFERENCE, list(reference))
        stop_after = self._config.search.stop_after
        if stop_after is not None and self._standing.without_gain >= stop_after and self._ended is None:
            self._ended = ("stalled", f"no gain in hypervolume over {stop_after} evaluations")

    def _drop_weights(self) -> None:
        if self._ledger.folder is not None:
            running = {architecture.id for architecture in self._in_flight.values()}
            waiting = {str(self._ledger.trial(number).user_attrs["architecture"]) for number in self._queue}
            self._ledger.folder.drop_weights(keep=self._standing.front_ids | running)
            self._ledger.folder.drop_checkpoints(keep=running | waiting)

    # Resume

    def _recover(self) -> None:
        """Take up where the last session ended."""
        finished = [trial for trial in self._ledger.trials if trial.state.is_finished()]
        for trial in sorted(finished, key=lambda trial: (trial.datetime_complete, trial.number)):
            if is_evaluated(trial):
                if self._rungs.on and (evaluation := self._ledger.kept(trial.number)) is not None:
                    self._rungs.add(trial.number, evaluation)
                self._count(trial.number, trial.user_attrs["architecture"], trial.values, outcome_of(trial))
        for trial in self._ledger.trials:
            if not trial.state.is_finished():
                self._reopen(trial)
        self._drop_weights()

    def _reopen(self, trial: FrozenTrial) -> None:
        original = trial.user_attrs.get("duplicate_of")
        if not self._ledger.is_complete(trial) or "architecture" not in trial.user_attrs:
            self._ledger.finish(trial.number, Outcome.CANCELLED)
        elif original is not None:
            self._reopen_copy(trial.number, self._ledger.trial(original))
        elif (evaluation := self._ledger.kept(trial.number)) is not None:
            self._commit(trial.number, evaluation)
        else:
            self._queue.append(trial.number)

    def _reopen_copy(self, number: int, original: FrozenTrial) -> None:
        if (outcome := outcome_of(original)) is not None:
            self._ledger.finish(number, outcome, original.values)
        else:
            self._copies.setdefault(original.number, []).append(number)

    # Reports

    def _report(self) -> None:
        self._reporter.report(len(self._in_flight))

    def _summary(self) -> Summary:
        signal, progress = self._interrupts.received, self._reporter.progress(len(self._in_flight))
        if signal is not None and self._wants_more:
            left = len(self._in_flight) + len(self._queue)
            message = f"stopped by {signal.name}; {left} candidates were in flight and will be evaluated again"
            return Summary("interrupted", message, self._interrupts.exit_code, progress)
        reason, message = self._ended or ("finished", f"{self._standing.done} architectures evaluated")
        return Summary(reason, message, 0, progress)
