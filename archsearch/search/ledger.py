"""Ledger: the driver's hand on the study. What is proposed, what became of it; committed before anything acts on it.

The study lives in SQLite. Samplers read a copy of it in memory, because Optuna asks gene by gene and
SQLite would pay a disk write for each. Every change of a trial then enters the file in one transaction.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from archsearch.config import RunConfig
from archsearch.errors import ConfigError, StorageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search.database import create_storage, open_storage, storage_errors
from archsearch.search.folder import RunFolder
from archsearch.search.history import EXPECTED
from archsearch.search.study_file import StudyFile
from archsearch.space import SearchSpace

STUDY = "archsearch"
SCHEMA = 1
REFERENCE = "hypervolume_reference"
STATES = {Outcome.OK: TrialState.COMPLETE, Outcome.STOPPED: TrialState.PRUNED}
"""What an outcome is to Optuna; all others are failures."""
optuna.logging.set_verbosity(optuna.logging.WARNING)


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Each gene as Optuna's categorical distribution."""
    return {name: CategoricalDistribution(list(choices)) for name, choices in space.genes.items()}


def protocol_hash(config: RunConfig) -> str:
    """Twelve hexadecimal digits over everything that decides what a result means, beside the space."""
    parts = config.model_dump(mode="json", include={"proxy", "latency"}, exclude_defaults=True)
    parts["objectives"] = list(config.search.objectives)
    return _digest(parts)


def config_hash(config: RunConfig) -> str:
    """Twelve hexadecimal digits over the whole config."""
    return _digest(config.model_dump(mode="json"))


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def outcome_of(trial: FrozenTrial) -> Outcome | None:
    """How a trial ended; None while it runs."""
    return Outcome(trial.user_attrs["outcome"]) if trial.state.is_finished() else None


