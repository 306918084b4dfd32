"""The scaling study: train the grid, fit the law, test it on larger models, choose sizes for latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from archsearch.config import RunConfig
from archsearch.evaluation import Evaluator
from archsearch.files import to_json, write_atomic
from archsearch.report.scaling_picture import Line, ScalingPicture, draw_scaling
from archsearch.scaling.choice import Choice, Size, best_by_law, best_measured, latency_budgets
from archsearch.scaling.grid import Grid, Trained, collect, train_grid
from archsearch.scaling.held_out import HeldOut, held_out
from archsearch.scaling.law import LEVELS, Law, LawNotIdentified, Metric, Point, as_metric, fit_law
from archsearch.search.progress import Summary
from archsearch.search.reporter import OnProgress

T = TypeVar("T")
UNITS = {"perplexity": "validation perplexity", "nats": "validation loss [nats a token]"}


@dataclass(frozen=True, slots=True)
class Analysis:
    """What a trained grid says.

    Attributes:
        grid: what was asked for.
        metric: of the law and the choices.
        trained: every model that was begun.
        law: None where the models cannot carry one; ``notes`` then say why.
        held_out: None where nothing could be held out; ``notes`` then say why.
        choices: the best size for each latency budget.
        notes: what a reader must know about the above.
    """

    grid: Grid
    metric: Metric
    trained: tuple[Trained, ...]
    law: Law | None
    held_out: HeldOut | None
    choices: tuple[Choice, ...]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> list[Size]:
        """The sizes that were timed, with their loss after the largest budget."""
        return _sizes(self.grid, self.trained)

    def summary(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "space": self.grid.config.space.name,
            "block": self.grid.block,
            "metric": self.metric,
            "depths": list(self.grid.depths),
            "widths": list(self.grid.widths),
            "budgets": list(self.grid.budgets),
            "latency": self.grid.config.latency.model_dump(mode="json"),
            "models": [asdict(model) for model in self.trained],
            "law": self.law.summary() if self.law else None,
            "held_out": self.held_out.summary() if self.held_out else None,
            "choices": [
                {
                    "latency_budget": choice.budget,
                    "depth": choice.size.depth,
                    "width": choice.size.width,
                    "latency": choice.size.latency,
                    "latency_measured": choice.measured and self.grid.config.latency.source == "measurement",
                    "loss": choice.loss.value,
                    "loss_interval": [choice.loss.low, choice.loss.high] if self.law else None,
                }
                for choice in self.choices
            ],
            "notes": list(self.notes),
        }


def run_scaling(
    grid: Grid,
    out: Path,
    evaluator_for: Callable[[RunConfig], Evaluator],
    *,
    metric: Metric = "perplexity",
    latencies: Sequence[float] = (),
    environment: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Summary, Analysis]:
    """Train the grid, or what is left of it, and analyse what there is.

    Writes ``scaling.json`` and ``scaling.png`` beside the run folders, after an interruption too.

    Args:
        grid: from ``make_grid``.
        out: folder of the study; an earlier one of the same grid is resumed.
        evaluator_for: makes the evaluator of a run.
        metric: what the law is fitted to.
        latencies: budgets in seconds; spread over what was measured if absent.
        environment: plain data for ``environment.json``.
        on_progress: as for ``run_search``.

    Raises:
        ArchsearchError: as ``train_grid`` does.
    """
    summary = train_grid(grid, out, evaluator_for, environment=environment, on_progress=on_progress)
    analysis = analyse(grid, collect(grid, out), metric=metric, latencies=latencies)
    write_atomic(out / "scaling.json", to_json(analysis.summary()))
    draw_scaling(make_picture(analysis), out / "scaling.png")
    return summary, analysis


def analyse(
    grid: Grid, trained: Sequence[Trained], *, metric: Metric = "perplexity", latencies: Sequence[float] = ()
) -> Analysis:
    """Fit, test and choose; what the models cannot tell is absent and noted."""
    points, notes = _points(grid, trained)
    if grid.config.latency.source == "profile":
        notes.append("decode latency is predicted by the latency profile, not measured")
    law = _attempt("no law", lambda: fit_law(points, metric=metric), notes)
    larger = _attempt("nothing held out", lambda: held_out(points, metric=metric), notes) if law else None
    if law and law.undetermined:
        notes.append(f"the models hardly determine {', '.join(law.undetermined)}: train longer, or over a wider range")
    sizes = _sizes(grid, trained)
    budgets = list(latencies) or (latency_budgets(sizes) if sizes else [])
    if law and sizes:
        choices = best_by_law(law, sizes, *grid.sizes_between(), tokens=grid.budgets[-1], budgets=budgets)
    else:
        choices = best_measured(sizes, metric, budgets)
    if missed := [budget for budget in budgets if budget not in {choice.budget for choice in choices}]:
        notes.append(f"no model decodes within {', '.join(f'{budget:g} s' for budget in missed)}")
    return Analysis(grid, metric, tuple(trained), law, larger, tuple(choices), tuple(notes))


def _points(grid: Grid, trained: Sequence[Trained]) -> tuple[list[Point], list[str]]:
    """(points for the fit, notes on what it leaves out)."""
    points = [model.point for model in trained if model.point is not None]
    notes = []
    if failed := [model for model in trained if model.point is None]:
        names = ", ".join(f"{m.depth}x{m.width} ({m.outcome or 'running'})" for m in failed[:5])
        notes.append(f"{len(failed)} models have no loss: {names}")
    if 1 < len(grid.budgets) < LEVELS:
        notes.append(
            f"{len(grid.budgets)} budgets cannot tell c from gamma: the law is that of {grid.budgets[-1]:,} tokens"
        )
        points = [point for point in points if point.tokens == grid.budgets[-1]]
    return points, notes


def _attempt(what: str, make: Callable[[], T], notes: list[str]) -> T | None:
    try:
        return make()
    except LawNotIdentified as error:
        notes.append(f"{what}: {error.cause}; {error.remedy}")
        return None


def _sizes(grid: Grid, trained: Sequence[Trained]) -> list[Size]:
    largest = [model for model in trained if model.tokens == grid.budgets[-1]]
    return [Size(m.depth, m.width, m.latency, m.loss) for m in largest if m.latency is not None]


def make_picture(analysis: Analysis) -> ScalingPicture:
    """Loss against decode latency: a line a depth, the measured models, and the best size of each budget."""
    law, sizes, tokens = analysis.law, analysis.sizes, analysis.grid.budgets[-1]
    lines = []
    for depth in analysis.grid.depths:
        row = sorted((size for size in sizes if size.depth == depth), key=lambda size: size.width)
        losses = [float(as_metric(size.loss, analysis.metric)) for size in row if size.loss is not None]
        fitted = law.predict([s.depth for s in row], [s.width for s in row], tokens).tolist() if law and row else []
        lines.append(Line(f"depth {depth}", [size.latency for size in row], losses, fitted))
    return ScalingPicture(
        title=f"{analysis.grid.config.space.name}: depth and width of {analysis.grid.block!r}",
        subtitle=_subtitle(analysis),
        x_label=analysis.grid.config.latency.label,
        y_label=f"{UNITS[analysis.metric]} after {tokens:,} tokens",
        lines=lines,
        best=[(c.size.latency, c.loss.value, f"{c.size.depth}x{c.size.width}") for c in analysis.choices],
    )


def _subtitle(analysis: Analysis) -> str:
    if analysis.law is None:
        return "measured models; too few of them for a law"
    names = ("alpha", "beta", "gamma")
    exponents = [f"{n} {analysis.law.parameters[n]:.3g}" for n in names if n in analysis.law.parameters]
    text = f"law: {', '.join(exponents)}"
    if analysis.held_out:
        text += (
            f"; error on larger models {analysis.held_out.mean_error:.1%} (worst {analysis.held_out.worst_error:.1%})"
        )
    return text
