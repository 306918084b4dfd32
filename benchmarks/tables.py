"""Tables of architectures with known objectives, as problems for a search: a space, an evaluator, a true front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import pandas as pd

from archsearch.architecture import Architecture, make_architecture
from archsearch.errors import ConfigError, InvalidArchitecture
from archsearch.evaluation import Evaluation, Outcome
from archsearch.search.pareto import front, hypervolume
from archsearch.space import Choice, SearchSpace

NAMES = ("loss", "decode_latency", "parameters")  # what the loop calls a problem's objectives, in their order
MOST_CHOICES = 64
SPARSE = 1 / 50  # a search ends when nothing new was found 100 times in a row


@dataclass(frozen=True)
class Table:
    """Architectures with known objectives; ``values`` is (rows, objectives), as in the file.

    With ``nearest`` a combination of genes that is no row stands for the first row that differs in fewest genes.
    """

    genes: dict[str, tuple[Choice, ...]]
    rows: dict[tuple[Choice, ...], int]
    values: np.ndarray
    nearest: bool = False

    @cached_property
    def space(self) -> TableSpace:
        """The rows as a search space."""
        return TableSpace.of(self)

    def find(self, key: tuple[Choice, ...]) -> int | None:
        """The row of these genes."""
        row = self.rows.get(key)
        if row is not None or not self.nearest:
            return row
        codes = np.array([place[choice] for place, choice in zip(self._places, key, strict=True)], dtype=np.uint16)
        return int((self._codes != codes).sum(axis=1, dtype=np.uint16).argmin())

    @cached_property
    def _places(self) -> list[dict[Choice, int]]:
        return [{choice: place for place, choice in enumerate(choices)} for choices in self.genes.values()]

    @cached_property
    def _codes(self) -> np.ndarray:
        """Genes of the rows as the places of their choices, (rows, genes)."""
        rows = [[place[choice] for place, choice in zip(self._places, key, strict=True)] for key in self.rows]
        return np.array(rows, dtype=np.uint16)

    def objectives(self, architecture: Architecture) -> tuple[float, ...]:
        """What the row that ``architecture`` stands for holds."""
        return tuple(self.values[architecture.vocab_size - 2].tolist())

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest value of each objective, (objectives,) each."""
        return self.values.min(axis=0), self.values.max(axis=0)

    @cached_property
    def scaled(self) -> np.ndarray:
        """Objectives between 0 and 1."""
        low, high = self.bounds
        return np.asarray((self.values - low) / (high - low))

    @cached_property
    def whole(self) -> float:
        """Hypervolume of the true front, objectives scaled, to the reference point (1, 1)."""
        return hypervolume(self.scaled, np.ones(self.values.shape[1]))

    def covered(self, rows: Sequence[int]) -> float:
        """Hypervolume of some rows over that of the true front."""
        return hypervolume(self.scaled[list(rows)], np.ones(self.values.shape[1])) / self.whole


@lru_cache(maxsize=1)
def load_table(path: str, objectives: tuple[str, ...], patterns: tuple[str, ...] = (), nearest: bool = False) -> Table:
    """Read a CSV file (also compressed) of gene and objective columns.

    Raises:
        ConfigError: unreadable, columns missing, values missing or not finite, an objective that is
            constant or no number, two rows with the same genes, or so few of all combinations of the genes
            that a search would hardly meet one (unless ``nearest``, see ``Table``).
    """
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError, UnicodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {str(error).splitlines()[0]}", "give a CSV file with a header"
        ) from None
    _check_objectives(path, frame, objectives)
    names = _gene_columns(path, frame, objectives, patterns)
    if (missing := frame[names].isna().sum()).any():
        cause = f"{path}: gene is missing in some rows: {missing.idxmax()} in {missing.max()}"
        raise ConfigError(cause, "fill the column or drop these rows")
    keys = [tuple(row) for row in frame[names].to_numpy(dtype=object).tolist()]
    if repeats := len(keys) - len(set(keys)):
        remedy = "keep one row an architecture, or name all gene columns with --genes"
        shown = ", ".join(names if len(names) < 6 else [*names[:2], "...", names[-1]])
        raise ConfigError(f"{path}: {repeats} rows share all of the genes ({shown}) with another", remedy)
    genes = {name: tuple(sorted({key[i] for key in keys}, key=_order)) for i, name in enumerate(names)}
    combinations = math.prod(map(len, genes.values()))
    if len(keys) < SPARSE * combinations and not nearest:
        cause = f"{path} holds {len(keys):,} of {combinations:.3g} combinations of its {len(genes)} genes"
        raise ConfigError(cause, "give a complete table, or --nearest: what is no row stands for the nearest one")
    values = frame[list(objectives)].to_numpy(dtype=np.float64)
    return Table(genes, {key: row for row, key in enumerate(keys)}, values, nearest)