class Ledger:
    """The study of one run, with one writer.

    Args:
        config: of the run.
        folder: where the study lives; the caller holds its lock. Without one the study is in memory only.

    Raises:
        ConfigError: the study belongs to another space, or to other training, measurement or objectives.
        StorageError: the file is missing, damaged or foreign, or cannot be written.
    """

    def __init__(self, config: RunConfig, folder: RunFolder | None = None) -> None:
        self.folder = folder
        self._distributions = distributions(config.space)
        self._memory = InMemoryStorage()
        self.study = _new_study(self._memory, config)
        self._study_id = self._memory.get_study_id_from_name(STUDY)
        self._file: StudyFile | None = None
        if folder is not None:
            self._load(folder, config)
            self._file = StudyFile(folder.study_path, STUDY)
        self._noted = self._notes()

    def _load(self, folder: RunFolder, config: RunConfig) -> None:
        storage = _open_storage(folder, config)
        with storage_errors(folder.study_path):
            study_id = storage.get_study_id_from_name(STUDY)
            for key, value in storage.get_study_user_attrs(study_id).items():
                self._memory.set_study_user_attr(self._study_id, key, value)
            for key, value in storage.get_study_system_attrs(study_id).items():
                self._memory.set_study_system_attr(self._study_id, key, value)
            for trial in storage.get_all_trials(study_id, deepcopy=False):
                self._memory.create_new_trial(self._study_id, trial)
            storage.remove_session()
            storage.engine.dispose()

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials in the order of their numbers; not to be changed."""
        return self.study.get_trials(deepcopy=False)

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the study; not to be changed."""
        return self._memory.get_study_user_attrs(self._study_id)

    def trial(self, number: int) -> FrozenTrial:
        """One trial; not to be changed."""
        return self._memory.get_trial(self._trial_id(number))

    def is_complete(self, trial: FrozenTrial) -> bool:
        """Whether a trial has every gene."""
        return self._distributions.keys() <= trial.params.keys()

    def propose(self, sampler: BaseSampler) -> FrozenTrial:
        """Ask for one more genome. It is in memory only until ``enter``."""
        self.study.sampler = sampler
        return self.trial(self.study.ask(self._distributions).number)

    def enter(
        self,
        number: int,
        attributes: Mapping[str, Any],
        outcome: Outcome | None = None,
        values: Sequence[float] | None = None,
    ) -> None:
        """Commit a proposal: running, or finished where its ``outcome`` is known already."""
        self._set_attributes(number, attributes)
        if outcome is not None:
            self._tell(number, outcome, values)
        self._save(number)

    def note(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Commit attributes of a running trial."""
        self._set_attributes(number, attributes)
        self._save(number)

    def finish(
        self,
        number: int,
        outcome: Outcome,
        values: Sequence[float] | None = None,
        expected: Sequence[float] | None = None,
    ) -> None:
        """Commit the end of a running trial.

        It becomes COMPLETE with ``values`` where the outcome is OK, PRUNED where it was stopped, else FAIL.
        ``expected`` are the objectives that a stopped one would likely have had.
        """
        if expected is not None:
            self._set_attributes(number, {EXPECTED: list(expected)})
        self._tell(number, outcome, values)
        self._save(number)

    def keep(self, number: int, evaluation: Evaluation) -> None:
        """Write the whole evaluation beside the study, before its trial is finished."""
        if self.folder is not None:
            self.folder.write_evaluation(number, evaluation)

    def kept(self, number: int) -> Evaluation | None:
        """The evaluation that was written for a trial, if one was."""
        return None if self.folder is None else self.folder.read_evaluation(number)

    def set_attribute(self, key: str, value: Any) -> None:
        """Commit an attribute of the study."""
        self._memory.set_study_user_attr(self._study_id, key, value)
        if self._file is not None:
            self._file.set_attribute(key, value)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _trial_id(self, number: int) -> int:
        return self._memory.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _set_attributes(self, number: int, attributes: Mapping[str, Any]) -> None:
        for key, value in attributes.items():
            self._memory.set_trial_user_attr(self._trial_id(number), key, value)

    def _save(self, number: int) -> None:
        if self._file is not None:
            notes = self._notes()
            new = {key: value for key, value in notes.items() if self._noted.get(key) != value}
            self._file.save(self.trial(number), new)
            self._noted = notes

    def _notes(self) -> dict[str, Any]:
        """What samplers keep in the study, such as NSGA-II its parents."""
        return dict(self._memory.get_study_system_attrs(self._study_id))

    def _tell(self, number: int, outcome: Outcome, values: Sequence[float] | None) -> None:
        self._set_attributes(number, {"outcome": str(outcome)})
        # Not through the study, whose answer is a deep copy, and which refuses trials that nobody started.
        # It would also call the sampler's ``after_trial``; ours learn from the trials alone.
        self._memory.set_trial_state_values(self._trial_id(number), STATES.get(outcome, TrialState.FAIL), values)


def _new_study(storage: BaseStorage, config: RunConfig) -> optuna.Study:
    names: list[str] = list(config.search.objectives)
    sampler = optuna.samplers.RandomSampler(seed=config.search.seed)
    directions = [StudyDirection.MINIMIZE] * len(names)
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=directions, sampler=sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(names)
    for key, value in _identity(config).items():
        study.set_user_attr(key, value)
    study.set_user_attr("config_hash", config_hash(config))
    return study


def _identity(config: RunConfig) -> dict[str, Any]:
    """What a study must share with the config that resumes it."""
    return {"schema_version": SCHEMA, "space": config.space.fingerprint, "protocol": protocol_hash(config)}


def _open_storage(folder: RunFolder, config: RunConfig) -> RDBStorage:
    if not folder.study_path.exists():
        if any(folder.trials.glob("*.json")):
            raise StorageError(f"{folder.study_path} is missing", "restore it from a copy of the run folder")
        create_storage(folder.study_path, lambda storage: _new_study(storage, config))
    storage = open_storage(folder.study_path)
    with storage_errors(folder.study_path):
        _check_identity(storage, folder, config)
    return storage


def _check_identity(storage: RDBStorage, folder: RunFolder, config: RunConfig) -> None:
    try:
        found = storage.get_study_user_attrs(storage.get_study_id_from_name(STUDY))
    except KeyError:
        raise StorageError(f"{folder.study_path} holds no study of archsearch", "restore it from a copy") from None
    schema = found.get("schema_version")
    if schema != SCHEMA:
        raise StorageError(
            f"{folder.study_path} has schema version {schema}, this archsearch reads {SCHEMA}",
            "use the archsearch that wrote it",
        )
    wanted = _identity(config)
    if found.get("space") != wanted["space"]:
        raise ConfigError(
            f"{folder.path} was searched with another space ({found.get('space')}, now {wanted['space']})",
            "restore its config.yaml, or start a new run",
        )
    if found.get("protocol") != wanted["protocol"]:
        raise ConfigError(
            f"{folder.path} was searched with other proxy, latency or objective settings, which results depend on",
            "restore its config.yaml, or start a new run",
        )
