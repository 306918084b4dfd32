"""Reading a study back: its candidates, their front and hypervolume, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial

from archsearch.architecture import Architecture
from archsearch.errors import StorageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search import pareto
from archsearch.search.database import open_storage, storage_errors
from archsearch.search.folder import RunFolder
from archsearch.search.ledger import REFERENCE, STUDY, outcome_of
from archsearch.space import Genome

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Candidate:
    """One trial of a study.

    ``architecture`` is None where the genome is infeasible; ``evaluation`` also while it runs.
    ``outcome`` is None while it runs. A duplicate names the trial whose result it shares, and holds
    that trial's evaluation. ``lineage`` has the kind of proposal, and of a mutation the parent's
    trial number and the genes changed. Times are local, as Optuna keeps them.
    """

    number: int
    genome: Genome
    architecture: Architecture | None
    evaluation: Evaluation | None
    outcome: Outcome | None
    lineage: dict[str, Any]
    duplicate_of: int | None
    attempts: int
    proposed: datetime | None
    finished: datetime | None

    @property
    def is_distinct(self) -> bool:
        """Whether it is an evaluated architecture of its own: neither a duplicate, nor infeasible, nor running."""
        return self.evaluation is not None and self.duplicate_of is None


def is_evaluated(trial: FrozenTrial) -> bool:
    """Whether a trial stands for an evaluation of its own that has ended."""
    ended = outcome_of(trial) not in (None, Outcome.CANCELLED)
    return ended and "architecture" in trial.user_attrs and "duplicate_of" not in trial.user_attrs


def is_refused(trial: FrozenTrial) -> bool:
    """Whether a trial is a proposal that broke a limit of the space before anything ran."""
    return outcome_of(trial) is Outcome.INFEASIBLE and "architecture" not in trial.user_attrs


def open_study(folder: RunFolder) -> optuna.Study:
    """The study of a run, for reading; safe beside a running search.

    Raises:
        StorageError: missing, damaged or foreign file.
    """
    storage = open_storage(folder.study_path)
    with storage_errors(folder.study_path):
        try:
            return optuna.load_study(study_name=STUDY, storage=storage)
        except KeyError:
            raise StorageError(
                f"{folder.study_path} holds no study of archsearch", "give the folder of a run"
            ) from None


def candidates(study: optuna.Study, folder: RunFolder) -> list[Candidate]:
    """All trials in the order of their numbers. Raises StorageError where an evaluation is missing or damaged."""
    trials = study.get_trials(deepcopy=False)
    evaluations = {trial.number: _evaluation(trial, folder) for trial in trials if is_evaluated(trial)}
    return [_candidate(trial, evaluations, folder) for trial in trials]


def _evaluation(trial: FrozenTrial, folder: RunFolder) -> Evaluation:
    evaluation = folder.read_evaluation(trial.number)
    if evaluation is None:
        path = folder.evaluation_path(trial.number)
        raise StorageError(f"{path} is missing", "restore it from a copy of the run folder")
    return evaluation


def _candidate(trial: FrozenTrial, evaluations: dict[int, Evaluation], folder: RunFolder) -> Candidate:
    attributes = trial.user_attrs
    evaluation = evaluations.get(attributes.get("duplicate_of", trial.number))
    outcome = outcome_of(trial)
    return Candidate(
        number=trial.number,
        genome=dict(trial.params),
        architecture=_architecture(trial, evaluation, folder),
        evaluation=evaluation if outcome is not None else None,
        outcome=outcome,
        lineage=attributes.get("lineage", {}),
        duplicate_of=attributes.get("duplicate_of"),
        attempts=attributes.get("attempts", 0),
        proposed=trial.datetime_start,
        finished=trial.datetime_complete,
    )


def _architecture(trial: FrozenTrial, evaluation: Evaluation | None, folder: RunFolder) -> Architecture | None:
    if evaluation is not None:
        return evaluation.architecture
    return folder.config.space.build(trial.params) if "architecture" in trial.user_attrs else None


def front(candidates: Sequence[Candidate], objectives: Sequence[str]) -> list[Candidate]:
    """The distinct candidates that no other dominates in ``objectives`` (minimised), best first objective first."""
    sound = [c for c in candidates if c.is_distinct and c.evaluation is not None and c.evaluation.ok]
    points = _points(sound, objectives)
    chosen = [(points[index], sound[index]) for index in pareto.front(points)]
    return [candidate for _, candidate in sorted(chosen, key=lambda pair: (pair[0], pair[1].number))]


def hypervolume(
    candidates: Sequence[Candidate], objectives: Sequence[str], reference: Sequence[float] | None
) -> float | None:
    """Volume that the candidates dominate up to ``reference``; None before the reference is fixed."""
    if reference is None:
        return None
    return pareto.hypervolume(_points(front(candidates, objectives), objectives), reference)


def hypervolume_reference(study: optuna.Study) -> tuple[float, ...] | None:
    """The reference point of a run, one number an objective; None before its first population is complete."""
    found = study.user_attrs.get(REFERENCE)
    return None if found is None else tuple(found)


def _points(candidates: Sequence[Candidate], objectives: Sequence[str]) -> list[list[float]]:
    return [[c.evaluation.objectives[name] for name in objectives] for c in candidates if c.evaluation is not None]


def dataframe(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """One row a candidate: number, outcome, notation, objectives, genes, lineage and times."""
    import pandas as pd

    return pd.DataFrame([_row(candidate) for candidate in candidates])


def _row(candidate: Candidate) -> dict[str, Any]:
    architecture, evaluation = candidate.architecture, candidate.evaluation
    row: dict[str, Any] = {
        "number": candidate.number,
        "outcome": None if candidate.outcome is None else str(candidate.outcome),
        "architecture": architecture.id if architecture else None,
        "notation": architecture.notation if architecture else None,
        "hidden_size": architecture.hidden_size if architecture else None,
        "parameters": architecture.parameters if architecture else None,
        "duplicate_of": candidate.duplicate_of,
        "attempts": candidate.attempts,
        "kind": candidate.lineage.get("kind"),
        "parent": candidate.lineage.get("parent"),
        "proposed": candidate.proposed,
        "finished": candidate.finished,
    }
    objectives = {f"objective.{name}": value for name, value in (evaluation.objectives if evaluation else {}).items()}
    genes = {f"gene.{name}": value for name, value in candidate.genome.items()}
    return row | objectives | genes | {"error": evaluation.error if evaluation else ""}
