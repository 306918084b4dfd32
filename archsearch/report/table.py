"""The candidates of a run as a table, and as CSV that no spreadsheet mistakes for formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from archsearch.config import RunConfig
from archsearch.search.study import Candidate, dataframe, front

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def seed_ids(config: RunConfig) -> set[str]:
    """Ids of the architectures that the space names as seeds."""
    return {config.space.build(genome).id for genome in config.space.seed_genomes}


def table(config: RunConfig, candidates: Sequence[Candidate]) -> pd.DataFrame:
    """``dataframe`` with the columns ``on_front`` and ``seed``, and of errors the last line only."""
    frame = dataframe(candidates)
    if frame.empty:
        return frame.assign(on_front=[], seed=[])
    frame = frame.astype({"parent": "Int64", "duplicate_of": "Int64"})
    chosen = {candidate.number for candidate in front(candidates, config.search.objectives)}
    seeds = seed_ids(config)
    frame.insert(1, "on_front", [candidate.number in chosen for candidate in candidates])
    frame.insert(2, "seed", [bool(c.architecture and c.architecture.id in seeds) for c in candidates])
    frame["error"] = [(text.strip().splitlines() or [""])[-1] for text in frame["error"]]
    return frame


def csv_text(frame: pd.DataFrame) -> str:
    """CSV; text that a spreadsheet would run as a formula gets a quote in front."""
    return str(frame.map(_inert).to_csv(index=False, lineterminator="\n"))


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
