"""The validity study: train the plan, compare the rankings, say what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from archsearch.config import ProxyConfig, RunConfig
from archsearch.errors import ConfigError, StorageError, UsageError
from archsearch.evaluation import Evaluator
from archsearch.files import to_json, write_atomic
from archsearch.report.validity_picture import ValidityPicture, draw_validity
from archsearch.search.batch import Task, run_batch
from archsearch.search.executors import make_executor
from archsearch.search.filesystem import refuse_network
from archsearch.search.folder import RunFolder
from archsearch.search.noise import SeedNoise
from archsearch.search.progress import Progress, Summary
from archsearch.validity.analysis import LONG, SEEDS, SHORT, Analysis, analyse
from archsearch.validity.plan import Plan, read_plan

RECORD = "validity.json"
UNRELATED = ("rungs", "recall", "validations", "validation_tokens")
"""Settings of a proxy that leave the seed noise of its loss as it is."""
EvaluatorFor = Callable[[RunConfig, Path | None], Evaluator]
"""Makes the evaluator of a config; the path is a folder for checkpoints."""


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
