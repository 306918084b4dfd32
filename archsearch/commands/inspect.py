"""The commands that look at a run: inspect and export."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.table import Table

from archsearch.api import Results, open_run
from archsearch.commands.certainty import (
    certainty_cells,
    certainty_columns,
    certainty_json,
    certainty_lines,
    rungs_json,
)
from archsearch.commands.console import print_json, safe, say, stdout
from archsearch.commands.insight import insight_json, print_insight
from archsearch.commands.predicted import profile_json, profile_lines
from archsearch.errors import StorageError, UsageError
from archsearch.evaluation import perplexity

if TYPE_CHECKING:
    from archsearch.export import Format
    from archsearch.search.study import Candidate

COLUMNS = {
    "loss": "loss",
    "recall": "recall error",
    "decode_latency": "decode [s]",
    "parameters": "parameters",
    "state_bytes": "state [KiB]",
}


def show(path: Path, trial: int | None, *, json: bool, csv: bool, why: bool, noise: Path | None = None) -> None:
    """Print a run, or one of its trials, and bring its report up to date.

    Seed noise comes from the study of ``validate-proxy`` in ``noise``, or else from the replicates of the run.
    """
    results = open_run(path).results()
    if noise is not None:
        from archsearch.validity.study import read_noise

        results = replace(results, given_noise=read_noise(noise, results.config.proxy))
    if trial is not None:
        candidate = results.candidate(trial)
        print_json("inspect", {"trial": trial_json(candidate)}) if json else print_trial(candidate)
        return
    report(results)
    if csv:
        from archsearch.report import csv_text, table

        sys.stdout.write(csv_text(table(results.config, results.candidates)))
    elif json:
        print_json("inspect", {**front_json(results), **(insight_json(results) if why else {})})
    else:
        print_front(results)
        if why:
            print_insight(results)


def report(results: Results) -> None:
    """Bring the report of a run up to date; what was found counts even where that fails."""
    from archsearch.report import write_report

    try:
        write_report(results.config, results.candidates, results.reference, results.path)
    except StorageError as error:
        say(f"the report was not written: {error.cause}")


def export_trial(path: Path, trial: int | None, to: Path, format: str, *, json: bool) -> None:
    """Export one trial, or the first of the front."""
    run = open_run(path)
    if trial is None:
        front = run.front()
        if not front:
            raise UsageError(f"{path} has no finished candidate", f"go on with `archsearch resume {path}`")
        trial = front[0].number
    # The writer refuses unknown formats.
    target = run.export(trial, to, cast("Format", format), say=say)
    if json:
        print_json("export", {"trial": trial, "format": format, "path": str(target)})
    else:
        print(target)


def outcomes(candidates: list[Candidate]) -> dict[str, int]:
    """How many trials ended how."""
    return dict(Counter(str(candidate.outcome or "RUNNING") for candidate in candidates).most_common())


def front_json(results: Results) -> dict[str, Any]:
    """A run as plain data."""
    from archsearch.report.device_time import device_time

    time = device_time(results.candidates)
    return {
        "run": str(results.path),
        "space": results.config.space.name,
        "objectives": list(results.config.search.objectives),
        "evaluations": results.config.search.evaluations,
        "evaluated": results.evaluated,
        "outcomes": outcomes(results.candidates),
        "hypervolume": results.hypervolume,
        "hypervolume_reference": list(results.reference) if results.reference else None,
        "front": [
            trial_json(candidate, brief=True) | certainty_json(results, candidate) for candidate in results.front
        ],
        "seed_noise": results.noise.model_dump(mode="json") if results.noise else None,
        "rungs": rungs_json(results),
        "latency_profile": profile_json(results),
        "device_time": {"seconds": time.seconds, "overhead": time.overhead},
    }


def trial_json(candidate: Candidate, *, brief: bool = False) -> dict[str, Any]:
    """A trial as plain data."""
    architecture, evaluation = candidate.architecture, candidate.evaluation
    data: dict[str, Any] = {
        "number": candidate.number,
        "outcome": str(candidate.outcome or "RUNNING"),
        "id": architecture.id if architecture else None,
        "notation": architecture.notation if architecture else None,
        "hidden_size": architecture.hidden_size if architecture else None,
        "parameters": architecture.parameters if architecture else None,
        "objectives": evaluation.objectives if evaluation else {},
    }
    if brief:
        return data
    return data | {
        "genome": candidate.genome,
        "lineage": candidate.lineage,
        "duplicate_of": candidate.duplicate_of,
        "attempts": candidate.attempts,
        "proposed": candidate.proposed.isoformat() if candidate.proposed else None,
        "finished": candidate.finished.isoformat() if candidate.finished else None,
        "evaluation": evaluation.model_dump(mode="json") if evaluation else None,
    }


def print_front(results: Results) -> None:
    """The front as a table, and a summary under it."""
    from archsearch.report.device_time import device_time

    objectives = results.config.search.objectives
    grid = Table(box=None, header_style="bold", pad_edge=False)
    grid.add_column("trial", justify="right")
    for name in objectives:
        grid.add_column(safe(COLUMNS[name]), justify="right")
    if "loss" in objectives:
        grid.add_column("perplexity", justify="right")
    certainty = certainty_columns(results)
    for column in certainty:
        grid.add_column(safe(column), justify="right")
    if "parameters" not in objectives:
        grid.add_column("parameters", justify="right")
    grid.add_column("width", justify="right")
    grid.add_column("operators", overflow="fold")
    for candidate in results.front:
        grid.add_row(*_cells(candidate, objectives, certainty_cells(results, candidate, certainty)))
    console = stdout()
    console.print(grid)
    total = results.config.search.evaluations
    summary = f"{safe(results.config.space.name)}: {results.evaluated} of {total} candidates evaluated, "
    summary += f"{len(results.front)} on the front"
    if results.hypervolume is not None:
        summary += f", hypervolume {results.hypervolume:.4g}"
    console.print(f"\n{summary}")
    ended = outcomes(results.candidates)
    console.print("trials: " + ", ".join(f"{count} {name}" for name, count in ended.items()))
    time = device_time(results.candidates)
    if time.total:
        console.print(f"time: {time}", soft_wrap=True)
    for line in [*certainty_lines(results), *profile_lines(results)]:
        console.print(line, soft_wrap=True)


def _cells(candidate: Candidate, objectives: tuple[str, ...], certainty: list[str]) -> list[str]:
    architecture, evaluation = candidate.architecture, candidate.evaluation
    assert architecture is not None
    assert evaluation is not None
    cells = [str(candidate.number), *(_value(name, evaluation.objectives[name]) for name in objectives)]
    if "loss" in objectives:
        cells.append(f"{round(perplexity(evaluation.objectives['loss']), 2):,.6g}")
    cells += certainty
    if "parameters" not in objectives:
        cells.append(_value("parameters", architecture.parameters))
    return [*cells, str(architecture.hidden_size), safe(architecture.notation)]


def _value(name: str, value: float) -> str:
    if name == "parameters":
        return f"{value / 1e6:,.2f}M"
    return f"{value / 1024:,.0f}" if name == "state_bytes" else f"{value:.4f}"


def print_trial(candidate: Candidate) -> None:
    """One trial, a line a fact."""
    data = trial_json(candidate)
    evaluation = candidate.evaluation
    facts = {name: data[name] for name in ("number", "outcome", "id", "notation", "hidden_size", "parameters")}
    facts |= data["objectives"] | {"lineage": data["lineage"], "duplicate of": data["duplicate_of"]}
    facts |= {"attempts": data["attempts"], "genome": data["genome"]}
    if evaluation is not None:
        curve = ", ".join(f"{loss:.4f} at {tokens:,}" for tokens, loss in evaluation.curve)
        seconds = ", ".join(f"{name} {value:.2f}" for name, value in evaluation.seconds.items())
        paths = ", ".join(f"{name} {value}" for name, value in evaluation.paths.items())
        rungs = ", ".join(f"{rung.objectives['loss']:.4f} at {rung.tokens:,}" for rung in evaluation.rungs)
        facts |= {"curve": curve, "rungs": rungs, "seconds": seconds, "paths": paths, "device": evaluation.device}
        facts |= {"seed": evaluation.seed, "bits per byte": evaluation.metrics.get("bits_per_byte")}
    console = stdout()
    for name, value in facts.items():
        if value not in (None, "", {}):
            parts = value.items() if isinstance(value, dict) else ()
            text = ", ".join(f"{k} {v}" for k, v in parts if v not in (None, [])) or str(value)
            console.print(f"[bold]{name.replace('_', ' '):<14}[/] {safe(text)}", soft_wrap=True)
    for line in evaluation.error.splitlines() if evaluation else []:
        color = "red" if evaluation and evaluation.outcome.is_failure else "yellow"
        console.print(f"[{color}]{safe(line)}[/]", soft_wrap=True)
