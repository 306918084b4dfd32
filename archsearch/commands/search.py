"""The commands that search: run and resume."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from archsearch.api import Run, create_run, open_run
from archsearch.commands.console import print_json, say
from archsearch.commands.inspect import front_json, print_front, report
from archsearch.commands.progress import SearchProgress
from archsearch.config import RunConfig
from archsearch.errors import EnvironmentUnfit, SearchStopped


def start(config: RunConfig, out: Path | None, *, json: bool) -> int:
    """Search into a new folder; gives the exit code."""
    run = create_run(config, out)
    say(f"run folder: {run.path}")
    try:
        return _search(run, "run", json=json)
    except EnvironmentUnfit:
        if not any(run.folder.trials.iterdir()):
            # Nothing was evaluated, so that the same command may be typed again once the cause is gone.
            shutil.rmtree(run.path)
        raise


def go_on(path: Path, *, json: bool) -> int:
    """Go on with a run; gives the exit code."""
    return _search(open_run(path), "resume", json=json)


def _search(run: Run, command: str, *, json: bool) -> int:
    try:
        with SearchProgress(run.config.search.objectives[0]) as progress:
            summary = run.search(on_progress=progress.update)
    except SearchStopped:
        report(run.results())
        raise
    results = run.results()
    report(results)
    say(f"{summary.reason}: {summary.message}")
    if json:
        state = {"reason": summary.reason, "message": summary.message, "progress": asdict(summary.progress)}
        print_json(command, {**state, **front_json(results)})
    else:
        print_front(results)
    if summary.reason == "interrupted":
        say(f"go on with: archsearch resume {run.path}")
    return summary.exit_code
