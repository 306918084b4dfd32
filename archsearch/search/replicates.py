"""Replicates: the front of a run trained again with other seeds, after the search and outside of its study.

A result that was chosen as the best of many flatters itself: part of its lead was luck. Only trainings that were not
chosen tell what a front is worth, so means and spreads here leave the search's own training out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from archsearch.config import RunConfig
from archsearch.errors import ConfigError, UsageError
from archsearch.evaluation import Evaluation, Evaluator
from archsearch.search.batch import Task, read_result, run_batch
from archsearch.search.executors import make_executor
from archsearch.search.folder import RunFolder
from archsearch.search.noise import SeedNoise, pooled_noise
from archsearch.search.progress import Progress, Summary
from archsearch.search.study import Candidate

NOISY = ("loss", "recall")
"""Objectives that the seed of a training moves; the others are not measured again."""


@dataclass(frozen=True)
class Replicates:
    """Evaluations of one candidate with other seeds, in the order of the seeds."""

    number: int
    evaluations: tuple[Evaluation, ...]

    def values(self, objective: str) -> list[float]:
        """An objective of each training that went well."""
        return [evaluation.objectives[objective] for evaluation in self.evaluations if evaluation.ok]

    def mean(self, objective: str) -> float | None:
        """Mean of an objective; None where every training failed."""
        values = self.values(objective)
        return statistics.mean(values) if values else None

    def std(self, objective: str) -> float | None:
        """Sample deviation of an objective; None with fewer than two."""
        values = self.values(objective)
        return statistics.stdev(values) if len(values) > 1 else None


def replicate_config(config: RunConfig) -> RunConfig:
    """The config of a replicate: the same training to its end, and no measurement that the seed does not move.

    Raises:
        ConfigError: no objective of the search depends on a seed.
    """
    names = tuple(name for name in config.search.objectives if name in NOISY)
    if not names:
        cause = f"the objectives {', '.join(config.search.objectives)} do not depend on a seed"
        raise ConfigError(cause, "replicates need the objective loss or recall")
    limits = config.space.limits.model_copy(update={"decode_latency": None, "recall": None})
    return config.model_copy(
        update={
            "space": config.space.model_copy(update={"limits": limits}),
            "search": config.search.model_copy(update={"objectives": names}),
            "proxy": config.proxy.model_copy(update={"rungs": ()}),
        }
    )


def replicate_front(
    folder: RunFolder,
    front: Sequence[Candidate],
    count: int,
    evaluator_for: Callable[[RunConfig], Evaluator],
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Train each candidate with ``count`` other seeds, or what is missing of that.

    The seeds follow the search's own, and the results lie in the run folder, ``replicates/TRIAL-SEED.json``.

    Raises:
        UsageError: ``count`` is below 1.
        ArchsearchError: as ``run_batch`` does.
    """
    if count < 1:
        raise UsageError(f"--replicates {count}", "give 1 or more")
    config = replicate_config(folder.config)
    tasks = [
        Task(f"{candidate.number:04d}-{seed}", candidate.architecture, seed)
        for seed in range(config.search.seed + 1, config.search.seed + 1 + count)
        for candidate in front
        if candidate.architecture is not None
    ]
    start = partial(make_executor, config, evaluator_for(config))
    with folder.lock():
        return run_batch(config, tasks, path_of(folder), start, on_progress=on_progress)


def path_of(folder: RunFolder) -> Path:
    """Where the replicates of a run lie."""
    return folder.path / "replicates"


def read_replicates(folder: RunFolder) -> dict[int, Replicates]:
    """Trial number to its replicates. Raises StorageError where a file is damaged."""
    found: dict[int, list[tuple[int, Evaluation]]] = {}
    for path in sorted(path_of(folder).glob("*-*.json")):
        number, _, seed = path.stem.partition("-")
        evaluation = read_result(path.parent, path.stem)
        if evaluation is not None and number.isdigit() and seed.isdigit():
            found.setdefault(int(number), []).append((int(seed), evaluation))
    return {
        number: Replicates(number, tuple(evaluation for _, evaluation in sorted(pairs, key=lambda pair: pair[0])))
        for number, pairs in sorted(found.items())
    }


def noise_of(replicates: Mapping[int, Replicates]) -> SeedNoise | None:
    """The seed noise of the loss that the replicates show, if at least one candidate has two."""
    groups = [[e.objectives["loss"] for e in one.evaluations if "loss" in e.objectives] for one in replicates.values()]
    return pooled_noise(groups, "replicates of this run")
