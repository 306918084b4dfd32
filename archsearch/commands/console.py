"""Where output goes: data to stdout, everything else to stderr, nothing that a name could turn into control codes."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import traceback
from typing import Any

from rich.console import Console
from rich.markup import escape

from archsearch.errors import ArchsearchError

SCHEMA_VERSION = 1


def stdout() -> Console:
    """A console on stdout; wide when it is no terminal, so that tables in files keep their columns."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def stderr() -> Console:
    """A console on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the person who waits, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def show_log() -> None:
    """Let what the library reports reach the person who waits."""
    log = logging.getLogger("archsearch")
    if not any(isinstance(handler, _Log) for handler in log.handlers):
        log.addHandler(_Log())
        log.setLevel(logging.INFO)


def printable(text: str) -> str:
    """``text`` on one line, with control and direction characters shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def safe(text: str) -> str:
    """``text`` for rich: printable, and never read as markup."""
    return escape(printable(text))


def print_json(command: str, data: dict[str, Any]) -> None:
    """One JSON object on stdout: the schema's version, the command, and its data."""
    document = {"schema_version": SCHEMA_VERSION, "command": command, **data}
    json.dump(document, sys.stdout, allow_nan=False, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def report_error(error: ArchsearchError) -> int:
    """Print cause and remedy; return the exit code."""
    say(f"error: {error.cause}")
    say(f"remedy: {error.remedy}")
    return error.exit_code


def report_bug(error: BaseException) -> int:
    """Write the traceback to a file and print its path; return the exit code of a bug."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="archsearch-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.writelines(traceback.format_exception(error))
    say(f"error: a bug in archsearch: {type(error).__name__}: {error}")
    say(f"remedy: report it with the traceback in {file.name}")
    return 1
