"""What a latency profile is worth: to the search, on invented problems, and as a prediction, as a picture.

    python benchmarks/latency_profile.py gain --json experiments/latency-profile/gain.json
    python benchmarks/latency_profile.py picture latency_profiles/NAME.json --png experiments/latency-profile/error.png

gain: ageing evolution as shipped against the same that knows the latency of its offspring up to an error, from the
same seeds, on the formulas of ``formulas.py``. The error is log-normal and fixed for an architecture, as a profile's
is. What is recorded, and counts, is the true latency.
picture: predicted against measured step time of the architectures in a profile, held out ones apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from archsearch.files import write_atomic
from archsearch.latency_profile import LatencyProfile, load_profile
from archsearch.search.aging import AgingEvolutionSampler
from benchmarks.formulas import FORMULAS
from benchmarks.search import NAMES, Job, Task
from benchmarks.tables import Problem

LATENCY = 1
"""Its place among the objectives."""


@dataclass(frozen=True)
class Profiled(Job):
    """A search that knows latency up to a relative error; ``error`` None: it does not."""

    error: float | None = None

    def _variant(self, problem: Problem) -> AgingEvolutionSampler:
        error = self.error
        if error is None:
            return super()._variant(problem)

        def cheap(genome: Mapping[str, Any]) -> dict[str, float]:
            architecture = problem.space.build(genome)
            noise = np.random.default_rng(int(architecture.id, 16)).normal()
            return {NAMES[LATENCY]: problem.objectives(architecture)[LATENCY] * float(np.exp(error * noise))}

        return AgingEvolutionSampler(problem.space, seed=self.seed, objectives=NAMES[:2], cheap=cheap)


def search(job: Profiled) -> float:
    """Hypervolume at the end of a search."""
    return job.run()[0][-1]


def gain(options: argparse.Namespace) -> None:
    """Run all searches; the record is written after each formula."""
    results: dict[str, Any] = {"evaluations": options.evaluations, "seeds": options.seeds}
    for formula in FORMULAS:
        row: dict[str, list[float]] = {}
        for error in (None, *options.errors):
            name = "unknown" if error is None else f"known within {error:.0%}"
            jobs = [
                Profiled(Task(None, NAMES[:2], (), formula), f"aging, {name}", seed, options.evaluations, (), error)
                for seed in range(options.seeds)
            ]
            with ProcessPoolExecutor(options.jobs) as workers:
                row[name] = [round(value, 5) for value in workers.map(search, jobs)]
            better = np.array(row[name]) - row["unknown"]
            sure = better.std(ddof=1) / len(better) ** 0.5
            print(f"{formula:9} {name:18} {np.mean(row[name]):.4f}, {better.mean():+.4f} ± {sure:.4f}", flush=True)
        results[formula] = row
        if options.json:
            write_atomic(options.json, json.dumps(results) + "\n")


def picture(profile: LatencyProfile, path: Path) -> None:
    """Draw it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    for fitted, label, marker in ((False, "held out", "o"), (True, "fitted", "x")):
        rows = [one for one in profile.checked if one.fitted == fitted]
        axes.plot([one.measured_ms for one in rows], [one.predicted_ms for one in rows], marker, label=label)
    ends = [min(one.measured_ms for one in profile.checked), max(one.measured_ms for one in profile.checked)]
    axes.plot(ends, ends, color="gray", lw=0.8, zorder=0)
    axes.set(xlabel="measured [ms a token]", ylabel="predicted [ms a token]")
    error = profile.error
    assert error is not None
    axes.set_title(
        f"{profile.fingerprint.device}: {error.architectures} held-out architectures\n"
        f"off by {error.median:.2%} in the median, {error.worst:.2%} at worst",
        fontsize=10,
    )
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    searching = commands.add_parser("gain")
    searching.add_argument("--evaluations", type=int, default=100)
    searching.add_argument("--seeds", type=int, default=20)
    searching.add_argument("--errors", type=float, nargs="*", default=[0.0, 0.03])
    searching.add_argument("--jobs", type=int, default=1)
    searching.add_argument("--json", type=Path)
    drawing = commands.add_parser("picture")
    drawing.add_argument("profile", type=Path)
    drawing.add_argument("--png", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "gain":
        gain(options)
    else:
        picture(load_profile(options.profile), options.png)


if __name__ == "__main__":
    main()
