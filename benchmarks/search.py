"""Search algorithms on a table: how much of the true front they find in how many evaluations.

    python benchmarks/search.py --table TABLE.csv --objectives a,b [--algorithms aging,nsga2,tpe,gp,random]
        [--evaluations 500] [--seeds 20] [--jobs 1] [--cheap b] [--ablation] [--json PATH] [--png PATH]

Each objective is minimised and scaled to [0, 1] by the table; the reference point is (1, 1); the hypervolume
is divided by that of the true front; only distinct architectures count. The shipped samplers run in the
shipped loop on a study in memory: a table is a search space, its look-up an evaluator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from archsearch.architecture import Architecture, make_architecture
from archsearch.config import RunConfig
from archsearch.errors import ArchsearchError, ConfigError, InvalidArchitecture
from archsearch.evaluation import Evaluation, Outcome
from archsearch.files import write_atomic
from archsearch.search.aging import AgingEvolutionSampler
from archsearch.search.executors import InlineExecutor
from archsearch.search.ledger import Ledger
from archsearch.search.loop import Search
from archsearch.search.pareto import front, hypervolume
from archsearch.space import Choice, SearchSpace

NAMES = ("loss", "decode_latency", "parameters")  # what the loop calls the table's objectives, in their order
MARKS = (100, 200, 500)
GOAL = 0.95
MOST_CHOICES = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no surrogate": {"surrogate": False},
    "no design": {"design": False},
    "no ordinal": {"ordinal": False},
    "no adaptive": {"adaptive": False},
    "no crossover": {"crossover": 0.0},
    "all guided": {"unguided": 0.0},
    "population only": {"front_parents": 0.0},
    "front only": {"front_parents": 1.0},
    "64 candidates": {"candidates": 64},
    "plain": {"surrogate": False, "design": False, "ordinal": False, "adaptive": False},
}


@dataclass(frozen=True)
class Table:
    """Architectures with known objectives; ``values`` is (rows, objectives), as in the file."""

    genes: dict[str, tuple[Choice, ...]]
    rows: dict[tuple[Choice, ...], int]
    values: np.ndarray

    @cached_property
    def scaled(self) -> np.ndarray:
        """Objectives between 0 and 1."""
        low, high = self.values.min(axis=0), self.values.max(axis=0)
        return np.asarray((self.values - low) / (high - low))

    def covered(self, points: Sequence[int]) -> float:
        """Hypervolume of some rows over that of the true front."""
        corner = np.ones(self.values.shape[1])
        return hypervolume(self.scaled[list(points)], corner) / self._whole

    @cached_property
    def _whole(self) -> float:
        return hypervolume(self.scaled, np.ones(self.values.shape[1]))


@lru_cache(maxsize=1)
def load_table(path: str, objectives: tuple[str, ...], patterns: tuple[str, ...] = ()) -> Table:
    """Read a CSV file (also compressed) of gene and objective columns.

    Raises:
        ConfigError: unreadable, columns missing, values missing or not finite, an objective that is
            constant or no number, or two rows with the same genes.
    """
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError, UnicodeError) as error:
        raise ConfigError(
            f"cannot read {path}: {str(error).splitlines()[0]}", "give a CSV file with a header"
        ) from None
    _check_objectives(path, frame, objectives)
    names = _gene_columns(path, frame, objectives, patterns)
    if frame[names].isna().any(axis=None):
        raise ConfigError(f"{path}: a gene is missing in some rows", "fill the column or drop these rows")
    keys = [tuple(row) for row in frame[names].to_numpy(dtype=object).tolist()]
    if len(set(keys)) < len(keys):
        remedy = "keep one row an architecture, or name all gene columns with --genes"
        raise ConfigError(f"{path}: rows share all of the genes {', '.join(names)}", remedy)
    genes = {name: tuple(sorted({key[i] for key in keys}, key=_order)) for i, name in enumerate(names)}
    values = frame[list(objectives)].to_numpy(dtype=np.float64)
    return Table(genes, {key: row for row, key in enumerate(keys)}, values)


def _order(choice: Any) -> tuple[bool, Any]:
    return (True, str(choice)) if isinstance(choice, str | bool) else (False, choice)


def _check_objectives(path: str, frame: pd.DataFrame, objectives: tuple[str, ...]) -> None:
    if not 1 <= len(objectives) <= len(NAMES) or len(set(objectives)) < len(objectives):
        raise ConfigError(f"{len(objectives)} objectives, one perhaps twice", "name one to three different columns")
    for name in objectives:
        if name not in frame:
            raise ConfigError(f"{path} has no column {name!r}", f"choose among {', '.join(map(str, frame.columns))}")
        column = frame[name]
        if not pd.api.types.is_numeric_dtype(column) or not np.isfinite(column.to_numpy(dtype=np.float64)).all():
            raise ConfigError(f"{path}: {name} holds what is no finite number", "drop or mend these rows")
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
        raise ConfigError(f"{path}: no gene columns found", "put them first, or name them with --genes 'layer*'")
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
        row = self._table.rows.get(tuple(genome[name] for name in self.genes))
        if row is None:
            raise InvalidArchitecture("the table has no such row", "search a complete table")
        return _stand_in(row)


@lru_cache(maxsize=100_000)
def _stand_in(row: int) -> Architecture:
    return make_architecture(hidden_size=128, vocab_size=row + 2, operators="f")


class TableEvaluator:
    """Looks objectives up and notes which rows were asked for."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.rows: list[int] = []

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        """Look up."""
        row = architecture.vocab_size - 2
        self.rows.append(row)
        objectives = {name: float(value) for name, value in zip(NAMES, self._table.values[row], strict=False)}
        return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=objectives, seed=seed)


