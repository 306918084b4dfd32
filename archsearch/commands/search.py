"""The commands that search: run and resume."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from archsearch.api import Run, create_run, open_run
from archsearch.commands.console import print_json, say
from archsearch.commands.inspect import front_json, print_front, report
from archsearch.commands.progress import SearchProgress
from archsearch.config import RunConfig
from archsearch.errors import EnvironmentUnfit, SearchStopped, UsageError

if TYPE_CHECKING:
    from archsearch.search.progress import Summary


def start(config: RunConfig, out: Path | None, *, replicates: int | None = None, json: bool) -> int:
    """Search into a new folder, then train the front with other seeds if asked for; gives the exit code."""
    _check(replicates, config)
    run = create_run(config, out)
    say(f"run folder: {run.path}")
    try:
        return _search(run, "run", replicates, json=json)
    except EnvironmentUnfit:
        if not any(run.folder.trials.iterdir()):
            # Nothing was evaluated, so that the same command may be typed again once the cause is gone.
            shutil.rmtree(run.path)
        raise


def go_on(path: Path, *, replicates: int | None = None, json: bool) -> int:
    """Go on with a run; gives the exit code."""
    run = open_run(path)
    _check(replicates, run.config)
    return _search(run, "resume", replicates, json=json)


def _check(replicates: int | None, config: RunConfig) -> None:
    """Refuse before the search what could not be done after it."""
    from archsearch.search.replicates import replicate_config

    if replicates is not None:
        if replicates < 1:
            raise UsageError(f"--replicates {replicates}", "give 1 or more; 2 and more tell the seed noise")
        replicate_config(config)


def _search(run: Run, command: str, replicates: int | None, *, json: bool) -> int:
    try:
        with SearchProgress(run.config.search.objectives[0]) as progress:
            summary = run.search(on_progress=progress.update)
    except SearchStopped:
        report(run.results())
        raise
    say(f"{summary.reason}: {summary.message}")
    if replicates is not None and summary.reason != "interrupted":
        found = _replicate(run, replicates)
        summary = found if found.reason == "interrupted" else summary
    results = run.results()
    report(results)
    if json:
        state = {"reason": summary.reason, "message": summary.message, "progress": asdict(summary.progress)}
        print_json(command, {**state, **front_json(results)})
    else:
        print_front(results)
    if summary.reason == "interrupted":
        again = f" --replicates {replicates}" if replicates else ""
        say(f"go on with: archsearch resume {run.path}{again}")
    return summary.exit_code


def _replicate(run: Run, count: int) -> Summary:
    say(f"training {len(run.front())} candidates of the front with {count} other seeds")
    with SearchProgress(run.config.search.objectives[0]) as progress:
        summary = run.replicate(count, on_progress=progress.update)
    say(f"replicates: {summary.message}")
    return summary
