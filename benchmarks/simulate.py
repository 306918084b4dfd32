"""A simulated cluster: the shipped loop and sampler with thousands of workers, in virtual time.

    python benchmarks/simulate.py [--workers 8,64,256,1024,4096] [--per-worker 10] [--evaluations N]
        [--table TABLE.csv --objectives a,b | --space search_spaces/hybrid.yaml] [--sampler aging]
        [--mean 60] [--sigma 0.5] [--failures 0.01] [--restart 10] [--seed 0] [--no-serial] [--json PATH] [--png PATH]

Durations are log-normal with the given mean in seconds; a share of the evaluations fails, half of them
as CRASH (tried once more) and half as NODE_LOST (tried until they succeed), and costs the worker a restart.
Evaluations take virtual time only. What the driver computes takes its CPU time on the same clock (so that
other processes of this machine do not count): workers wait while it thinks. Utilisation is busy worker time
over all worker time until the budget is handed out, the first fill included. Quality is the hypervolume
after the budget, over that of as many evaluations one at a time by the same sampler (and over that of the
true front, for a table). Without a table, a formula of depth, width, kinds and size stands for the training.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from archsearch.architecture import Architecture
from archsearch.config import RunConfig, load_config
from archsearch.errors import ArchsearchError, ConfigError
from archsearch.evaluation import Evaluation, Evaluator, Outcome
from archsearch.files import to_json, write_atomic
from archsearch.search.ledger import Ledger
from archsearch.search.loop import Search
from archsearch.search.pareto import front, hypervolume
from benchmarks.tables import ProblemEvaluator, Table, load_table
from benchmarks.virtual_cluster import VirtualCluster, Workload

QUALITY = {"a": 0.00, "w": 0.03, "d": -0.02, "gd": -0.03, "gl": 0.01, "m2": -0.01}
"""Made-up loss of a mixer against attention, in nats: the simulation needs a landscape, not a truth."""


class FormulaEvaluator:
    """Loss falls with depth, width and the right mixers; latency is bytes moved and operators started."""

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        """Compute."""
        kinds = [operator.kind for operator in architecture.operators]
        mixers = [QUALITY.get(kind, 0.0) for kind in kinds if kind != "f"]
        changes = sum(a != b for a, b in itertools.pairwise(kinds)) / len(kinds)
        loss = 1.8 + 1.5 * len(kinds) ** -0.7 + 40.0 * architecture.hidden_size**-0.7
        loss += sum(mixers) / max(len(mixers), 1) - 0.05 * changes
        latency = 1e-5 * len(kinds) + architecture.step_bytes(4096) / 2e12
        objectives = {"loss": loss, "decode_latency": latency}
        return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=objectives, seed=seed)


@dataclass(frozen=True)
class Result:
    """What one simulation showed; times in seconds unless named otherwise."""

    workers: int
    evaluations: int
    results: int
    reason: str
    utilisation: float
    makespan: float
    driver_ms_an_event: float
    driver_load: float
    quality: float | None = None
    quality_serial: float | None = None
    quality_ratio: float | None = None


class Landscape:
    """The objectives of all results, in the order in which they came, and the volume that they dominate."""

    def __init__(self, inner: Evaluator) -> None:
        self._inner = inner
        self.points: list[list[float]] = []

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        """Evaluate and take note."""
        evaluation = self._inner(architecture, seed=seed)
        self.points.append(list(evaluation.objectives.values()))
        return evaluation

    def volume(self, count: int, low: np.ndarray, high: np.ndarray) -> float:
        """Hypervolume of the first ``count``, with objectives scaled to [0, 1] between ``low`` and ``high``."""
        points = (np.array(self.points[:count]) - low) / (high - low)
        return hypervolume(points[front(points)], np.ones(points.shape[1]))


def simulate(config: RunConfig, evaluator: Evaluator, workers: int, load: Workload) -> tuple[Result, Landscape]:
    """Run one search to its end."""
    landscape = Landscape(evaluator)
    clusters: list[VirtualCluster] = []

    def start() -> VirtualCluster:
        clusters.append(VirtualCluster(workers, landscape, load))
        return clusters[0]

    summary = Search(config, Ledger(config), start).run()
    cluster = clusters[0]
    result = Result(
        workers=workers,
        evaluations=summary.progress.done,
        results=cluster.results,
        reason=summary.reason,
        utilisation=cluster.utilisation,
        makespan=cluster.clock,
        driver_ms_an_event=1e3 * cluster.driver_seconds / max(cluster.results, 1),
        driver_load=cluster.driver_seconds / cluster.clock,
    )
    return result, landscape


def make_config(options: argparse.Namespace, table: Table | None, evaluations: int) -> RunConfig:
    """The config of one simulation."""
    search = {"evaluations": evaluations, "sampler": options.sampler, "seed": options.seed}
    if table is not None:
        count = min(evaluations, len(table.rows))
        data = {"space": table.space, "search": search | {"evaluations": count}}
        return RunConfig.model_validate(data)
    return load_config(options.space, [f"search.{name}={value}" for name, value in search.items()])


def run(options: argparse.Namespace) -> list[Result]:
    """All simulations, each printed as it ends."""
    fleet = [int(count) for count in options.workers.split(",")]
    if (
        min(fleet) < 1
        or options.per_worker < 1
        or not 0 <= options.failures < 0.5
        or min(options.mean, options.sigma) <= 0
    ):
        raise ConfigError("a number of the simulation is out of range", "see --help")
    table = load_table(options.table, tuple(options.objectives.split(","))) if options.table else None
    load = Workload(options.mean, options.sigma, options.failures, options.restart, options.seed)
    budgets = [options.evaluations or max(count * options.per_worker, 200) for count in fleet]
    configs = [make_config(options, table, budget) for budget in budgets]
    print(HEADER, flush=True)
    done = []
    for workers, config in zip(fleet, configs, strict=True):
        evaluator: Evaluator = FormulaEvaluator() if table is None else ProblemEvaluator(table)
        done.append(simulate(config, evaluator, workers, load))
        print(line(done[-1][0]), flush=True)
    if options.no_serial:
        return [result for result, _ in done]
    evaluator = FormulaEvaluator() if table is None else ProblemEvaluator(table)
    quiet = Workload(load.mean, load.sigma, load.failures, 0.0, load.seed)
    largest = max(configs, key=lambda config: config.search.evaluations)
    serial, reference = simulate(largest, evaluator, 1, quiet)
    print(line(serial), flush=True)
    results = [compare(result, landscape, reference, table) for result, landscape in done]
    print("\nquality, and that of as many evaluations one at a time:")
    for result in results:
        print(f"{result.workers:>8,}  {result.quality:.4f}  {result.quality_serial:.4f}  {result.quality_ratio:.2%}")
    return [*results, serial]


HEADER = "workers  evaluations  results  utilisation  makespan [h]  driver [ms an event]  driver load"


def line(result: Result) -> str:
    """One row of the table."""
    ended = "" if result.reason == "finished" else f"  {result.reason}"
    return (
        f"{result.workers:>7,}  {result.evaluations:>11,}  {result.results:>7,}  {result.utilisation:>11.2%}  "
        f"{result.makespan / 3600:>12.2f}  {result.driver_ms_an_event:>20.2f}  {result.driver_load:>11.1%}{ended}"
    )


def compare(result: Result, landscape: Landscape, reference: Landscape, table: Table | None) -> Result:
    """``result`` with its quality beside that of the serial search."""
    if table is not None:
        (low, high), whole = table.bounds, table.whole
    else:
        every = np.array(landscape.points + reference.points)
        low, high, whole = every.min(axis=0), every.max(axis=0), 1.0
    count = len(landscape.points)
    own = landscape.volume(count, low, high) / whole
    serial = reference.volume(count, low, high) / whole
    return Result(**(asdict(result) | {"quality": own, "quality_serial": serial, "quality_ratio": own / serial}))


def draw(results: Sequence[Result], path: Path) -> None:
    """Utilisation and the driver's time an event against the size of the cluster."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    workers = [result.workers for result in results]
    left.plot(workers, [100 * result.utilisation for result in results], marker="o")
    left.axhline(99, color="gray", linestyle=":", label="99 %")
    left.set(ylabel="busy worker time [%]")
    right.plot(workers, [result.driver_ms_an_event for result in results], marker="o")
    right.axhline(10, color="gray", linestyle=":", label="10 ms")
    right.set(ylabel="driver time [ms an event]", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="workers")
        axes.set_xscale("log", base=2)
        axes.set_xticks(workers, [f"{count:,}" for count in workers])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="8,64,256,1024,4096")
    parser.add_argument("--per-worker", type=int, default=10, help="evaluations a worker, 200 in all at least")
    parser.add_argument("--evaluations", type=int, help="the same number for every size of the cluster")
    parser.add_argument("--table")
    parser.add_argument("--objectives", default="")
    parser.add_argument("--space", default="search_spaces/hybrid.yaml")
    parser.add_argument("--sampler", default="aging")
    parser.add_argument("--mean", type=float, default=60.0)
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--failures", type=float, default=0.01)
    parser.add_argument("--restart", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-serial", action="store_true", help="leave the comparison with one worker out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args(words)


def main() -> int:
    """Run, print, write."""
    options = parse()
    try:
        results = run(options)
        if options.json:
            settings = vars(options) | {"table": options.table and Path(options.table).name}
            del settings["json"], settings["png"]
            data = {"schema_version": 1, "settings": settings, "results": [asdict(result) for result in results]}
            write_atomic(options.json, to_json(data))
        if options.png:
            draw([result for result in results if result.workers > 1], options.png)
    except ArchsearchError as error:
        print(f"error: {error.cause}\nremedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
