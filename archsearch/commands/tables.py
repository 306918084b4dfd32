"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from archsearch.commands.console import safe, stdout

if TYPE_CHECKING:
    from archsearch.commands.doctor import Check

MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}


def print_checks(checks: Iterable[Check]) -> list[Check]:
    """Print each check as soon as it is done; gives them all."""
    console = stdout()
    done = []
    for check in checks:
        done.append(check)
        console.print(f"{MARKS[check.status]}  [bold]{safe(check.name):<22}[/] {safe(check.detail)}", soft_wrap=True)
        if check.remedy:
            console.print(f"      {'':<22} remedy: {safe(check.remedy)}", soft_wrap=True)
    return done
