"""Why a search works, and when to stop it: hypervolume over time, what each kind of proposal earned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archsearch.search import pareto
from archsearch.search.study import Candidate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Moment:
    """One evaluated architecture in the order of completion, and what it changed.

    Attributes:
        number: of its trial.
        evaluations: how many are evaluated by now, this one included; failures count.
        hours: wall-clock time since the first proposal, pauses between sessions included.
        hypervolume: dominated by everything until now.
        gain: by how much this one raised it.
        entered: whether it was on the front when it came.
    """

    number: int
    evaluations: int
    hours: float
    hypervolume: float
    gain: float
    entered: bool


@dataclass(frozen=True, slots=True)
class Earning:
    """What a kind of proposal, or a mutated gene, has earned.

    Attributes:
        name: the kind or gene.
        proposals: architectures evaluated.
        entered: share of them that were on the front when they came.
        mean_gain: hypervolume that one of them added, on average.
        gain_share: all that they added, as a share of all that was added.
    """

    name: str
    proposals: int
    entered: float
    mean_gain: float
    gain_share: float


def history(candidates: Sequence[Candidate], objectives: Sequence[str], reference: Sequence[float]) -> list[Moment]:
    """The course of a search.

    Args:
        candidates: of the study, in any order; duplicates and running ones are left out.
        objectives: minimised.
        reference: up to which volume counts, one number an objective.
    """
    ended = sorted((c for c in candidates if c.is_distinct and c.finished), key=lambda c: (_ended(c), c.number))
    start = min((c.proposed for c in ended if c.proposed), default=datetime.min)
    members, volume, moments = np.empty((0, len(objectives))), 0.0, []
    for count, candidate in enumerate(ended, start=1):
        before, entered = volume, False
        if candidate.evaluation is not None and candidate.evaluation.ok:
            point = [candidate.evaluation.objectives[name] for name in objectives]
            joined = np.vstack([members, point])
            kept = pareto.front(joined)
            entered = len(members) in kept
            members = joined[kept]
            volume = pareto.hypervolume(members, reference) if entered else volume
        hours = (_ended(candidate) - start).total_seconds() / 3600
        moments.append(Moment(candidate.number, count, hours, volume, volume - before, entered))
    return moments


def _ended(candidate: Candidate) -> datetime:
    return candidate.finished or datetime.max


def stalled(hypervolumes: Sequence[float], epsilon: float, k: int) -> bool:
    """Whether the last ``k`` evaluations brought no gain above ``epsilon``.

    Args:
        hypervolumes: after each evaluation.
        epsilon: relative gain over the last time that one counted; small gains add up until they do.
        k: evaluations without one.
    """
    base, without = 0.0, 0
    for volume in hypervolumes:
        gained = volume > base * (1 + epsilon)
        base, without = (volume, 0) if gained else (base, without + 1)
    return without >= k


def earnings_by_kind(candidates: Sequence[Candidate], moments: Sequence[Moment]) -> list[Earning]:
    """What each kind of proposal (seed, random, mutation, ...) earned, the largest share first."""
    return _earnings(candidates, moments, lambda lineage: [str(lineage.get("kind", "unknown"))])


def earnings_by_gene(candidates: Sequence[Candidate], moments: Sequence[Moment]) -> list[Earning]:
    """What mutations of each gene earned; where one changed several genes, each of them gets all the credit."""
    return _earnings(candidates, moments, lambda lineage: list(lineage.get("genes") or []))


def _earnings(
    candidates: Sequence[Candidate], moments: Sequence[Moment], names_of: Callable[[dict[str, Any]], list[str]]
) -> list[Earning]:
    lineages = {candidate.number: candidate.lineage for candidate in candidates}
    groups: dict[str, list[Moment]] = defaultdict(list)
    for moment in moments:
        for name in names_of(lineages[moment.number]):
            groups[name].append(moment)
    total = sum(moment.gain for moment in moments)
    rows = [_earning(name, group, total) for name, group in groups.items()]
    return sorted(rows, key=lambda row: (-row.gain_share, -row.entered, row.name))


def _earning(name: str, group: Sequence[Moment], total: float) -> Earning:
    gain = sum(moment.gain for moment in group)
    return Earning(
        name=name,
        proposals=len(group),
        entered=sum(moment.entered for moment in group) / len(group),
        mean_gain=gain / len(group),
        gain_share=gain / total if total > 0 else 0.0,
    )


def frame(rows: Sequence[Moment] | Sequence[Earning]) -> pd.DataFrame:
    """Moments or earnings as a table, a column a field."""
    import pandas as pd

    names = list(type(rows[0]).__dataclass_fields__) if rows else []
    return pd.DataFrame([{name: getattr(row, name) for name in names} for row in rows], columns=names)


def draw_history(moments: Sequence[Moment], path: Path, title: str) -> None:
    """Write a PNG: hypervolume against evaluations, with the hours on an axis of their own at the top."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from archsearch.report.picture import FRONT, GRID, MUTED, STYLE

    style: Any = STYLE
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 5.0), dpi=160, facecolor="white")
        axes = figure.add_axes((0.1, 0.13, 0.86, 0.68))
        counts = [moment.evaluations for moment in moments]
        axes.step(counts, [moment.hypervolume for moment in moments], where="post", color=FRONT, lw=1.8)
        found = [moment for moment in moments if moment.gain > 0]
        axes.scatter([m.evaluations for m in found], [m.hypervolume for m in found], s=18, color=FRONT, zorder=3)
        axes.set_xlabel("architectures evaluated")
        axes.set_ylabel("hypervolume")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=GRID, lw=0.8)
        if len(moments) > 1:
            _hours_axis(axes, moments, MUTED)
        figure.text(0.1, 0.95, title, fontsize=14, fontweight="bold", va="center")
        figure.savefig(path, format="png", metadata={"Software": "archsearch"})


def _hours_axis(axes: Any, moments: Sequence[Moment], color: str) -> None:
    """Hours above the evaluations at which they had passed; uneven where evaluations took unequal time."""
    places = np.linspace(0, len(moments) - 1, min(6, len(moments))).round().astype(int)
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.set_xticks([moments[i].evaluations for i in places], [f"{moments[i].hours:.3g}" for i in places])
    top.set_xlabel("hours", color=color)
    top.spines[:].set_visible(False)
    top.tick_params(length=0)
