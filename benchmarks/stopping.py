"""Early stopping on a table: hypervolume at equal training cost, with and without rungs.

    python benchmarks/stopping.py --table TABLE.csv --objectives error,latency --rungs error_12ep=0.06
        [--curves SEED] [--rules "none,clear 0.95,quota 3"] [--budget 100] [--seeds 8] [--jobs 1]
        [--json PATH] [--png PATH]

A table is searched by the shipped loop, as in ``benchmarks/search.py``. ``--rungs`` names the columns with the first
objective as it was after a share of the training. Without them ``--curves`` draws learning curves with three rungs
(1/16, 1/4 and all of the training): a power law down to the table's value, whose height and exponent vary with the
second objective and at random, so that curves cross, with noise at each rung. ``--budget`` is in full trainings.

Rules: ``none``; ``clear P M``, the shipped one at confidence P once M have ended (``mute P M``: the sampler learns
nothing from whom it stopped; ``bare P M``: a forecast from the loss alone); ``quota E``, which goes on with the best
1/E of a rung by non-domination rank, then crowding: asynchronous successive halving for several objectives as in
Schmucker et al. 2021 (MO-ASHA), its stopping variant.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.evaluation import Evaluation, Outcome, Rung
from archsearch.files import to_json, write_atomic
from archsearch.search.executors import InlineExecutor
from archsearch.search.ledger import Ledger
from archsearch.search.loop import Search
from archsearch.search.pareto import crowding_distances, front, hypervolume, non_domination_ranks
from archsearch.search.rungs import Rungs, fit_forecast
from archsearch.stopping import LOSS, Forecast, StoppingRule, Verdict, features
from benchmarks.tables import NAMES, Table, TableSpace, load_table

WHOLE = 16_000
"""Tokens that stand for a full training; one step is 8."""
SHARES = (1 / 16, 1 / 4)
RULES = "none,clear 0.8 10,clear 0.95 10,bare 0.95 10,mute 0.95 10,quota 2,quota 3,quota 4"


class Spent(BaseException):
    """The budget is used up."""


class CurveEvaluator:
    """Looks a row up, rung by rung, and notes what each look-up cost."""

    def __init__(self, table: Table, rungs: dict[int, np.ndarray], budget: float) -> None:
        self.table, self.rungs, self.budget = table, rungs, budget
        self.cost = 0.0
        self.done: list[tuple[float, int | None]] = []

    def __call__(self, architecture: Architecture, *, seed: int, stopping: Any = None) -> Evaluation:
        row = architecture.vocab_size - 2
        values = {name: float(value) for name, value in zip(NAMES, self.table.values[row], strict=False)}
        reached: list[Rung] = []
        for tokens, losses in self.rungs.items():
            reached.append(Rung(tokens=tokens, objectives=values | {LOSS: float(losses[row])}))
            verdict = stopping.verdict(tokens, reached[-1].objectives) if stopping is not None else None
            if verdict is not None:
                self._spend(tokens / WHOLE, None)
                return Evaluation(
                    architecture=architecture, outcome=Outcome.STOPPED, rungs=tuple(reached), verdict=verdict
                )
        self._spend(1.0, row)
        return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=values, rungs=tuple(reached))

    def _spend(self, share: float, row: int | None) -> None:
        self.cost += share
        if self.cost > self.budget:
            raise Spent
        self.done.append((self.cost, row))


class QuotaRule:
    """Goes on with the best 1/eta of everything that has reached the rung."""

    def __init__(self, eta: float, records: dict[int, list[list[float]]], rule: StoppingRule) -> None:
        self.eta, self.records, self.rule = eta, records, rule

    def verdict(self, tokens: int, known: dict[str, float]) -> Verdict | None:
        others = self.records.get(tokens, [])
        points = np.array([*others, [known[name] for name in self.rule.objectives]])
        if len(points) < self.eta:
            return None
        order = np.lexsort((-crowding_distances(points), non_domination_ranks(points)))
        if np.flatnonzero(order == len(points) - 1)[0] < max(1, int(len(points) / self.eta)):
            return None
        forecast = self.rule.forecasts.get(tokens)
        expected = forecast.expected(features(self.rule.objectives, known)) if forecast else known[LOSS]
        return Verdict(tokens=tokens, dominated_by=0, expected=expected, margin=0.0, to_beat=0.0)


class QuotaRungs(Rungs):
    """Keeps every record of every rung, stopped ones included."""

    def __init__(self, config: RunConfig, eta: float) -> None:
        super().__init__(config)
        self.eta = eta
        self.records: dict[int, list[list[float]]] = {}

    def add(self, number: int, evaluation: Evaluation) -> None:
        super().add(number, evaluation)
        for rung in evaluation.rungs:
            self.records.setdefault(rung.tokens, []).append([rung.objectives[n] for n in self._objectives])

    def rule(self) -> Any:
        return QuotaRule(self.eta, self.records, super().rule() or StoppingRule(objectives=self._objectives))


class MuteRungs(Rungs):
    """The shipped rule, with nothing told to the sampler."""

    def expected(self, evaluation: Evaluation) -> None:
        return None


class BareRungs(Rungs):
    """A forecast from the loss alone."""

    def _forecast(self, tokens: int, numbers: Any) -> Forecast | None:
        pairs = [
            (rung.objectives[LOSS], self._ended[number].objectives[LOSS])
            for number in numbers
            for rung in self._ended[number].rungs
            if rung.tokens == tokens
        ]
        if len(pairs) < self._config.minimum:
            return None
        none = [0.0] * (len(self._objectives) - 1)
        rows = [[1.0, early, *none] for early, _ in pairs]
        return fit_forecast(rows, [last for _, last in pairs], self._config.confidence)


@dataclass(frozen=True)
class Job:
    """One search with one rule from one seed."""

    table: str
    objectives: tuple[str, ...]
    rungs: tuple[tuple[str, float], ...]
    curves: int
    rule: str
    seed: int
    budget: float

    def run(self) -> tuple[str, list[tuple[float, float]], float, int]:
        """Rule, (cost, covered hypervolume) course, share stopped, evaluations."""
        table = load_table(self.table, self.objectives)
        rungs = self._table_rungs() if self.rungs else drawn_curves(table, self.curves)
        evaluator = CurveEvaluator(table, rungs, self.budget)
        name, number, minimum = [*self.rule.split(), "", ""][:3]
        stopping = {"confidence": float(number)} if number and float(number) < 1 else {}
        stopping |= {"minimum": int(minimum)} if minimum else {}
        config = self._config(table, [] if name == "none" else [*rungs, WHOLE], stopping)
        search = Search(config, Ledger(config), lambda: InlineExecutor(evaluator))
        if name == "quota":
            search._rungs = QuotaRungs(config, float(number))
        if name == "bare":
            search._rungs = BareRungs(config)
        if name == "mute":
            search._rungs = MuteRungs(config)
        with suppress(Spent):
            search.run()
        stopped = sum(row is None for _, row in evaluator.done) / len(evaluator.done)
        return self.rule, course(table, evaluator.done), stopped, len(evaluator.done)

    def _table_rungs(self) -> dict[int, np.ndarray]:
        frame = pd.read_csv(self.table)
        return {int(share * WHOLE): frame[column].to_numpy(dtype=np.float64) for column, share in self.rungs}

    def _config(self, table: Table, rungs: list[int], stopping: dict[str, Any]) -> RunConfig:
        search = {
            "seed": self.seed,
            "evaluations": len(table.rows),
            "objectives": list(NAMES[: len(self.objectives)]),
            "stopping": stopping,
        }
        proxy = {"batch": 1, "context": 8, "tokens": WHOLE, "rungs": rungs}
        execution = {"executor": "inline", "min_free_bytes": 0}
        return RunConfig.model_validate(
            {"space": TableSpace.of(table), "search": search, "proxy": proxy, "execution": execution}
        )


def drawn_curves(table: Table, seed: int) -> dict[int, np.ndarray]:
    """The first objective at each share of the training, by power laws that cross, with noise."""
    rng = np.random.default_rng(seed)
    last, size = table.values[:, 0], table.scaled[:, 1]
    spread = last.std()
    height = spread * np.exp(0.3 * rng.standard_normal(len(last)) + 0.5 * size)
    exponent = 0.5 * np.exp(0.2 * rng.standard_normal(len(last)) - 0.3 * size)
    noise = 0.05 * spread
    return {
        int(share * WHOLE): last + height * (share**-exponent - 1) + noise * rng.standard_normal(len(last))
        for share in SHARES
    }


def course(table: Table, done: list[tuple[float, int | None]]) -> list[tuple[float, float]]:
    members: list[int] = []
    covered, found, corner = 0.0, [], np.ones(table.values.shape[1])
    for cost, row in done:
        if row is not None:
            rows = [*members, row]
            members = [rows[i] for i in front(table.scaled[rows])]
            if row in members:
                covered = hypervolume(table.scaled[members], corner) / table.whole
        found.append((cost, covered))
    return found


def at(course: list[tuple[float, float]], cost: float) -> float:
    return max((value for spent, value in course if spent <= cost), default=0.0)


def summarize(rule: str, runs: list[Any], budget: float) -> dict[str, Any]:
    marks = np.linspace(budget / 50, budget, 50)
    curves = np.array([[at(run[1], mark) for mark in marks] for run in runs])
    sd = curves.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(marks))
    shown = {
        f"{mark:g}": [float(curves[:, i].mean()), float(sd[i])] for i, mark in enumerate(marks) if i in (11, 24, 49)
    }
    return {
        "rule": rule,
        "seeds": len(runs),
        "at": shown,
        "final": curves[:, -1].round(6).tolist(),
        "stopped": float(np.mean([run[2] for run in runs])),
        "evaluations": float(np.mean([run[3] for run in runs])),
        "cost": marks.tolist(),
        "mean": curves.mean(axis=0).round(6).tolist(),
        "sd": sd.round(6).tolist(),
    }


def show(result: dict[str, Any]) -> None:
    cells = "  ".join(f"@{mark} {mean:.4f}±{sd:.4f}" for mark, (mean, sd) in result["at"].items())
    tail = f"{result['stopped']:.0%} of {result['evaluations']:.0f} stopped"
    print(f"{result['rule']:12s} {cells}  {tail}", flush=True)


def draw(results: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for result in results:
        mean, sd = np.array(result["mean"]), np.array(result["sd"])
        (line,) = axes.plot(result["cost"], mean, label=result["rule"])
        error = sd / np.sqrt(result["seeds"])
        axes.fill_between(result["cost"], mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="training cost [full trainings]", ylabel="hypervolume / that of the true front")
    axes.set_ylim(0.8, 1.002)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", required=True)
    parser.add_argument("--objectives", required=True)
    parser.add_argument("--rungs", default="", help="COLUMN=SHARE of the training, with commas")
    parser.add_argument("--curves", type=int, default=0, help="seed of the drawn curves, without --rungs")
    parser.add_argument("--rules", default=RULES)
    parser.add_argument("--budget", type=float, default=100)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    given = parser.parse_args()
    pairs = [pair.split("=") for pair in given.rungs.split(",") if pair]
    rungs = tuple((column, float(share)) for column, share in pairs)
    objectives = tuple(given.objectives.split(","))
    rules = given.rules.split(",")
    jobs = [
        Job(given.table, objectives, rungs, given.curves, rule, seed, given.budget)
        for rule in rules
        for seed in range(given.seeds)
    ]
    results = []
    with ProcessPoolExecutor(given.jobs) as pool:
        runs = [pool.submit(job.run) for job in jobs]
        for index, rule in enumerate(rules):
            own = [run.result() for run in runs[index * given.seeds : (index + 1) * given.seeds]]
            results.append(summarize(rule, own, given.budget))
            show(results[-1])
            if given.json:
                settings = {key: str(value) for key, value in vars(given).items() if key not in ("json", "png", "jobs")}
                write_atomic(given.json, to_json({"settings": settings, "results": results}))
    if given.png:
        draw(results, f"Early stopping, {given.objectives}: {given.seeds} seeds, band of one standard error", given.png)


if __name__ == "__main__":
    main()
