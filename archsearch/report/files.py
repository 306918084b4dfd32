"""What a run folder shows of its results: ``pareto.csv``, ``pareto.png`` and ``hypervolume.png``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from archsearch.config import RunConfig
from archsearch.errors import StorageError
from archsearch.files import write_atomic
from archsearch.report.insight import draw_history, history
from archsearch.report.table import csv_text, seed_ids, table
from archsearch.search.study import Candidate, front, hypervolume

if TYPE_CHECKING:
    from archsearch.report.picture import Picture

SCALES = {"parameters": 1e-6, "state_bytes": 1 / 1024}


def write_report(
    config: RunConfig, candidates: Sequence[Candidate], reference: Sequence[float] | None, folder: Path
) -> list[Path]:
    """Write the front as CSV, the picture of all results and the course of the hypervolume.

    Each file appears whole or not at all. The hypervolume has no picture before its reference is fixed.

    Raises:
        StorageError: the folder cannot be written.
    """
    from archsearch.report.picture import draw

    frame = table(config, candidates)
    rows = frame[frame["on_front"].astype(bool)]
    if len(rows):
        rows = rows.sort_values(f"objective.{config.search.objectives[0]}")
    write_atomic(folder / "pareto.csv", csv_text(rows))
    written = [folder / "pareto.csv", folder / "pareto.png"]
    _write_picture(written[1], lambda path: draw(make_picture(config, candidates, reference), path))
    if reference is not None:
        moments = history(candidates, config.search.objectives, reference)
        title = f"{config.space.name}: hypervolume of the search"
        written.append(folder / "hypervolume.png")
        _write_picture(written[2], lambda path: draw_history(moments, path, title))
    return written


def _write_picture(path: Path, draw: Callable[[Path], None]) -> None:
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        try:
            draw(Path(draft))
            os.chmod(draft, 0o644)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        remedy = "free space, or make the folder writable"
        raise StorageError(f"cannot write {path}: {error.strerror}", remedy) from None


def axis_label(name: str, config: RunConfig) -> str:
    """Quantity and unit of an objective."""
    return {
        "loss": "validation loss [nats a token]",
        "recall": "recall error",
        "decode_latency": config.latency.label,
        "parameters": "parameters [millions]",
        "state_bytes": f"decode state at {config.space.limits.state_context:,} tokens [KiB]",
    }[name]


def make_picture(config: RunConfig, candidates: Sequence[Candidate], reference: Sequence[float] | None) -> Picture:
    """The first objective over the second; over the trial number where there is only one."""
    from archsearch.report.picture import Picture, Point

    objectives = config.search.objectives
    y_name, x_name = objectives[0], objectives[1] if len(objectives) > 1 else None
    chosen = {candidate.number for candidate in front(candidates, objectives)}
    seeds = seed_ids(config)
    points = []
    for candidate in candidates:
        evaluation = candidate.evaluation
        if evaluation is None or not evaluation.ok or candidate.duplicate_of is not None:
            continue
        values = {name: value * SCALES.get(name, 1.0) for name, value in evaluation.objectives.items()}
        points.append(
            Point(
                number=candidate.number,
                x=values[x_name] if x_name else float(candidate.number),
                y=values[y_name],
                on_front=candidate.number in chosen,
                seed=evaluation.architecture.id in seeds,
            )
        )
    against = x_name.replace("_", " ") if x_name else "trial"
    return Picture(
        points=points,
        title=f"{config.space.name}: {y_name.replace('_', ' ')} against {against}",
        subtitle=_subtitle(config, candidates, len(points), len(chosen), reference),
        x_label=axis_label(x_name, config) if x_name else "trial",
        y_label=axis_label(y_name, config),
    )


def _subtitle(
    config: RunConfig,
    candidates: Sequence[Candidate],
    evaluated: int,
    on_front: int,
    reference: Sequence[float] | None,
) -> str:
    text = f"{evaluated} candidates, {on_front} on the front"
    volume = hypervolume(candidates, config.search.objectives, reference)
    if volume is not None and reference is not None:
        text += f"; hypervolume {volume:.4g} up to ({', '.join(f'{value:.4g}' for value in reference)})"
    return text
