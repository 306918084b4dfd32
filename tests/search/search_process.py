"""A search in a process of its own, for tests that kill it."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from archsearch.errors import ArchsearchError
from archsearch.search.folder import RunFolder
from archsearch.search.ledger import Ledger
from archsearch.search.loop import run_search
from tests.search.fakes import FakeEvaluator, append_line

# A server that has imported everything forks the processes: each starts within milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.search.search_process"])


def start(folder: Path, side: Path, seconds: float) -> BaseProcess:
    """Start a process that resumes the run in ``folder`` and keeps its logs in ``side``."""
    process = CONTEXT.Process(target=search, args=(str(folder), str(side), seconds))
    process.start()
    return process


def search(folder: str, side: str, seconds: float) -> None:
    """Note each call of the evaluator in ``log`` and each committed result in ``acknowledged``; exit with the code."""
    finish = Ledger.finish

    def finish_and_note(self: Ledger, number: int, *arguments: object) -> None:
        finish(self, number, *arguments)  # type: ignore[arg-type]
        append_line(f"{side}/acknowledged", f"{number} {self.trial(number).user_attrs['architecture']}")

    Ledger.finish = finish_and_note  # type: ignore[method-assign]
    try:
        sys.exit(run_search(RunFolder.open(folder), FakeEvaluator(seconds, f"{side}/log")).exit_code)
    except ArchsearchError as error:
        sys.exit(error.exit_code)
