"""What searches of one problem show beside each other: a line and a curve each, and records that may be joined."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from archsearch.errors import ConfigError

MARKS = (100, 200, 500)
GOAL = 0.95


def summarize(label: str, searches: Sequence[dict[str, Any]], evaluations: int) -> dict[str, Any]:
    """Mean and standard deviation over the seeds; a search that ended early keeps its last value."""
    curves = [search["curve"] for search in searches]
    padded = np.array([curve + curve[-1:] * (evaluations - len(curve)) for curve in curves])
    spread = padded.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(evaluations)
    needed = [next((i for i, value in enumerate(curve, 1) if value >= GOAL), None) for curve in curves]
    reached = [count for count in needed if count is not None]
    marks = sorted({mark for mark in MARKS if mark < evaluations} | {evaluations})
    return {
        "algorithm": label,
        "seeds": len(curves),
        "evaluations": evaluations,
        "shortest": min(map(len, curves)),
        "at": {str(mark): [float(padded[:, mark - 1].mean()), float(spread[mark - 1])] for mark in marks},
        "evaluations_to_0.95": {"median": statistics.median(reached) if reached else None, "reached": len(reached)},
        "ask_ms": round(statistics.median(search["ask_ms"] for search in searches), 2),
        **{name: ", ".join(sorted({search[name] for search in searches})) for name in ("python", "numpy")},
        "mean": padded.mean(axis=0).round(5).tolist(),
        "sd": spread.round(5).tolist(),
    }


def reference(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What the others are compared with: ageing evolution with its default settings."""
    return next((result for result in results if result["algorithm"] in ("aging", "default")), None)


def show(result: dict[str, Any], beside: dict[str, Any] | None) -> None:
    """One line: values at the marks and how many standard errors the result ``beside`` it is ahead."""
    cells = []
    for mark, (mean, sd) in result["at"].items():
        cell = f"@{mark} {mean:.4f}±{sd:.4f}"
        if beside not in (None, result) and mark in beside["at"]:
            other, spread = beside["at"][mark]
            error = np.sqrt(sd**2 / result["seeds"] + spread**2 / beside["seeds"])
            cell += f" ({(other - mean) / error:+.1f} se)" if error > 0 else ""
        cells.append(cell)
    goal, shortest = result["evaluations_to_0.95"], result.get("shortest", result["evaluations"])
    cells += [f"to {GOAL}: {goal['median']} ({goal['reached']}/{result['seeds']})", f"ask {result['ask_ms']:.1f} ms"]
    cells += [f"a search ended after {shortest}"] if shortest < result["evaluations"] else []
    print(f"{result['algorithm']:18s} {'  '.join(cells)}", flush=True)


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
    figure.savefig(path, dpi=100)


def new_record(problem: str, objectives: Sequence[str]) -> dict[str, Any]:
    """A record without results. Two records may be joined where all of this is equal."""
    versions = {name: version(name) for name in ("optuna", "scikit-learn")}
    return {"schema_version": 2, "problem": problem, "objectives": list(objectives), "versions": versions}


def merged(record: dict[str, Any], paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of other records of the same task and package versions; a later one replaces an earlier one.

    Raises:
        ConfigError: a file is no such record.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            data = json.loads(path.read_text())
            results = {result["algorithm"]: result for result in data.pop("results")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path} is no record of this script", "give files that --json wrote") from None
        if differing := [key for key, value in record.items() if data.get(key) != value]:
            raise ConfigError(f"{path} differs in {', '.join(differing)}", "join records of equal runs only")
        found |= results
    return list(found.values())
