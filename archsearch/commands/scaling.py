"""The command that studies depth and width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import get_args

from rich.table import Table

from archsearch.commands.console import print_json, safe, say, stdout
from archsearch.commands.progress import SearchProgress
from archsearch.config import RunConfig
from archsearch.environment import capture_environment
from archsearch.errors import UsageError
from archsearch.latency.profile_check import prepare_profile
from archsearch.model.requirements import prepare_kernels
from archsearch.scaling.grid import make_grid
from archsearch.scaling.law import Metric
from archsearch.scaling.study import UNITS, Analysis, run_scaling
from archsearch.schema import did_you_mean, parse_quantity
from archsearch.worker import ProxyEvaluator, prepare_data


def start(
    config: RunConfig,
    out: Path | None,
    *,
    depths: str,
    widths: str,
    budgets: str | None = None,
    block: str | None = None,
    metric: str = "perplexity",
    latencies: str | None = None,
    json: bool = False,
) -> int:
    """Run or resume a study and print what it found; gives the exit code.

    Args:
        config: space, proxy, latency and execution settings.
        out: folder of the study; ``experiments/NAME-scaling-TIME`` if absent.
        depths: numbers of blocks, with commas between them.
        widths: hidden sizes, likewise.
        budgets: training tokens, likewise, with units.
        block: operators of a block.
        metric: perplexity or nats.
        latencies: budgets in seconds, likewise.
        json: print one JSON object.
    """
    if metric not in get_args(Metric):
        raise UsageError(f"--metric {metric!r}; {did_you_mean(metric, get_args(Metric))}", "choose one of them")
    seconds = _seconds(latencies)
    grid = make_grid(
        config,
        _numbers("--depths", depths, int),
        _numbers("--widths", widths, int),
        budgets=_numbers("--budgets", budgets, parse_quantity) if budgets else (),
        block=block,
    )
    prepare_profile(grid.run_config(grid.budgets[-1]))
    prepare_kernels(config)
    prepare_data(config)
    path = out or Path("experiments") / f"{config.space.name}-scaling-{datetime.now():%Y%m%d-%H%M%S}"
    models = len(grid.depths) * len(grid.widths)
    say(f"study folder: {path}; {len(grid.budgets)} budget(s) of {models} models of {grid.block!r}")
    with SearchProgress("loss") as progress:
        summary, analysis = run_scaling(
            grid,
            path,
            ProxyEvaluator,
            metric="nats" if metric == "nats" else "perplexity",
            latencies=seconds,
            environment=capture_environment().model_dump(mode="json"),
            on_progress=progress.update,
        )
    say(f"{summary.reason}: {summary.message}")
    if summary.reason == "interrupted":
        say(f"go on with the same command and --out {path}")
    if json:
        print_json("scaling", {"reason": summary.reason, "out": str(path), **analysis.summary()})
    else:
        print_analysis(analysis)
    return summary.exit_code


def _numbers(option: str, text: str, parse: Callable[[str], int]) -> list[int]:
    """``"128,192"`` as numbers."""
    try:
        return [parse(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers", "write for example 2,4,8 or 200K,1M") from None


def _seconds(text: str | None) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [-1.0]
    if not all(0 < value < float("inf") for value in values):
        raise UsageError(f"--latencies {text!r} is not a list of seconds", "write for example 0.5,1,2")
    return values


def print_analysis(analysis: Analysis) -> None:
    """The law, its test on larger models, and the best size for each latency."""
    console = stdout()
    if analysis.law is not None:
        console.print(_law_table(analysis))
    if analysis.held_out is not None:
        found = analysis.held_out
        console.print(
            f"\nheld out ({found.scheme}): {len(found.predictions)} models predicted from {found.fitted}, "
            f"error {found.mean_error:.2%}, worst {found.worst_error:.2%} of {analysis.metric}"
        )
    if analysis.choices:
        console.print()
        console.print(_choice_table(analysis))
    for note in analysis.notes:
        console.print(f"note: {safe(note)}", soft_wrap=True)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(safe(name), justify="right")
    return table


def _law_table(analysis: Analysis) -> Table:
    table = _table(["L(D, W, N)", "value", "95 % from", "to"])
    assert analysis.law is not None
    for name in analysis.law.parameters:
        estimate = analysis.law.interval(name)
        table.add_row(name, *(f"{value:.4g}" for value in (estimate.value, estimate.low, estimate.high)))
    return table


def _choice_table(analysis: Analysis) -> Table:
    source = "predicted" if analysis.law else "measured"
    interval_names = ["95 % from", "to"] if analysis.law else []
    table = _table(["within [s]", "depth", "width", "decode [s]", f"{source} {analysis.metric}", *interval_names])
    for choice in analysis.choices:
        interval = (choice.loss.low, choice.loss.high) if analysis.law else ()
        latency = f"{choice.size.latency:.4g}" + ("" if choice.measured else " *")
        numbers = [f"{value:.4g}" for value in (choice.loss.value, *interval)]
        table.add_row(f"{choice.budget:g}", str(choice.size.depth), str(choice.size.width), latency, *numbers)
    if any(not choice.measured for choice in analysis.choices):
        table.caption = f"{UNITS[analysis.metric]} after {analysis.grid.budgets[-1]:,} tokens; * interpolated"
    return table
