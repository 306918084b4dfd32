"""RunFolder: everything a run keeps on disk, and the lock that lets one process at a time write to it.

::

    config.yaml         the resolved config
    environment.json    the machine and the packages
    study.db            the Optuna study
    trials/0042.json    the Evaluation of trial 42
    weights/<id>.safetensors    proxy weights of the front, and the tokenizer beside them
    checkpoints/<id>.safetensors    of a candidate in training, from its last rung; only with proxy.rungs
    run.lock            held by the process that writes

Nothing inside refers to the folder's own place, so a run that was moved can be resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from archsearch.config import RunConfig, load_config
from archsearch.errors import RunInUse, StorageError, UsageError
from archsearch.evaluation import Evaluation
from archsearch.files import to_json, write_atomic
from archsearch.search.filesystem import refuse_network, sync_folder


class RunFolder:
    """The folder of one run. Make one with ``create`` or ``open``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._held: IO[str] | None = None

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, environment: Mapping[str, Any] | None = None) -> RunFolder:
        """Make the folder and write config and environment. It is locked until ``lock`` ends, or the process.

        Args:
            path: a folder that does not exist yet or is empty.
            config: written in full, defaults included.
            environment: plain data for ``environment.json``.

        Raises:
            UsageError: something is there already.
            RunInUse: another process is at work there.
            StorageError: not writable, no space, or a network file system.
        """
        folder = cls(path)
        refuse_network(folder.path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UsageError(f"{folder.path} is not a folder", "choose another --out") from None
        except OSError as error:
            raise StorageError(f"cannot create {folder.path}: {error.strerror}", "choose another --out") from error
        if not (folder.path / "run.lock").exists():
            folder._refuse_content()
        folder._acquire()
        folder._fill(config, environment)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """A folder that ``create`` made.

        Raises:
            UsageError: there is no run.
            ConfigError: its config was damaged.
        """
        folder = cls(path)
        if not folder.config_path.is_file():
            what = "is not a run folder: it has no config.yaml" if folder.path.exists() else "does not exist"
            raise UsageError(f"{folder.path} {what}", "give the folder that `archsearch run` wrote")
        _ = folder.config
        return folder

    @cached_property
    def config(self) -> RunConfig:
        """The resolved config. Raises ConfigError where it was damaged."""
        return load_config(self.config_path)

    @property
    def environment(self) -> dict[str, Any]:
        """What ``environment.json`` holds; empty where the run was created without one."""
        path = self.path / "environment.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    @property
    def config_path(self) -> Path:
        """The config file."""
        return self.path / "config.yaml"

    @property
    def study_path(self) -> Path:
        """The SQLite file of the study."""
        return self.path / "study.db"

    @property
    def study_url(self) -> str:
        """The study for Optuna's own tools, such as its dashboard."""
        return f"sqlite:///{self.study_path}"

    @property
    def trials(self) -> Path:
        """The folder of evaluations."""
        return self.path / "trials"

    @property
    def weights(self) -> Path:
        """The folder of proxy weights."""
        return self.path / "weights"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    # Evaluations

    def evaluation_path(self, number: int) -> Path:
        """Where the evaluation of a trial lies."""
        return self.trials / f"{number:04d}.json"

    def write_evaluation(self, number: int, evaluation: Evaluation) -> None:
        """Write an evaluation so that it survives a power loss. Raises StorageError."""
        write_atomic(self.evaluation_path(number), to_json(evaluation.model_dump(mode="json")))
        sync_folder(self.trials)

    def read_evaluation(self, number: int) -> Evaluation | None:
        """The evaluation of a trial, or None where it has none. Raises StorageError where it is damaged."""
        path = self.evaluation_path(number)
        try:
            return Evaluation.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise StorageError(f"cannot read {path}: {reason}", "restore the file from a copy") from error

    def drop_weights(self, keep: set[str]) -> None:
        """Delete proxy weights, except of the architectures whose ids are in ``keep``."""
        for path in self.weights.glob("*.safetensors"):
            if path.stem not in keep:
                path.unlink(missing_ok=True)

    def drop_checkpoints(self, keep: set[str]) -> None:
        """Delete checkpoints, and what a killed worker left of one, likewise."""
        for path in self.checkpoints.glob("*") if self.checkpoints.is_dir() else ():
            if path.name.lstrip(".").split(".")[0] not in keep:
                path.unlink(missing_ok=True)

    # Lock

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            RunInUse: another process holds it; names its host, pid and start time.
            StorageError: not writable, or a network file system.
        """
        if self._held is None:
            refuse_network(self.path)
            self._acquire()
        try:
            yield
        finally:
            self._release()

    def _acquire(self) -> None:
        path = self.path / "run.lock"
        try:
            # Append mode creates the file and leaves the owner's record alone.
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", "make the folder writable") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = _owner(file.read())
            file.close()
            raise RunInUse(f"{self.path} is in use by {owner}", "wait for it to end, or stop that process") from None
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        file.truncate(0)
        file.write(to_json(record, indent=None))
        file.flush()
        self._held = file

    def _release(self) -> None:
        if self._held is not None:
            # Closing frees the lock; the file stays, or a second opener could lock a file that is gone.
            self._held.close()
            self._held = None

    def _fill(self, config: RunConfig, environment: Mapping[str, Any] | None) -> None:
        try:
            self._refuse_content()
            self.trials.mkdir()
            self.weights.mkdir()
            if config.proxy.rungs:
                self.checkpoints.mkdir()
            if environment is not None:
                write_atomic(self.path / "environment.json", to_json(dict(environment)))
            # Last, because its presence makes the folder a run.
            config.save(self.config_path)
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error.strerror}", "free space or use another") from error
        except UsageError:
            self._release()
            raise

    def _refuse_content(self) -> None:
        # A lock file alone is what is left where a creation was killed.
        if any(entry.name != "run.lock" for entry in self.path.iterdir()):
            remedy = "choose another --out"
            if self.config_path.exists():
                remedy = f"continue it with `archsearch resume {self.path}`, or {remedy}"
            raise UsageError(f"{self.path} is not empty", remedy)


def _owner(record: str) -> str:
    try:
        owner = json.loads(record)
        return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "a process that is just starting"
