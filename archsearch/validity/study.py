"""The validity study: train the plan, compare the rankings, say what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from archsearch.architecture import Architecture
from archsearch.config import ProxyConfig, RunConfig
from archsearch.errors import ConfigError, StorageError, UsageError
from archsearch.evaluation import Evaluation, Evaluator
from archsearch.files import to_json, write_atomic
from archsearch.report.validity_picture import ValidityPicture, draw_validity
from archsearch.schema import Frozen
from archsearch.search.batch import Task, read_result, run_batch
from archsearch.search.executors import make_executor
from archsearch.search.filesystem import refuse_network
from archsearch.search.folder import RunFolder
from archsearch.search.noise import SeedNoise, pooled_noise
from archsearch.search.progress import Progress, Summary
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
from archsearch.validity.plan import Plan, read_plan

RECORD = "validity.json"
SHORT, SEEDS, LONG = "short", "seeds", "long"
UNRELATED = ("rungs", "recall", "validations", "validation_tokens")
"""Settings of a proxy that leave the seed noise of its loss as it is."""
EvaluatorFor = Callable[[RunConfig, Path | None], Evaluator]
"""Makes the evaluator of a config; the path is a folder for checkpoints."""


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


def run_validity(
    plan: Plan,
    out: Path,
    evaluator_for: EvaluatorFor,
    *,
    wanted: float = 0.8,
    environment: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Summary, Analysis]:
    """Train the plan, or what is left of it, and analyse what there is.

    Writes ``validity.json`` and ``validity.png`` beside the results, after an interruption too.

    Args:
        plan: from ``make_plan``.
        out: folder of the study; an earlier one of the same plan is gone on with.
        evaluator_for: makes the evaluators.
        wanted: Spearman that the shortest budget must keep.
        environment: plain data for ``environment.json``.
        on_progress: called after every result; counts within one kind of training.

    Raises:
        UsageError: ``out`` holds something else, or a study of another plan.
        ArchsearchError: as ``run_batch`` does.
    """
    _prepare(plan, out, environment)
    with RunFolder(out).lock():
        summary = _train(plan, out, evaluator_for, on_progress)
        analysis = analyse(plan, out, wanted)
        write_atomic(out / RECORD, to_json(analysis.summary()))
        draw_validity(make_picture(analysis), out / "validity.png")
    return summary, analysis


def _prepare(plan: Plan, out: Path, environment: Mapping[str, Any] | None) -> None:
    refuse_network(out)
    found = read_plan(out)
    if found is None:
        if out.exists() and (not out.is_dir() or any(path.name != "run.lock" for path in out.iterdir())):
            raise UsageError(f"{out} holds something else", "choose another --out")
        try:
            (out / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot create {out}: {error.strerror}", "choose another --out") from error
        write_atomic(out / "environment.json", to_json(dict(environment or {})))
        # Last, because its presence makes the folder a study.
        write_atomic(out / "plan.json", to_json(plan.model_dump(mode="json")))
    elif _identity(found) != _identity(plan):
        raise UsageError(f"{out} is a study of another plan or with other settings", "choose another --out")


def _identity(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(mode="json", exclude={"config": {"execution"}})


def _train(
    plan: Plan, out: Path, evaluator_for: EvaluatorFor, on_progress: Callable[[Progress], None] | None
) -> Summary:
    phases: list[tuple[str, RunConfig, list[Task], Path | None]] = [
        (SHORT, plan.short_config, plan.tasks, None),
        (SEEDS, plan.seed_config, plan.seed_tasks, None),
        (LONG, plan.long_config, plan.tasks, out / "checkpoints"),
    ]
    total = sum(len(tasks) for _, _, tasks, _ in phases)
    for name, config, tasks, checkpoints in phases:
        start = partial(make_executor, config, evaluator_for(config, checkpoints))
        summary = run_batch(config, tasks, out / name, start, on_progress=on_progress)
        if summary.reason == "interrupted":
            return summary
    for path in (out / "checkpoints").glob("*"):
        path.unlink()
    return Summary("finished", f"{total} trainings done", 0, summary.progress)


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
        spread=float(_std(short)) if len(short) > 1 else None,
        budgets=budgets,
        shortest=_shortest(budgets, wanted),
    )


def _matched(short: Sequence[float], long: Sequence[float], latencies: Sequence[float]) -> Estimate | None:
    if len(latencies) < FEWEST:
        return None
    within, pairs = matched_ratio(latencies)
    return estimate(matched_kendall(within), short, long, latencies, count=pairs)


def _std(values: Sequence[float]) -> float:
    import statistics

    return statistics.stdev(values)


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


def make_picture(analysis: Analysis) -> ValidityPicture:
    """Long against short losses, and the correlation that each budget keeps."""
    rows = [row for row in analysis.rows if row.short and row.long is not None and row.latency is not None]
    plan, found = analysis.plan, analysis.spearman
    name = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})" if found else "not known"
    return ValidityPicture(
        title=f"{plan.config.space.name}: does the proxy rank?",
        subtitle=f"{len(rows)} architectures, {plan.short:,} against {plan.long:,} tokens; Spearman {name}",
        short=[row.short[0] for row in rows],
        long=[row.long for row in rows if row.long is not None],
        latency=[row.latency for row in rows if row.latency is not None],
        noise=analysis.noise.std if analysis.noise else None,
        budgets=[(p.of, p.tokens, p.spearman.value, p.spearman.low, p.spearman.high) for p in analysis.budgets],
        wanted=analysis.wanted,
        short_tokens=plan.short,
        long_tokens=plan.long,
    )


def read_noise(folder: Path, proxy: ProxyConfig) -> SeedNoise:
    """The seed noise that a study measured, for a search with this proxy.

    Raises:
        UsageError: no study there, or one with a single seed.
        ConfigError: its proxy is another, so that its noise says nothing.
        StorageError: the record is damaged.
    """
    import json

    path = folder / RECORD
    if not path.is_file():
        raise UsageError(f"{folder} holds no {RECORD}", "give the folder of an `archsearch validate-proxy` study")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        there = {key: value for key, value in record["proxy"].items() if key not in UNRELATED}
        noise = None if record["noise"] is None else SeedNoise.model_validate(record["noise"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"cannot read {path}: {error}", "repeat `archsearch validate-proxy`") from error
    here = {key: value for key, value in proxy.model_dump(mode="json").items() if key not in UNRELATED}
    if different := sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key)):
        key = different[0]
        cause = f"{folder} was trained with proxy.{key} {there.get(key)}, this run with {here.get(key)}"
        raise ConfigError(cause, "validate the proxy that the run uses")
    if noise is None:
        raise UsageError(f"{folder} has one seed an architecture and no noise", "repeat it with --seeds 2")
    return noise.model_copy(update={"source": f"{folder.name}: {noise.source}"})
