"""A search in a process of its own, for tests that kill it: ``python -m tests.search.search_process FOLDER ...``."""

from __future__ import annotations

import sys

from archsearch.search.folder import RunFolder
from archsearch.search.ledger import Ledger
from archsearch.search.loop import run_search
from tests.search.fakes import FakeEvaluator, append_line


def main(path: str, log: str, acknowledged: str, seconds: str) -> int:
    """Resume the run at ``path``; note each call of the evaluator and each committed result."""
    finish = Ledger.finish

    def finish_and_note(self: Ledger, number: int, *arguments: object) -> None:
        finish(self, number, *arguments)  # type: ignore[arg-type]
        append_line(acknowledged, f"{number} {self.trial(number).user_attrs['architecture']}")

    Ledger.finish = finish_and_note  # type: ignore[method-assign]
    return run_search(RunFolder.open(path), FakeEvaluator(float(seconds), log)).exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