class TimedLedger(Ledger):
    """Notes the seconds that each proposal takes."""

    def propose(self, sampler: BaseSampler) -> FrozenTrial:
        """Ask."""
        start = time.perf_counter()
        trial = super().propose(sampler)
        self.__dict__.setdefault("seconds", []).append(time.perf_counter() - start)
        return trial


@dataclass(frozen=True)
class Job:
    """One search: an algorithm, or a variant of ageing evolution, from one seed."""

    table: str
    objectives: tuple[str, ...]
    genes: tuple[str, ...]
    label: str
    seed: int
    evaluations: int
    cheap: tuple[str, ...] = ()

    def run(self) -> tuple[str, list[float], float]:
        """Label, hypervolume after each evaluation, and the median milliseconds an ask."""
        table = load_table(self.table, self.objectives, self.genes)
        space, evaluator = TableSpace.of(table), TableEvaluator(table)
        config = self._config(space)
        ledger = TimedLedger(config)
        search = Search(config, ledger, lambda: InlineExecutor(evaluator))
        if self.label not in ALGORITHMS:
            variant = self._variant(space, table)
            search._sampler_for = lambda count: variant
        search.run()
        return self.label, _curve(table, evaluator.rows), 1e3 * statistics.median(ledger.__dict__["seconds"])

    def _config(self, space: TableSpace) -> RunConfig:
        count = min(self.evaluations, len(space._table.rows))
        search: dict[str, Any] = {"sampler": self.label if self.label in ALGORITHMS else "aging", "evaluations": count}
        names = list(NAMES[: len(self.objectives)])
        data = {"search": {**search, "seed": self.seed, "objectives": names}}
        return RunConfig.model_validate(
            {"space": space, **data, "execution": {"executor": "inline", "min_free_bytes": 0}}
        )

    def _variant(self, space: TableSpace, table: Table) -> AgingEvolutionSampler:
        if not self.cheap:
            return AgingEvolutionSampler(space, seed=self.seed, **VARIANTS[self.label])
        known = [(NAMES[i], i) for i, name in enumerate(self.objectives) if name in self.cheap]

        def cheap(genome: Mapping[str, Any]) -> dict[str, float]:
            row = table.rows[tuple(genome[name] for name in table.genes)]
            return {name: float(table.values[row, i]) for name, i in known}

        return AgingEvolutionSampler(space, seed=self.seed, objectives=NAMES[: len(self.objectives)], cheap=cheap)


ALGORITHMS = ("aging", "nsga2", "tpe", "gp", "random")


def _curve(table: Table, rows: Sequence[int]) -> list[float]:
    """Covered hypervolume after each evaluation."""
    curve: list[float] = []
    members: list[int] = []
    for row in rows:
        candidates = [*members, row]
        members = [candidates[i] for i in front(table.scaled[candidates])]
        curve.append(table.covered(members) if row in members else curve[-1])
    return curve


