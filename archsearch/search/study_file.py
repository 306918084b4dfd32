"""StudyFile: writes trials into the SQLite tables of an Optuna study, one transaction a change.

Optuna's own storage needs several statements a gene and a commit an attribute; at some thirty genes
that is most of what the driver does. Reading, and making the tables, stay with Optuna.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import FrozenTrial

from archsearch.search.database import connect, storage_errors

_TRIAL = "INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete) VALUES (?, ?, ?, ?, ?)"
_STATE = "UPDATE trials SET state = ?, datetime_start = ?, datetime_complete = ? WHERE trial_id = ?"
_PARAM = "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (?, ?, ?, ?)"
_VALUE = "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (?, ?, ?, 'FINITE')"
_TRIAL_ATTRIBUTE = (
    "INSERT INTO trial_{kind}_attributes (trial_id, key, value_json) VALUES (?, ?, ?) "
    "ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json"
)
_STUDY_ATTRIBUTE = (
    "INSERT INTO study_{kind}_attributes (study_id, key, value_json) VALUES (?, ?, ?) "
    "ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json"
)


class StudyFile:
    """The one writer of an existing study file.

    Args:
        path: the SQLite file.
        study: name of the study in it.

    Raises:
        StorageError: here and from every method, where the file cannot be written.
    """

    def __init__(self, path: Path, study: str) -> None:
        self._path = path
        self._distributions: dict[str, tuple[BaseDistribution, str]] = {}
        with storage_errors(path):
            self._connection = connect(path, write=True)
            row = self._connection.execute("SELECT study_id FROM studies WHERE study_name = ?", (study,)).fetchone()
            self._study_id = int(row[0])
            trials = self._connection.execute("SELECT number, trial_id FROM trials WHERE study_id = ?", row)
            self._ids: dict[int, int] = dict(trials.fetchall())

    def save(self, trial: FrozenTrial, notes: Mapping[str, Any]) -> None:
        """Make the file hold ``trial`` as it is now, and ``notes`` of its sampler. On return both are on the disk."""
        with self._transaction() as connection:
            self._set(connection, "system", notes)
            known = self._ids.get(trial.number)
            trial_id = self._insert(connection, trial) if known is None else known
            times = (_time(trial.datetime_start), _time(trial.datetime_complete))
            connection.execute(_STATE, (trial.state.name, *times, trial_id))
            for kind, attributes in (("user", trial.user_attrs), ("system", trial.system_attrs)):
                rows = [(trial_id, key, json.dumps(value)) for key, value in attributes.items()]
                connection.executemany(_TRIAL_ATTRIBUTE.format(kind=kind), rows)
            values = trial.values or ()
            connection.executemany(_VALUE, [(trial_id, index, value) for index, value in enumerate(values)])
        self._ids[trial.number] = trial_id

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute of the study."""
        with self._transaction() as connection:
            self._set(connection, "user", {key: value})

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _set(self, connection: sqlite3.Connection, kind: str, attributes: Mapping[str, Any]) -> None:
        rows = [(self._study_id, key, json.dumps(value)) for key, value in attributes.items()]
        connection.executemany(_STUDY_ATTRIBUTE.format(kind=kind), rows)

    def _insert(self, connection: sqlite3.Connection, trial: FrozenTrial) -> int:
        row = (trial.number, self._study_id, trial.state.name, None, None)
        trial_id = int(connection.execute(_TRIAL, row).lastrowid or 0)
        params = [(trial_id, name, *self._internal(trial, name)) for name in trial.params]
        connection.executemany(_PARAM, params)
        return trial_id

    def _internal(self, trial: FrozenTrial, name: str) -> tuple[float, str]:
        """A parameter as Optuna keeps it: a number, and the distribution that reads it."""
        distribution = trial.distributions[name]
        known = self._distributions.get(name)
        if known is None or known[0] is not distribution:
            known = self._distributions[name] = (distribution, distribution_to_json(distribution))
        return distribution.to_internal_repr(trial.params[name]), known[1]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with storage_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def _time(moment: datetime | None) -> str | None:
    """A time as SQLAlchemy writes it to SQLite."""
    return None if moment is None else moment.isoformat(sep=" ", timespec="microseconds")
