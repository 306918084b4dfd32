"""Search algorithms on a table: how much of the true front they find in how many evaluations.

    python benchmarks/search.py (--table TABLE.csv --objectives a,b [--genes 'layer*'] [--nearest] | --formula NAME)
        [--algorithms aging,nsga2,tpe,gp,random] [--evaluations 500] [--seeds 20] [--jobs 1] [--cheap b]
        [--ablation] [--curves FILE...] [--merge RECORD...] [--json PATH] [--png PATH]

Each objective is minimised and scaled to [0, 1] by the table; the reference point is (1, 1); the hypervolume
is divided by that of the true front; only distinct architectures count. The shipped samplers run in the
shipped loop on a study in memory: a table is a search space, its look-up an evaluator. A formula
(benchmarks/formulas.py) stands for a space that no table can hold.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from archsearch.config import RunConfig
from archsearch.errors import ArchsearchError, ConfigError
from archsearch.files import write_atomic
from archsearch.search.aging import AgingEvolutionSampler
from archsearch.search.executors import InlineExecutor
from archsearch.search.loop import Search
from benchmarks.asks import TimedLedger
from benchmarks.comparison import draw, merged, new_record, reference, show, summarize
from benchmarks.curves import Curves
from benchmarks.formulas import FORMULAS
from benchmarks.tables import NAMES, Problem, ProblemEvaluator, coverage, load_table

ALGORITHMS = ("aging", "nsga2", "tpe", "gp", "random")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no surrogate": {"surrogate": False},
    "no descriptors": {"descriptors": False},
    "no design": {"design": False},
    "no ordinal": {"ordinal": False},
    "no adaptive": {"adaptive": False},
    "no crossover": {"crossover": 0.0},
    "all guided": {"unguided": 0.0},
    "population only": {"front_parents": 0.0},
    "front only": {"front_parents": 1.0},
    "plain": {"surrogate": False, "design": False, "ordinal": False, "adaptive": False},
}


@dataclass(frozen=True)
class Task:
    """What is searched: a table, or a formula."""

    table: str | None
    objectives: tuple[str, ...]
    genes: tuple[str, ...] = ()
    formula: str | None = None
    nearest: bool = False

    @property
    def name(self) -> str:
        """Of the file or the formula."""
        return self.formula or Path(str(self.table)).name + (", nearest rows" if self.nearest else "")

    @property
    def problem(self) -> Problem:
        """Raises ConfigError as ``load_table`` does."""
        if self.formula:
            return FORMULAS[self.formula]
        return load_table(str(self.table), self.objectives, self.genes, self.nearest)


@dataclass(frozen=True)
class Job:
    """One search: an algorithm, or a variant of ageing evolution, from one seed."""

    task: Task
    label: str
    seed: int
    evaluations: int
    cheap: tuple[str, ...] = ()

    @property
    def key(self) -> list[Any]:
        """What tells this search from others, whatever their budget."""
        return [self.task.name, *self.task.objectives, self.label, self.seed]

    def run(self) -> tuple[list[float], float]:
        """Hypervolume after each evaluation, and the median milliseconds an ask."""
        problem = self.task.problem
        evaluator = ProblemEvaluator(problem)
        config = self._config(problem)
        ledger = TimedLedger(config)
        search = Search(config, ledger, lambda: InlineExecutor(evaluator))
        # A third objective bears the name of one that the shipped loop computes from the architecture.
        if self.label not in ALGORITHMS or (self.label == "aging" and len(self.task.objectives) > 2):
            variant = self._variant(problem)
            search._sampler_for = lambda count, refused: variant
        if (summary := search.run()).reason not in ("finished", "exhausted"):
            raise RuntimeError(summary.message)  # a curve that a signal cut short is no result
        if not evaluator.points:
            raise ConfigError(f"{self.label}, seed {self.seed}: {summary.message}", "search a more complete table")
        return coverage(problem, evaluator.points), 1e3 * statistics.median(ledger.seconds)

    def _config(self, problem: Problem) -> RunConfig:
        search: dict[str, Any] = {
            "sampler": self.label if self.label in ALGORITHMS else "aging",
            "evaluations": min(self.evaluations, problem.space.size),
            "seed": self.seed,
            "objectives": list(NAMES[: len(self.task.objectives)]),
        }
        execution = {"executor": "inline", "min_free_bytes": 0}
        return RunConfig.model_validate({"space": problem.space, "search": search, "execution": execution})

    def _variant(self, problem: Problem) -> AgingEvolutionSampler:
        settings = VARIANTS.get(self.label, {})
        if not self.cheap:
            return AgingEvolutionSampler(problem.space, seed=self.seed, **settings)
        known = [(NAMES[i], i) for i, name in enumerate(self.task.objectives) if name in self.cheap]

        def cheap(genome: Mapping[str, Any]) -> dict[str, float]:
            values = problem.objectives(problem.space.build(genome))
            return {name: values[i] for name, i in known}

        objectives = NAMES[: len(self.task.objectives)]
        return AgingEvolutionSampler(problem.space, seed=self.seed, objectives=objectives, cheap=cheap, **settings)


# The command line


def run(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All algorithms, one after the other; the record is written after each."""
    labels = list(VARIANTS) if options.ablation else [name for name in options.algorithms.split(",") if name]
    cheap = tuple(options.cheap.split(",")) if options.cheap else ()
    if unknown := [name for name in labels if name not in (*ALGORITHMS, *VARIANTS)]:
        choices = ", ".join((*ALGORITHMS, *VARIANTS))
        raise ConfigError(f"unknown algorithm {unknown[0]!r}", f"choose among {choices}")
    if set(cheap) - set(task.objectives):
        raise ConfigError(f"--cheap {options.cheap} is no objective", "name one of --objectives")
    if min(options.evaluations, options.seeds, options.jobs) < 1:
        raise ConfigError("evaluations, seeds and jobs must be at least 1", "give positive numbers")
    labels += [f"aging, {options.cheap} known"] if cheap else []
    for path in filter(None, (options.json, options.png, *options.curves[:1])):
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is no folder", "make it, or write elsewhere")
    record = new_record(task.name, task.objectives)
    done = merged(record, options.merge)
    for result in done:
        show(result, reference(done))
    curves = Curves(options.curves)
    for label, searches in _searches(task, labels, options, curves):
        result = summarize(label, searches, options.evaluations)
        show(result, reference(done))
        done = [other for other in done if other["algorithm"] != label] + [result]
        _write(options.json, record | {"results": done})
    _write(options.json, record | {"results": done})
    return done


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path:
        write_atomic(path, json.dumps(record) + "\n")


