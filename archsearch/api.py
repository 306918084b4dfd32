"""The Python interface: ``run`` searches, ``open_run`` looks at what was found.

::

    import archsearch

    run = archsearch.run("search_spaces/tiny.yaml", out="experiments/mine", evaluations=24)
    print(run.dataframe())
    best = run.front()[0]
    run.export(best.number, "experiments/mine/best")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.commands.settings import as_overrides
from archsearch.config import RunConfig, load_config
from archsearch.environment import capture_environment
from archsearch.errors import UsageError
from archsearch.latency.profile_check import prepare_profile
from archsearch.model.requirements import prepare_kernels
from archsearch.search.folder import RunFolder
from archsearch.worker import ProxyEvaluator, prepare_data

if TYPE_CHECKING:
    import pandas as pd

    from archsearch.export import Format
    from archsearch.search.noise import SeedNoise
    from archsearch.search.progress import Progress, Summary
    from archsearch.search.replicates import Replicates
    from archsearch.search.study import Candidate

SHORT_NAMES = {
    "evaluations": "search.evaluations",
    "seed": "search.seed",
    "sampler": "search.sampler",
    "executor": "execution.executor",
    "workers": "execution.workers",
    "device": "execution.device",
}
"""Names that ``run`` takes for settings."""
KEYBOARD = 130


def run(
    space: str | Path | RunConfig,
    out: str | Path | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Run:
    """Search a space to its end.

    Args:
        space: a config file, or a ready config.
        out: a new folder; ``experiments/<name>-<time>`` when absent.
        on_progress: called after every result.
        settings: ``evaluations``, ``seed``, ``sampler``, ``executor``, ``workers``, ``device``, or any other
            key of the config with two underscores for each dot: ``proxy__tokens=50_000``.

    Raises:
        ArchsearchError: as ``archsearch run`` does, with cause and remedy.
        KeyboardInterrupt: it was interrupted; ``open_run(out).search()`` goes on with it.
    """
    if isinstance(space, RunConfig):
        if settings:
            raise UsageError(f"{next(iter(settings))!r} beside a ready config", "put it into the config")
        config = space
    else:
        keys = {SHORT_NAMES.get(name, name.replace("__", ".")): value for name, value in settings.items()}
        config = load_config(space, as_overrides(keys))
    found = create_run(config, out)
    summary = found.search(on_progress=on_progress)
    found.report()
    if summary.exit_code:
        # The search caught the signal to save itself; the program that called still has to end by it.
        raise KeyboardInterrupt if summary.exit_code == KEYBOARD else SystemExit(summary.exit_code)
    return found


def create_run(config: RunConfig, out: str | Path | None = None) -> Run:
    """Make a run folder without searching yet; this process holds it until the search ends.

    Raises:
        UsageError: the folder exists and is not empty.
        StorageError: it cannot be written.
        ConfigError: the data cannot be read, or does not fit the vocabulary.
    """
    prepare_profile(config)
    prepare_kernels(config)
    prepare_data(config)
    path = Path(out) if out is not None else Path("experiments") / f"{config.space.name}-{datetime.now():%Y%m%d-%H%M%S}"
    return Run(RunFolder.create(path, config, capture_environment().model_dump(mode="json")))


def open_run(path: str | Path) -> Run:
    """A run on disk, finished or not.

    Raises:
        UsageError: there is none.
    """
    return Run(RunFolder.open(path))


@dataclass(frozen=True)
class Results:
    """One look at the study of a run.

    Attributes:
        path: the run folder.
        config: the resolved config.
        candidates: every trial, in the order of the numbers.
        reference: up to where the hypervolume counts; None before the first population is complete.
        replicates: of the front, by trial number.
        given_noise: seed noise from elsewhere, in place of what the replicates show.
    """

    path: Path
    config: RunConfig
    candidates: list[Candidate]
    reference: tuple[float, ...] | None
    replicates: dict[int, Replicates]
    given_noise: SeedNoise | None = None

    @cached_property
    def front(self) -> list[Candidate]:
        """The candidates that no other dominates, the best first objective first."""
        from archsearch.search import study

        return study.front(self.candidates, self.config.search.objectives)

    @cached_property
    def hypervolume(self) -> float | None:
        """Volume that the front dominates up to ``reference``."""
        from archsearch.search import study

        return study.hypervolume(self.candidates, self.config.search.objectives, self.reference)

    @cached_property
    def noise(self) -> SeedNoise | None:
        """Seed noise of the loss; None where none was given and no candidate has two replicates."""
        from archsearch.search.replicates import noise_of

        return self.given_noise or noise_of(self.replicates)

    @property
    def evaluated(self) -> int:
        """Different architectures whose evaluation has ended."""
        return sum(candidate.is_distinct for candidate in self.candidates)

    def candidate(self, number: int) -> Candidate:
        """One trial.

        Raises:
            UsageError: there is none with this number.
        """
        if not 0 <= number < len(self.candidates):
            remedy = f"give a number from 0 to {len(self.candidates) - 1}" if self.candidates else "run it first"
            raise UsageError(f"{self.path} has no trial {number}", remedy)
        return self.candidates[number]


class Run:
    """One run: its folder, and what the study in it holds now."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def config(self) -> RunConfig:
        """The resolved config."""
        return self.folder.config

    def search(self, *, on_progress: Callable[[Progress], None] | None = None) -> Summary:
        """Search until the budget is spent; a run that was stopped goes on where it was.

        Raises:
            RunInUse: another process is at work.
            SearchStopped: too many evaluations failed.
        """
        from archsearch.search.loop import run_search

        prepare_profile(self.config)
        prepare_kernels(self.config)
        prepare_data(self.config)
        checkpoints = str(self.folder.checkpoints.resolve()) if self.config.proxy.rungs else None
        evaluator = ProxyEvaluator(self.config, str(self.folder.weights.resolve()), checkpoints)
        return run_search(self.folder, evaluator, on_progress=on_progress)

    def replicate(self, count: int, *, on_progress: Callable[[Progress], None] | None = None) -> Summary:
        """Train the front again with ``count`` other seeds, or what is missing of that; the study stays as it is.

        Raises:
            UsageError: ``count`` is below 1.
            RunInUse: another process is at work.
            SearchStopped: too many trainings failed.
        """
        from archsearch.search.replicates import replicate_front

        prepare_kernels(self.config)
        prepare_data(self.config)
        front = self.results().front
        return replicate_front(
            self.folder, front, count, lambda config: ProxyEvaluator(config), on_progress=on_progress
        )

    def results(self) -> Results:
        """What the study holds now. Raises StorageError where it is damaged."""
        from archsearch.search import study
        from archsearch.search.replicates import read_replicates

        opened = study.open_study(self.folder)
        found = study.candidates(opened, self.folder)
        reference = study.hypervolume_reference(opened)
        return Results(self.path, self.config, found, reference, read_replicates(self.folder))

    def candidates(self) -> list[Candidate]:
        """Every trial, in the order of the numbers."""
        return self.results().candidates

    def front(self) -> list[Candidate]:
        """The candidates that no other dominates, the best first objective first."""
        return self.results().front

    def dataframe(self) -> pd.DataFrame:
        """One row a trial."""
        from archsearch.search import study

        return study.dataframe(self.candidates())

    def report(self) -> list[Path]:
        """Write ``pareto.csv`` and ``pareto.png`` into the run folder. Raises StorageError."""
        from archsearch.report import write_report

        results = self.results()
        return write_report(self.config, results.candidates, results.reference, self.path)

    def export(
        self, number: int, to: str | Path, format: Format = "hf", *, say: Callable[[str], None] = lambda _: None
    ) -> Path:
        """Write one candidate: a Hugging Face folder, or a YAML or JSON file. See ``export_candidate``.

        Raises:
            UsageError: no such trial, it has no result, or the target exists.
        """
        from archsearch.export import export_candidate

        evaluation = self.results().candidate(number).evaluation
        if evaluation is None or (format == "hf" and not evaluation.ok):
            how = "no result" if evaluation is None else f"the outcome {evaluation.outcome}"
            raise UsageError(f"trial {number} has {how}", f"see `archsearch inspect {self.path}`")
        return export_candidate(
            evaluation,
            Path(to),
            number=number,
            proxy=self.config.proxy,
            weights=self.folder.weights / f"{evaluation.architecture.id}.safetensors",
            format=format,
            source=self.path.resolve().name,
            say=say,
        )
