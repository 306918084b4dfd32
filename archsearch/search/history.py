"""What a sampler knows: the trials of a study as arrays. Each proposal reads only what has changed since the last."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, compress
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from archsearch.search.genes import Codes, Floats, Genes

LINEAGE = "lineage"  # user attribute of a trial, written by the driver
EXPECTED = "expected"  # of a stopped one: the objectives that it would likely have had
FEWEST_ROWS = 64  # room in a column that is new

Genome = tuple[int, ...]
Identify = Callable[[Genes, Genome], str | None]


@dataclass(frozen=True, slots=True)
class History:
    """The trials before a proposal whose genome is complete, in the order of their number.

    ``values`` are signed so that all are minimised; NaN where a trial has none. ``finished`` holds
    the rows that may be parents, in the order in which they were completed; ``learned`` holds them and
    the stopped ones, whose ``values`` are what was expected of them: no parents, but a lesson.
    ``violations`` say by how much each row breaks its constraints, 0 where it keeps them. ``front`` is
    the Pareto front of the finished rows that break them least.
    ``parents`` are rows, -1 where the driver has recorded none. ``genomes`` are the different rows of
    ``codes``, ``identities`` those of their architectures. Two histories with the same ``source`` have
    the same rows, as far as both go. All of it is good until the next is read.
    """

    numbers: Codes
    codes: Codes
    parents: Codes
    values: Floats
    constraints: Floats
    violations: Floats
    running: NDArray[np.bool_]
    finished: Codes
    learned: Codes
    front: Codes
    genomes: Set[Genome]
    identities: Set[str | None]
    source: object


class HistoryReader:
    """Reads histories. What it keeps changes nothing but the time that takes: a new reader reads the same.

    Args:
        identify: the id of the architecture that a genome builds.
    """

    def __init__(self, identify: Identify) -> None:
        self._identify = identify
        self._lock = Lock()
        self._known = _Known(Genes((), ()), [], identify)

    def __reduce__(self) -> tuple[type[HistoryReader], tuple[Identify]]:
        # A copy in another process begins anew.
        return HistoryReader, (self._identify,)

    def read(self, study: Study, genes: Genes, before: int) -> History:
        """The history of the trials with a number below ``before``."""
        trials, directions = study.get_trials(deepcopy=False)[:before], study.directions
        with self._lock:
            known = self._known
            if not (known.genes == genes and known.directions == directions and known.take(trials)):
                self._known = known = _Known(genes, directions, self._identify)
                known.take(trials)
            return known.history()


class _Column:
    """An array that rows are appended to."""

    def __init__(self, dtype: Any, *shape: int) -> None:
        self._room = np.empty((FEWEST_ROWS, *shape), dtype)
        self._length = 0

    def append(self, value: Any) -> None:
        """One row more."""
        if self._length == len(self._room):
            self._room = np.concatenate([self._room, np.empty_like(self._room)])
        self._room[self._length] = value
        self._length += 1

    @property
    def rows(self) -> NDArray[Any]:
        """All rows so far, as a view."""
        return self._room[: self._length]


class _Known:
    """What one study held when it was read last. A row is a trial with a complete genome."""

    def __init__(self, genes: Genes, directions: list[StudyDirection], identify: Identify) -> None:
        self.genes, self.directions, self._identify = genes, directions, identify
        self._signs = np.array([-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions])
        self._trials: list[FrozenTrial] = []
        self._row_of: dict[int, int] = {}
        self._numbers = _Column(np.int64)
        self._codes = _Column(np.int64, len(genes.names))
        self._parents = _Column(np.int64)
        self._values = _Column(np.float64, len(directions))
        self._running = _Column(np.bool_)
        self._constraints: dict[str, dict[int, float]] = {}
        self._violations = _Column(np.float64)
        self._ended: list[tuple[datetime, int]] = []
        self._finished, self._learned = _Column(np.int64), _Column(np.int64)
        self._stopped: set[int] = set()
        self._front: list[int] = []
        self._genomes: set[Genome] = set()
        self._identities: set[str | None] = set()

    def history(self) -> History:
        """As it stands."""
        return History(
            numbers=self._numbers.rows,
            codes=self._codes.rows,
            parents=self._parents.rows,
            values=self._values.rows,
            constraints=self._constraint_columns(),
            violations=self._violations.rows,
            running=self._running.rows,
            finished=self._finished.rows,
            learned=self._learned.rows,
            front=np.array(self._front, dtype=np.int64),
            genomes=self._genomes,
            identities=self._identities,
            source=self,
        )

    def take(self, trials: list[FrozenTrial]) -> bool:
        """Take in what has changed; False where that cannot be, because the study is another one."""
        if len(trials) < len(self._trials):
            return False
        ended = []
        for number in self._changed(trials):
            trial = trials[number]
            if not self._enter(trial, number):
                return False
            row = self._row_of.get(number)
            if row is not None and trial.datetime_complete and np.isfinite(self._values.rows[row]).all():
                ended.append((trial.datetime_complete, row))
        self._trials = trials
        self._order(sorted(ended))
        return True

    def _changed(self, trials: list[FrozenTrial]) -> Iterator[int]:
        """Numbers of new trials, and of those whose object the storage has replaced, as it does when they change."""
        old = range(len(self._trials))
        return chain(compress(old, map(operator.is_not, self._trials, trials)), range(len(old), len(trials)))

    def _enter(self, trial: FrozenTrial, number: int) -> bool:
        codes, row = self.genes.encode(trial.params), self._row_of.get(number)
        if number < len(self._trials) and self._trials[number].state.is_finished():
            return False
        if codes is None:
            return row is None
        if row is None:
            # A genome that was completed late belongs between others.
            if self._row_of and number < self._numbers.rows[-1]:
                return False
            row = self._append(number, codes)
        elif tuple(self._codes.rows[row].tolist()) != codes:
            return False
        self._set(row, trial)
        return True

    def _append(self, number: int, codes: Genome) -> int:
        row = self._row_of[number] = len(self._row_of)
        self._numbers.append(number)
        self._codes.append(codes)
        for column in (self._parents, self._values, self._running, self._violations):
            column.append(0)
        self._genomes.add(codes)
        self._identities.add(self._identify(self.genes, codes))
        return row

    def _set(self, row: int, trial: FrozenTrial) -> None:
        parent = trial.user_attrs.get(LINEAGE, {}).get("parent")
        self._parents.rows[row] = -1 if parent is None else self._row_of.get(parent, -1)
        stopped = trial.state == TrialState.PRUNED
        values = trial.user_attrs.get(EXPECTED) if stopped else trial.values
        known = trial.state.is_finished() and values is not None
        self._values.rows[row] = self._signs * values if known else np.nan
        if stopped:
            self._stopped.add(row)
        self._running.rows[row] = not trial.state.is_finished()
        for name, value in trial.constraints.items():
            self._constraints.setdefault(name, {})[row] = value
        self._violations.rows[row] = sum(max(0.0, value) for value in trial.constraints.values())

    def _order(self, ended: list[tuple[datetime, int]]) -> None:
        """Bring the rows that taught something into the order of their ends."""
        late = bool(self._ended and ended and ended[0] < self._ended[-1])
        for key in ended:
            bisect.insort(self._ended, key)
        if late:
            self._finished, self._learned, self._front = _Column(np.int64), _Column(np.int64), []
        for _, row in self._ended if late else ended:
            self._learned.append(row)
            if row not in self._stopped:
                self._finished.append(row)
                self._join_front(row)

    def _join_front(self, row: int) -> None:
        """Let a row onto the front, and off it what it dominates."""
        violations, members = self._violations.rows, self._front
        if members and violations[row] != violations[members[0]]:
            self._front = [row] if violations[row] < violations[members[0]] else members
            return
        value, values = self._values.rows[row], self._values.rows[members]
        if not _dominates(values, value).any():
            beaten = _dominates(value, values)
            self._front = [member for member, out in zip(members, beaten, strict=True) if not out] + [row]

    def _constraint_columns(self) -> Floats:
        """(rows, constraints), NaN where a trial has none of that name."""
        columns = np.full((len(self._row_of), len(self._constraints)), np.nan)
        for column, name in zip(columns.T, sorted(self._constraints), strict=True):
            found = self._constraints[name]
            column[list(found)] = list(found.values())
        return columns


def _dominates(first: Floats, second: Floats) -> NDArray[np.bool_]:
    """Where ``first`` is nowhere worse than ``second`` and somewhere better; one of them may be a single point."""
    return np.asarray((first <= second).all(axis=-1) & (first < second).any(axis=-1))