def _searches(
    task: Task, labels: Sequence[str], options: argparse.Namespace, curves: Curves
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each algorithm with its searches, once all of them are known; those that are missing run side by side."""
    cheap = tuple(options.cheap.split(",")) if options.cheap else ()
    jobs = {
        label: [
            Job(task, label, seed, options.evaluations, cheap if label.endswith(" known") else ())
            for seed in range(options.seeds)
        ]
        for label in labels
    }
    missing = [job for each in jobs.values() for job in each if curves.get(job.key, job.evaluations) is None]
    with ProcessPoolExecutor(options.jobs, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        waiting = {pool.submit(job.run): job for job in missing}
        try:
            for count, future in enumerate(as_completed(waiting), 1):
                curves.add(waiting[future].key, waiting[future].evaluations, *future.result())
                if sys.stderr.isatty():
                    print(f"{count} of {len(missing)} searches", end="\r", file=sys.stderr, flush=True)
                yield from _complete(jobs, curves)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    yield from _complete(jobs, curves)


def _complete(jobs: dict[str, list[Job]], curves: Curves) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Takes out of ``jobs`` the algorithms whose searches are all known."""
    for label in list(jobs):
        known = [found for job in jobs[label] if (found := curves.get(job.key, job.evaluations)) is not None]
        if len(known) == len(jobs[label]):
            del jobs[label]
            yield label, known


def make_task(options: argparse.Namespace) -> Task:
    """What to search. Raises ConfigError where it cannot be read."""
    if bool(options.table) == bool(options.formula):
        raise ConfigError("what is to be searched?", "give either --table or --formula")
    if options.table and not options.objectives:
        raise ConfigError("--table needs --objectives", "name the columns to be minimised")
    genes = tuple(options.genes.split(",")) if options.genes else ()
    objectives = tuple(options.objectives.split(",")) if options.table else NAMES[:2]
    task = Task(options.table, objectives, genes, options.formula, options.nearest)
    genome = task.problem.space.genes  # a table is read here, so that its errors come before any work
    print(f"{task.name}: {len(genome)} genes ({', '.join(genome)})", file=sys.stderr)
    return task


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table")
    parser.add_argument("--formula", choices=sorted(FORMULAS), help="an invented 26-gene space instead of a table")
    parser.add_argument("--objectives", default="", help="columns, all minimised, separated by commas")
    parser.add_argument("--genes", default="", help="gene columns or patterns; default: the first columns")
    parser.add_argument("--nearest", action="store_true", help="for a table that holds few of its genes' combinations")
    parser.add_argument(
        "--algorithms", default=",".join(ALGORITHMS), help="or variants of --ablation; empty: join records only"
    )
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--cheap", default="", help="objectives that ageing evolution may know beforehand, in a run more"
    )
    parser.add_argument("--ablation", action="store_true", help="variants of ageing evolution instead of algorithms")
    parser.add_argument(
        "--curves", type=Path, nargs="*", default=[], help="finished searches, not run again; new ones join the first"
    )
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="records of earlier runs to take over")
    parser.add_argument("--json", type=Path, help="the record; written after each algorithm")
    parser.add_argument("--png", type=Path)
    return parser.parse_args(words)


def main() -> int:
    """Run, print, write."""
    options = parse()
    try:
        task = make_task(options)
        results = run(task, options)
    except ArchsearchError as error:
        print(f"error: {error.cause}\nremedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where --curves keeps what has finished", file=sys.stderr)
        return 130
    if options.png:
        draw(results, f"{task.name}: {', '.join(task.objectives)}", options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
