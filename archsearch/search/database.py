"""The SQLite file under the study: how it is opened, made durable, and told from files that are none."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from archsearch.errors import StorageError
from archsearch.search.filesystem import free_bytes, is_network, sync_folder

HEADER = b"SQLite format 3\x00"
TABLES = {"studies", "trials", "alembic_version"}
OPTUNA_TABLES = "v3.2.0.a"
"""The version of Optuna's tables that ``StudyFile`` writes to."""
BUSY_SECONDS = 60.0
# Before these, two connections in WAL mode could lose committed writes (the WAL-reset bug).
WAL_SAFE = (3, 51, 3)
WAL_BACKPORTS = ((3, 50, 7), (3, 44, 6))


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite can be trusted with a write-ahead log."""
    return version >= WAL_SAFE or any(version[:2] == fixed[:2] and version >= fixed for fixed in WAL_BACKPORTS)


def journal_mode(path: Path) -> str:
    """``WAL`` where this SQLite build and the file system of ``path`` allow it, else ``DELETE``."""
    major, minor, patch = sqlite3.sqlite_version_info
    return "WAL" if wal_is_safe((major, minor, patch)) and not is_network(path) else "DELETE"


def open_storage(path: Path) -> RDBStorage:
    """Optuna's storage over an existing study file, for reading.

    Raises:
        StorageError: missing, damaged, or not the file of a study. It is left as it was.
    """
    check_study_file(path)
    with storage_errors(path):
        return _storage(lambda: connect(path), new=False)


def create_storage(path: Path, initialise: Callable[[RDBStorage], object]) -> None:
    """Make a study file that is either complete or absent, whenever the process dies.

    Raises:
        StorageError: not writable or no space.
    """
    draft = path.with_name(f".{path.name}.new")
    with storage_errors(path):
        draft.unlink(missing_ok=True)
        storage = _storage(lambda: sqlite3.connect(draft, check_same_thread=False), new=True)
        initialise(storage)
        storage.engine.dispose()
        os.replace(draft, path)
        sync_folder(path.parent)


def check_study_file(path: Path) -> None:
    """Raise StorageError unless ``path`` is a sound SQLite file with Optuna's tables. Changes nothing."""
    try:
        with path.open("rb") as file:
            header = file.read(len(HEADER))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", "give the folder of a run") from error
    if header != HEADER:
        raise StorageError(f"{path} is not an SQLite file", "restore it from a copy of the run folder")
    try:
        with closing(connect(path)) as connection:
            problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            version = connection.execute("SELECT * FROM alembic_version").fetchall() if tables >= TABLES else []
    except sqlite3.Error as error:
        raise _failed(path, str(error)) from error
    if problem != "ok":
        raise StorageError(
            f"{path} is damaged: {' '.join(problem.split())}", "restore it from a copy of the run folder"
        )
    if not version:
        raise StorageError(f"{path} is not the file of a study", "restore it from a copy of the run folder")
    if version != [(OPTUNA_TABLES,)]:
        raise StorageError(f"{path} was written by another Optuna ({version[0][0]})", "use the Optuna that wrote it")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what Optuna, SQLAlchemy, SQLite and the system raise about storage into StorageError."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise _failed(path, _reason(error)) from error
    except RuntimeError as error:
        # Optuna's word for a file whose tables another version wrote.
        raise StorageError(f"{path}: {str(error).splitlines()[0]}", "use the archsearch that wrote it") from error


def _failed(path: Path, reason: str) -> StorageError:
    free = free_bytes(path.parent)
    return StorageError(
        f"{path}: {reason} ({free / 2**20:,.0f} MiB free)",
        "free space, or make the folder writable, or restore it from a copy; then `archsearch resume`",
    )


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    original = getattr(cause, "orig", None) or cause
    return str(getattr(original, "strerror", None) or original).splitlines()[0]


def _storage(connect: Callable[[], sqlite3.Connection], *, new: bool) -> RDBStorage:
    # Optuna would read a path with braces in a URL as a template; the connections come ready-made.
    return RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect}, skip_table_creation=not new)


def connect(path: Path, *, write: bool = False) -> sqlite3.Connection:
    """A connection to an existing file; each commit of a writer is on the disk when it returns.

    Readers, too, open a file that they could write, or SQLite could not roll back what a killed
    writer left half done; they are kept from changing anything else.
    """
    may_write = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    uri = f"{path.resolve().as_uri()}?mode={'rw' if write or may_write else 'ro'}"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
    if write:
        connection.execute(f"PRAGMA journal_mode={journal_mode(path)}")
        connection.execute("PRAGMA synchronous=FULL")
    else:
        connection.execute("PRAGMA query_only=ON")
    return connection
