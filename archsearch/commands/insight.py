"""``inspect --why``: what made a search work, and whether it still gains."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from archsearch.api import Results
from archsearch.commands.console import safe, stdout
from archsearch.report.insight import Earning, earnings_by_gene, earnings_by_kind, history
from archsearch.search.importance import gene_importances

SHOWN = 8


def insight_json(results: Results) -> dict[str, Any]:
    """The course of the search, what proposals and mutations earned, which genes matter; as plain data."""
    objectives = results.config.search.objectives
    moments = history(results.candidates, objectives, results.reference) if results.reference else []
    return {
        "history": [asdict(moment) for moment in moments],
        "proposals": [asdict(row) for row in earnings_by_kind(results.candidates, moments)],
        "mutations": [asdict(row) for row in earnings_by_gene(results.candidates, moments)],
        "importances": gene_importances(results.candidates, results.config.space, objectives),
    }


def print_insight(results: Results) -> None:
    """The same for people, the most telling rows first."""
    data, console = insight_json(results), stdout()
    console.print("\n[bold]what each kind of proposal earned[/]")
    console.print(_earnings([Earning(**row) for row in data["proposals"]]))
    console.print("\n[bold]what mutations of each gene earned[/]")
    console.print(_earnings([Earning(**row) for row in data["mutations"][:SHOWN]]))
    for objective, shares in data["importances"].items():
        genes = ", ".join(f"{gene} {share:.0%}" for gene, share in list(shares.items())[:SHOWN])
        console.print(f"\n[bold]genes that set the best {safe(objective)} apart[/]: {safe(genes)}", soft_wrap=True)
    gains = [moment for moment in data["history"] if moment["gain"] > 0]
    if gains:
        done = data["history"][-1]["evaluations"]
        console.print(f"\nlast gain in hypervolume: at evaluation {gains[-1]['evaluations']} of {done}")


def _earnings(rows: list[Earning]) -> Table:
    grid = Table(box=None, header_style="bold", pad_edge=False)
    grid.add_column("name")
    for name in ("proposals", "entered the front", "share of the gain"):
        grid.add_column(name, justify="right")
    for row in rows:
        grid.add_row(safe(row.name), str(row.proposals), f"{row.entered:.0%}", f"{row.gain_share:.0%}")
    return grid