def summarize(label: str, curves: list[list[float]], asks: list[float], evaluations: int) -> dict[str, Any]:
    """Mean and standard deviation over the seeds; a search that ended early keeps its last value."""
    padded = np.array([curve + curve[-1:] * (evaluations - len(curve)) for curve in curves])
    spread = padded.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(evaluations)
    needed = [next((i for i, value in enumerate(curve, 1) if value >= GOAL), None) for curve in curves]
    reached = [count for count in needed if count is not None]
    return {
        "algorithm": label,
        "seeds": len(curves),
        "at": {str(m): [float(padded[:, m - 1].mean()), float(spread[m - 1])] for m in MARKS if m <= evaluations},
        "evaluations_to_0.95": {"median": statistics.median(reached) if reached else None, "reached": len(reached)},
        "ask_ms": statistics.median(asks),
        "mean": padded.mean(axis=0).round(6).tolist(),
        "sd": spread.round(6).tolist(),
    }


def show(result: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """One line: values at the marks and, beside ``reference``, how many standard errors that one is ahead."""
    cells = []
    for mark, (mean, sd) in result["at"].items():
        cell = f"@{mark} {mean:.4f}±{sd:.4f}"
        if reference is not None:
            other, spread = reference["at"][mark]
            error = np.sqrt(sd**2 / result["seeds"] + spread**2 / reference["seeds"])
            cell += f" ({(other - mean) / error:+.1f} se)" if error > 0 else ""
        cells.append(cell)
    goal = result["evaluations_to_0.95"]
    tail = f"to {GOAL}: {goal['median']} ({goal['reached']}/{result['seeds']})  ask {result['ask_ms']:.1f} ms"
    print(f"{result['algorithm']:18s} {'  '.join(cells)}  {tail}", flush=True)


def draw(results: Iterable[dict[str, Any]], title: str, path: Path) -> None:
    """Curves with a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for result in results:
        mean, sd = np.array(result["mean"]), np.array(result["sd"])
        steps = np.arange(1, len(mean) + 1)
        (line,) = axes.plot(steps, mean, label=result["algorithm"])
        axes.fill_between(steps, mean - sd, np.minimum(mean + sd, 1), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="distinct architectures evaluated", ylabel="hypervolume / that of the true front")
    axes.set_ylim(0.8, 1.002)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All algorithms, one after the other."""
    labels = list(VARIANTS) if options.ablation else options.algorithms.split(",")
    objectives = tuple(options.objectives.split(","))
    cheap = tuple(options.cheap.split(",")) if options.cheap else ()
    if unknown := [name for name in labels if name not in ALGORITHMS and not options.ablation]:
        raise ConfigError(f"unknown algorithm {unknown[0]!r}", f"choose among {', '.join(ALGORITHMS)}")
    if set(cheap) - set(objectives):
        raise ConfigError(f"--cheap {options.cheap} is no objective", "name one of --objectives")
    if min(options.evaluations, options.seeds, options.jobs) < 1:
        raise ConfigError("evaluations, seeds and jobs must be at least 1", "give positive numbers")
    genes = tuple(options.genes.split(",")) if options.genes else ()
    load_table(options.table, objectives, genes)
    if cheap:
        labels.append(f"aging, {options.cheap} known")
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs) as workers:
        for label in labels:
            known = cheap if label.endswith(" known") else ()
            jobs = [
                Job(options.table, objectives, genes, label, seed, options.evaluations, known)
                for seed in range(options.seeds)
            ]
            done = list(workers.map(Job.run, jobs))
            results.append(summarize(label, [c for _, c, _ in done], [a for _, _, a in done], options.evaluations))
            show(results[-1], results[0] if len(results) > 1 else None)
    return results


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True)
    parser.add_argument("--objectives", required=True, help="columns, all minimised, separated by commas")
    parser.add_argument("--genes", default="", help="gene columns or patterns; default: the first columns")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--cheap", default="", help="objectives that ageing evolution may know beforehand, in a run more"
    )
    parser.add_argument("--ablation", action="store_true", help="variants of ageing evolution instead of algorithms")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    try:
        results = run(options)
        if options.json:
            head = {"schema_version": 1, "table": Path(options.table).name, "objectives": options.objectives.split(",")}
            write_atomic(options.json, json.dumps({**head, "results": results}) + "\n")
    except ArchsearchError as error:
        print(f"error: {error.cause}\nremedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    if options.png:
        draw(results, f"{Path(options.table).name}: {options.objectives}", options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
