"""What a validity study says: the losses of its trainings, compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsearch.architecture import Architecture
from archsearch.evaluation import Evaluation
from archsearch.schema import Frozen
from archsearch.search.batch import Task, read_result
from archsearch.search.noise import SeedNoise, pooled_noise
from archsearch.validity.agreement import (
    FEWEST,
    Estimate,
    Regret,
    best_third,
    estimate,
    kendall,
    matched_kendall,
    matched_ratio,
    regret,
    spearman,
)
from archsearch.validity.plan import Plan

SHORT, SEEDS, LONG = "short", "seeds", "long"
"""Kinds of trainings, and the folders of their results."""


class Row(Frozen):
    """One architecture: its losses in nats a token, its decode latency in seconds, None where there is none."""

    architecture: Architecture
    short: tuple[float, ...]
    long: float | None
    latency: float | None
    outcomes: tuple[str, ...]


class BudgetPoint(Frozen):
    """How the loss after ``tokens`` of a training ranks, against the end of the long one."""

    tokens: int
    of: str
    spearman: Estimate


@dataclass(frozen=True, slots=True)
class Analysis:
    """What a study says. A correlation is None where too few architectures were trained both ways.

    Attributes:
        plan: what was asked for.
        wanted: correlation that the shortest budget must keep.
        rows: every architecture.
        spearman, kendall: of short against long losses.
        top_third: Spearman among the best third by the long loss.
        matched: Kendall's tau over the pairs of nearly equal latency.
        retest: Spearman between two seeds of the short training: what a perfect proxy of this noise could reach.
        regret: of choosing by the proxy.
        noise: of the short loss between seeds.
        spread: deviation of the short loss between architectures.
        budgets: the curves' correlations, by tokens.
        shortest: least budget of the long curve from which on all keep ``wanted``; None where not even half does.
    """

    plan: Plan
    wanted: float
    rows: tuple[Row, ...]
    spearman: Estimate | None
    kendall: Estimate | None
    top_third: Estimate | None
    matched: Estimate | None
    retest: Estimate | None
    regret: Regret | None
    noise: SeedNoise | None
    spread: float | None
    budgets: tuple[BudgetPoint, ...]
    shortest: int | None

    def summary(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plan = self.plan
        dumped = {
            name: found.model_dump(mode="json") if (found := getattr(self, name)) is not None else None
            for name in ("spearman", "kendall", "top_third", "matched", "retest", "regret", "noise")
        }
        return {
            "space": plan.config.space.name,
            "short": plan.short,
            "long": plan.long,
            "seeds": plan.seeds,
            "proxy": plan.seed_config.proxy.model_dump(mode="json"),
            **dumped,
            "spread": self.spread,
            "wanted": self.wanted,
            "shortest": self.shortest,
            "budgets": [point.model_dump(mode="json") for point in self.budgets],
            "architectures": [row.model_dump(mode="json") | {"id": row.architecture.id} for row in self.rows],
        }


def analyse(plan: Plan, out: Path, wanted: float) -> Analysis:
    """Compare the results that there are."""
    seed = plan.config.search.seed
    shorts, longs = _read(out / SHORT, plan.tasks), _read(out / LONG, plan.tasks)
    others = _read(out / SEEDS, plan.seed_tasks)
    rows = []
    for index, architecture in enumerate(plan.architectures):
        tasks = [shorts.get(f"{index:03d}-{seed}")]
        tasks += [others.get(f"{index:03d}-{seed + step}") for step in range(1, plan.seeds)]
        long = longs.get(f"{index:03d}-{seed}")
        first = tasks[0]
        rows.append(
            Row(
                architecture=architecture,
                short=tuple(e.objectives["loss"] for e in tasks if e is not None and e.ok),
                long=long.objectives["loss"] if long is not None and long.ok else None,
                latency=first.objectives.get("decode_latency") if first is not None and first.ok else None,
                outcomes=tuple(str(e.outcome) for e in [*tasks, long] if e is not None),
            )
        )
    both = [(shorts[t.name], longs[t.name]) for t in plan.tasks if _ok(shorts, t.name) and _ok(longs, t.name)]
    return _compare(plan, wanted, tuple(rows), both)


def _read(folder: Path, tasks: Sequence[Task]) -> dict[str, Evaluation]:
    return {task.name: found for task in tasks if (found := read_result(folder, task.name)) is not None}


def _ok(results: Mapping[str, Evaluation], name: str) -> bool:
    return name in results and results[name].ok


def _compare(
    plan: Plan, wanted: float, rows: tuple[Row, ...], both: Sequence[tuple[Evaluation, Evaluation]]
) -> Analysis:
    short = [a.objectives["loss"] for a, _ in both]
    long = [b.objectives["loss"] for _, b in both]
    latencies = [a.objectives["decode_latency"] for a, _ in both]
    top = best_third(long)
    pairs = [row.short[:2] for row in rows if len(row.short) > 1]
    budgets = _budgets(plan, both)
    return Analysis(
        plan=plan,
        wanted=wanted,
        rows=rows,
        spearman=estimate(spearman, short, long),
        kendall=estimate(kendall, short, long),
        top_third=estimate(spearman, [short[i] for i in top], [long[i] for i in top]),
        matched=_matched(short, long, latencies),
        retest=estimate(spearman, *map(list, zip(*pairs, strict=True))) if pairs else None,
        regret=regret(short, long, latencies) if both else None,
        noise=pooled_noise([row.short for row in rows], f"{plan.seeds} seeds of {len(rows)} architectures"),
        spread=statistics.stdev(short) if len(short) > 1 else None,
        budgets=budgets,
        shortest=_shortest(budgets, wanted),
    )


def _matched(short: Sequence[float], long: Sequence[float], latencies: Sequence[float]) -> Estimate | None:
    if len(latencies) < FEWEST:
        return None
    within, pairs = matched_ratio(latencies)
    return estimate(matched_kendall(within), short, long, latencies, count=pairs)


def _budgets(plan: Plan, both: Sequence[tuple[Evaluation, Evaluation]]) -> tuple[BudgetPoint, ...]:
    """Spearman of every budget on both curves with the last loss of the long one."""
    last = [b.objectives["loss"] for _, b in both]
    points = []
    for name, whole, evaluations in (
        (SHORT, plan.short, [a for a, _ in both]),
        (LONG, plan.long, [b for _, b in both]),
    ):
        reached = [{rung.tokens: rung.objectives["loss"] for rung in e.rungs} for e in evaluations]
        ends = [{whole: e.objectives["loss"]} if name == SHORT else {} for e in evaluations]
        losses = [early | end for early, end in zip(reached, ends, strict=True)]
        for tokens in sorted({tokens for one in losses for tokens in one}):
            if not all(tokens in one for one in losses):
                continue
            found = estimate(spearman, [one[tokens] for one in losses], last)
            if found is not None:
                points.append(BudgetPoint(tokens=tokens, of=name, spearman=found))
    return tuple(points)


def _shortest(budgets: Sequence[BudgetPoint], wanted: float) -> int | None:
    shortest = None
    for point in sorted((p for p in budgets if p.of == LONG), key=lambda p: -p.tokens):
        if point.spearman.value < wanted:
            break
        shortest = point.tokens
    return shortest