def _order(choice: Any) -> tuple[bool, Any]:
    return (True, str(choice)) if isinstance(choice, str | bool) else (False, choice)


def _check_objectives(path: str, frame: pd.DataFrame, objectives: tuple[str, ...]) -> None:
    if not 1 <= len(objectives) <= len(NAMES) or len(set(objectives)) < len(objectives):
        raise ConfigError(f"{len(objectives)} objectives, one perhaps twice", "name one to three different columns")
    if frame.empty:
        raise ConfigError(f"{path} has no rows", "give a row for each architecture")
    for name in objectives:
        if name not in frame:
            raise ConfigError(f"{path} has no column {name!r}", f"choose among {', '.join(map(str, frame.columns))}")
        column = frame[name]
        bad = ~np.isfinite(pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64))
        if bad.any():
            where = f"in {bad.sum()} of {len(bad)} rows, first in row {int(bad.argmax()) + 1}"
            raise ConfigError(f"{path}: {name} holds what is no finite number {where}", "drop or mend these rows")
        if column.nunique() < 2:
            raise ConfigError(f"{path}: {name} is constant", "leave it out of --objectives")


def _gene_columns(path: str, frame: pd.DataFrame, objectives: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Columns that match ``patterns``, or the first columns, as long as they have few different values."""
    columns = [str(column) for column in frame.columns]
    if patterns:
        found = [column for column in columns if any(fnmatch(column, pattern) for pattern in patterns)]
    else:
        genes = [c not in objectives and frame[c].nunique() <= MOST_CHOICES for c in columns]
        found = columns[: genes.index(False) if False in genes else len(columns)]
    if not found or set(found) & set(objectives):
        what = "--genes names no column" if patterns else f"the first, {columns[0]!r}, is an objective or too varied"
        what = "--genes names an objective, too" if found else what
        raise ConfigError(f"{path}: no gene columns found: {what}", "put them first, or name them: --genes 'layer*'")
    return found


class TableSpace(SearchSpace):
    """A table as a search space. Row n stands as an architecture with a vocabulary of n + 2."""

    _table: Table

    @classmethod
    def of(cls, table: Table) -> TableSpace:
        """The space of a table's rows."""
        stage = {"name": "row", "pattern": "f", "blocks": 1}
        space = cls.model_validate({"name": "table", "hidden_size": 128, "vocab_size": 2, "stages": [stage]})
        space._table = table
        return space

    @property
    def genes(self) -> dict[str, tuple[Choice, ...]]:  # type: ignore[override]
        """The gene columns."""
        return self._table.genes

    def build(self, genome: Mapping[str, Choice]) -> Architecture:
        """The architecture that stands for a row. Raises InvalidArchitecture where the table has none."""
        row = self._table.find(tuple(genome[name] for name in self.genes))
        if row is None:
            raise InvalidArchitecture("the table has no such row", "search a complete table")
        return _stand_in(row)


@lru_cache(maxsize=100_000)
def _stand_in(row: int) -> Architecture:
    return make_architecture(hidden_size=128, vocab_size=row + 2, operators="f")


class Problem(Protocol):
    """A space whose objectives are known without training, and how much of its front there is to find."""

    @property
    def space(self) -> SearchSpace:
        """What is searched."""
        ...

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """By which each objective is scaled to [0, 1], (objectives,) each."""
        ...

    @property
    def whole(self) -> float:
        """Hypervolume of the front, objectives scaled, to the reference point (1, 1)."""
        ...

    def objectives(self, architecture: Architecture) -> tuple[float, ...]:
        """All to be minimised."""
        ...


class ProblemEvaluator:
    """Looks objectives up and notes them, in the order in which they were asked for."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.points: list[tuple[float, ...]] = []

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        """Look up."""
        point = self._problem.objectives(architecture)
        self.points.append(point)
        objectives = dict(zip(NAMES, point, strict=False))
        return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=objectives, seed=seed)


def coverage(problem: Problem, points: Sequence[Sequence[float]]) -> list[float]:
    """Hypervolume over that of the front, after each of ``points``."""
    low, high = problem.bounds
    scaled = (np.array(points, dtype=np.float64) - low) / (high - low)
    curve: list[float] = []
    members: list[int] = []
    for row in range(len(scaled)):
        candidates = [*members, row]
        members = [candidates[i] for i in front(scaled[candidates])]
        changed = row in members or not curve
        curve.append(hypervolume(scaled[members], np.ones(len(low))) / problem.whole if changed else curve[-1])
    return curve
