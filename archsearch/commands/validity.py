"""The command that asks how far the proxy's ranking can be trusted."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from rich.table import Table

from archsearch.commands.console import print_json, safe, say, stdout
from archsearch.commands.progress import SearchProgress
from archsearch.config import RunConfig
from archsearch.environment import capture_environment
from archsearch.errors import UsageError
from archsearch.evaluation import Evaluator
from archsearch.latency.profile_check import prepare_profile
from archsearch.model.requirements import prepare_kernels
from archsearch.schema import parse_quantity
from archsearch.validity.agreement import Estimate
from archsearch.validity.analysis import LONG, Analysis
from archsearch.validity.plan import make_plan
from archsearch.validity.study import run_validity
from archsearch.worker import ProxyEvaluator, prepare_data


def start(
    config: RunConfig,
    out: Path | None,
    *,
    architectures: int,
    long: str,
    short: str | None = None,
    seeds: int = 2,
    correlation: float = 0.8,
    json: bool = False,
) -> int:
    """Run or resume a study and print what it found; gives the exit code.

    Args:
        config: space, proxy, latency and execution settings.
        out: folder of the study; ``experiments/NAME-validity-TIME`` if absent.
        architectures: how many to sample.
        long: tokens of the long training, with a unit.
        short: likewise of the proxy; ``proxy.tokens`` if absent.
        seeds: short trainings an architecture.
        correlation: that the shortest budget must keep.
        json: print one JSON object.
    """
    if not 0 < correlation < 1:
        raise UsageError(f"--correlation {correlation:g}", "give a number between 0 and 1")
    plan = make_plan(
        config,
        architectures,
        long=_tokens("--long", long),
        short=None if short is None else _tokens("--short", short),
        seeds=seeds,
    )
    prepare_profile(config)
    prepare_kernels(config)
    prepare_data(config)
    path = out or Path("experiments") / f"{config.space.name}-validity-{datetime.now():%Y%m%d-%H%M%S}"
    say(
        f"study folder: {path}; {architectures} architectures, {plan.short:,} tokens with {seeds} seeds, "
        f"then {plan.long:,} tokens"
    )
    with SearchProgress("loss") as progress:
        summary, analysis = run_validity(
            plan,
            path,
            _evaluator,
            wanted=correlation,
            environment=capture_environment().model_dump(mode="json"),
            on_progress=progress.update,
        )
    say(f"{summary.reason}: {summary.message}")
    if json:
        print_json("validate-proxy", {"study": str(path), "reason": summary.reason, **analysis.summary()})
    else:
        print_analysis(analysis)
    if summary.reason == "interrupted":
        say(f"go on with the same command and --out {path}")
    return summary.exit_code


def _evaluator(config: RunConfig, checkpoints: Path | None) -> Evaluator:
    return ProxyEvaluator(config, None, str(checkpoints.resolve()) if checkpoints else None)


def _tokens(flag: str, text: str) -> int:
    try:
        found = parse_quantity(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}", "write for example 20M") from None
    if not isinstance(found, int) or found < 1:
        raise UsageError(f"{flag} {text}", "give a positive number of tokens")
    return found


def print_analysis(analysis: Analysis) -> None:
    """The architectures by their long loss, then what the rankings are worth."""
    console = stdout()
    console.print(_architectures(analysis))
    console.print()
    console.print(_agreement(analysis))
    for line in lines(analysis):
        console.print(line, soft_wrap=True)


def lines(analysis: Analysis) -> list[str]:
    """Regret, noise and budgets in sentences."""
    found = []
    if (regret := analysis.regret) is not None:
        kept = "" if regret.front is None else f"; its front keeps {regret.front:.1%} of the dominated volume"
        found.append(
            f"choosing by the proxy loses {regret.nats:.4f} nats (place {regret.place}), "
            f"at random {regret.chance:.4f}{kept}"
        )
    if (noise := analysis.noise) is not None:
        text = f"seed noise of the proxy loss {noise.std:.4f} nats, 95 % from {noise.low:.4f} to {noise.high:.4f}"
        if analysis.spread:
            text += f"; architectures differ by {analysis.spread:.4f}, {analysis.spread / noise.std:.1f} times as much"
        found.append(text)
    else:
        found.append("seed noise unknown: give --seeds 2 or more")
    if analysis.shortest is not None:
        found.append(
            f"shortest budget with a correlation of {analysis.wanted:g}: {analysis.shortest:,} tokens "
            f"of the {analysis.plan.long:,}"
        )
    elif any(point.of == LONG for point in analysis.budgets):
        found.append(f"no budget on the curve keeps a correlation of {analysis.wanted:g}")
    return found


def _table(columns: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(safe(name), justify="right")
    return table


def _architectures(analysis: Analysis) -> Table:
    plan = analysis.plan
    table = _table(["place", "by proxy", f"loss {plan.long:,}", f"loss {plan.short:,}", "decode [s]", "parameters"])
    table.add_column("operators", overflow="fold")
    done = [row for row in analysis.rows if row.long is not None and row.short]
    by_proxy = sorted(range(len(done)), key=lambda i: done[i].short[0])
    for place, index in enumerate(sorted(range(len(done)), key=lambda i: done[i].long or 0.0), start=1):
        row = done[index]
        table.add_row(
            str(place),
            str(by_proxy.index(index) + 1),
            f"{row.long:.4f}",
            f"{row.short[0]:.4f}",
            "" if row.latency is None else f"{row.latency:.4g}",
            f"{row.architecture.parameters / 1e6:,.2f}M",
            safe(row.architecture.notation),
        )
    left = len(analysis.rows) - len(done)
    if left:
        table.caption = f"{left} of {len(analysis.rows)} architectures lack a loss"
    return table


def _agreement(analysis: Analysis) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("agreement of short and long")
    for name in ("value", "95 % from", "to", "of"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, Estimate | None, str]] = [
        ("Spearman", analysis.spearman, "architectures"),
        ("Kendall", analysis.kendall, "architectures"),
        ("Spearman, best third", analysis.top_third, "architectures"),
        ("Kendall, matched latency", analysis.matched, "pairs"),
        ("Spearman, seed against seed", analysis.retest, "architectures"),
    ]
    rows += [
        (f"Spearman, {point.tokens:,} tokens of the {point.of} training", point.spearman, "architectures")
        for point in analysis.budgets
    ]
    for name, found, unit in rows:
        if found is None:
            table.add_row(name, "unknown", "", "", "")
        else:
            table.add_row(name, f"{found.value:.3f}", f"{found.low:.3f}", f"{found.high:.3f}", f"{found.count} {unit}")
    return table
