"""What a sampler knows: the trials of a study as arrays, read anew for each proposal."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from archsearch.search.genes import Codes, Floats, Genes

LINEAGE = "lineage"  # user attribute of a trial, written by the driver
EXPECTED = "expected"  # of a stopped one: the objectives that it would likely have had


@dataclass(frozen=True, slots=True)
class History:
    """The trials before a proposal whose genome is complete, in the order of their number.

    ``values`` are signed so that all are minimised; NaN where a trial has none. ``finished`` holds
    the rows that may be parents, in the order in which they were completed. ``learned`` holds them and
    the stopped ones, whose ``values`` are what was expected of them: no parents, but a lesson.
    ``parents`` are rows, -1 where the driver has recorded none.
    """

    numbers: Codes
    codes: Codes
    parents: Codes
    values: Floats
    constraints: Floats
    running: NDArray[np.bool_]
    finished: NDArray[np.intp]
    learned: NDArray[np.intp]

    @property
    def violations(self) -> Floats:
        """By how much each trial breaks its constraints, (trials,); 0 where it keeps them."""
        return np.asarray(np.nan_to_num(np.maximum(self.constraints, 0.0)).sum(axis=1))


@dataclass(frozen=True, slots=True)
class _Row:
    """One trial. ``completed`` is None where it cannot be a parent, ``known`` where nothing is learned from it."""

    number: int
    codes: tuple[int, ...]
    values: tuple[float, ...]
    constraints: dict[str, float]
    parent: int | None
    running: bool
    completed: datetime | None
    known: datetime | None


class HistoryReader:
    """Reads histories. Keeps what it has read of each trial object, which changes nothing but the time it takes."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[FrozenTrial, _Row | None]] = {}
        self._meaning: tuple[Genes, list[StudyDirection]] | None = None

    def read(self, study: Study, genes: Genes, before: int) -> History:
        """The history of the trials with a number below ``before``."""
        directions = study.directions
        if self._meaning != (genes, directions):
            self._known, self._meaning = {}, (genes, directions)
        signs = [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions]
        trials = [trial for trial in study.get_trials(deepcopy=False) if trial.number < before]
        rows = [row for trial in trials if (row := self._row(trial, genes, signs)) is not None]
        return _history(rows, len(signs), len(genes.names))

    def _row(self, trial: FrozenTrial, genes: Genes, signs: list[float]) -> _Row | None:
        known = self._known.get(trial.number)
        # Storages replace the object of a trial that changes, so the same object is the same trial.
        if known is None or known[0] is not trial:
            codes = genes.encode(trial.params)
            known = trial, None if codes is None else _read(trial, codes, signs)
            self._known[trial.number] = known
        return known[1]


def _read(trial: FrozenTrial, codes: tuple[int, ...], signs: list[float]) -> _Row:
    values = [float("nan")] * len(signs)
    stopped = trial.state == TrialState.PRUNED
    found = trial.user_attrs.get(EXPECTED) if stopped else trial.values
    if trial.state.is_finished() and found is not None:
        values = [value * sign for value, sign in zip(found, signs, strict=True)]
    ended = trial.datetime_complete if np.isfinite(values).all() else None
    return _Row(
        number=trial.number,
        codes=codes,
        values=tuple(values),
        constraints=trial.constraints,
        parent=trial.user_attrs.get(LINEAGE, {}).get("parent"),
        running=not trial.state.is_finished(),
        completed=None if stopped else ended,
        known=ended,
    )


def _history(rows: list[_Row], objectives: int, genes: int) -> History:
    learned = [(row.known, row.number, index) for index, row in enumerate(rows) if row.known is not None]
    finished = [(when, number, index) for when, number, index in learned if rows[index].completed is not None]
    index_of = {row.number: index for index, row in enumerate(rows)}
    names = sorted({name for row in rows for name in row.constraints})
    constraints = [[row.constraints.get(name, np.nan) for name in names] for row in rows]
    return History(
        numbers=np.array([row.number for row in rows], dtype=np.int64),
        codes=np.array([row.codes for row in rows], dtype=np.int64).reshape(len(rows), genes),
        parents=np.array([-1 if row.parent is None else index_of.get(row.parent, -1) for row in rows], dtype=np.int64),
        values=np.array([row.values for row in rows], dtype=np.float64).reshape(len(rows), objectives),
        constraints=np.array(constraints, dtype=np.float64).reshape(len(rows), len(names)),
        running=np.array([row.running for row in rows], dtype=bool),
        finished=np.array([index for _, _, index in sorted(finished)], dtype=np.intp),
        learned=np.array([index for _, _, index in sorted(learned)], dtype=np.intp),
    )
