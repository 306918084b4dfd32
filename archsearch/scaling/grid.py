"""A grid of depths and widths, trained like any search: a run folder a training budget, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from archsearch.config import AgingConfig, RunConfig, SearchConfig
from archsearch.errors import ConfigError, InvalidArchitecture, UsageError
from archsearch.evaluation import Evaluator, Outcome
from archsearch.scaling.law import Point
from archsearch.search.folder import RunFolder
from archsearch.search.loop import run_search
from archsearch.search.progress import Summary
from archsearch.search.reporter import OnProgress
from archsearch.search.study import candidates, open_study
from archsearch.space import Limits, SearchSpace

STAGE = "grid"
DEPTH, WIDTH = f"{STAGE}.blocks", "hidden_size"
MAX_MODELS = 10_000


@dataclass(frozen=True)
class Grid:
    """What is trained: ``depths`` repeats of ``block`` at each width, for each budget of tokens.

    Make one with ``make_grid``, which checks it. The tuples ascend.
    """

    config: RunConfig
    block: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    budgets: tuple[int, ...]

    @cached_property
    def space(self) -> SearchSpace:
        """The space that holds this grid and nothing else; its limits are the grid itself."""
        base = self.config.space
        return SearchSpace(
            name=base.name,
            hidden_size=self.widths,
            vocab_size=base.vocab_size,
            tie_embeddings=base.tie_embeddings,
            meta_tokens=base.meta_tokens,
            stages=({"name": STAGE, "pattern": self.block, "blocks": self.depths},),
            options={kind: {name: values[:1] for name, values in o.items()} for kind, o in base.options.items()},
            limits=Limits(state_context=base.limits.state_context),
        )

    def run_config(self, tokens: int) -> RunConfig:
        """The run that trains the grid for one budget; the largest one measures decode latency too."""
        objectives = ("loss", "decode_latency") if tokens == self.budgets[-1] else ("loss",)
        models = len(self.depths) * len(self.widths)
        return self.config.model_copy(
            update={
                "space": self.space,
                # Ageing evolution never proposes an architecture twice, so this many are all of them.
                "search": SearchConfig(
                    evaluations=models, objectives=objectives, seed=self.config.search.seed, aging=AgingConfig()
                ),
                "proxy": self.config.proxy.model_copy(update={"tokens": tokens, "rungs": ()}),
            }
        )

    def sizes_between(self) -> tuple[list[int], list[int]]:
        """Depths and widths to choose from: all from the least to the largest, widths at their common step."""
        step = math.gcd(*self.widths)
        widths = [width for width in range(self.widths[0], self.widths[-1] + 1, step) if self.is_width(width)]
        return list(range(self.depths[0], self.depths[-1] + 1)), widths

    def is_width(self, width: int) -> bool:
        """Whether the block exists at a width."""
        return replace(self, widths=(width,)).space.identity({DEPTH: self.depths[0]}) is not None


@dataclass(frozen=True, slots=True)
class Trained:
    """One model of the grid: loss in nats a token and decode latency in seconds, where there are any."""

    depth: int
    width: int
    tokens: int
    outcome: Outcome | None
    loss: float | None
    latency: float | None

    @property
    def point(self) -> Point | None:
        """What the law is fitted to; None where the training failed or has not ended."""
        return None if self.loss is None else Point(self.depth, self.width, self.tokens, self.loss)


def make_grid(
    config: RunConfig,
    depths: Sequence[int],
    widths: Sequence[int],
    *,
    budgets: Sequence[int] = (),
    block: str | None = None,
) -> Grid:
    """A checked grid.

    Args:
        config: gives vocabulary, options a kind (the first choice of each), proxy and latency settings.
        depths: numbers of blocks, two at least.
        widths: hidden sizes, two at least.
        budgets: training tokens; the config's ``proxy.tokens`` where there are none.
        block: operators such as ``"d f m2 f"``; the first block of the space's first stage if absent.

    Raises:
        ConfigError: too few values or too many models, an unknown operator, or a width that the block cannot have.
    """
    grid = Grid(
        config=config,
        block=block or first_block(config.space),
        depths=_ascending("depths", depths, least=2),
        widths=_ascending("widths", widths, least=2),
        budgets=_ascending("budgets", budgets or (config.proxy.tokens,), least=1),
    )
    models = len(grid.depths) * len(grid.widths) * len(grid.budgets)
    if models > MAX_MODELS:
        raise ConfigError(f"the grid has {models:,} models", f"keep it below {MAX_MODELS:,}")
    try:
        space = grid.space
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(
            f"the grid is invalid: {problem['msg'].removeprefix('Value error, ')}", "correct it"
        ) from None
    for width in grid.widths:
        try:
            space.build({WIDTH: width, DEPTH: grid.depths[-1]})
        except InvalidArchitecture as error:
            model = f"{grid.depths[-1]} blocks {grid.block!r} at width {width}"
            raise ConfigError(f"{model} cannot exist: {error.cause}", "choose other sizes") from None
    return grid


def first_block(space: SearchSpace) -> str:
    """The block that the first stage gives when every factor takes its first choice."""
    stage = space.stages[0]
    return " ".join(stage.block({name: values[0] for name, values in stage.choices.items()}))


def _ascending(what: str, values: Sequence[int], least: int) -> tuple[int, ...]:
    if any(value < 1 for value in values):
        raise ConfigError(f"{what} must be at least 1, found {min(values)}", "give positive numbers")
    if len(set(values)) != len(values):
        raise ConfigError(f"{what}: a value is repeated", "give each once")
    if len(values) < least:
        raise ConfigError(f"{len(values)} value(s) of {what} make no grid", f"give at least {least}")
    return tuple(sorted(values))


def train_grid(
    grid: Grid,
    out: Path,
    evaluator_for: Callable[[RunConfig], Evaluator],
    *,
    environment: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Train what is not trained yet, the smallest budget first; gives the summary of the last run.

    Args:
        grid: what to train.
        out: folder of run folders, ``tokens_<budget>`` each.
        evaluator_for: makes the evaluator of a run.
        environment: plain data for ``environment.json``.
        on_progress: as for ``run_search``; counts within one budget.

    Raises:
        UsageError: ``out`` holds another grid.
        ArchsearchError: as ``run_search`` does.
    """
    for tokens in grid.budgets:
        folder = open_run(grid, out, tokens) or RunFolder.create(
            run_path(out, tokens), grid.run_config(tokens), environment
        )
        summary = run_search(folder, evaluator_for(folder.config), on_progress=on_progress)
        if summary.exit_code:
            break
    return summary


def run_path(out: Path, tokens: int) -> Path:
    """The run folder of a budget."""
    return out / f"tokens_{tokens}"


def open_run(grid: Grid, out: Path, tokens: int) -> RunFolder | None:
    """The run of a budget, or None before it is begun. Raises UsageError where it is of another grid."""
    path = run_path(out, tokens)
    if not (path / "config.yaml").exists():
        return None
    folder = RunFolder.open(path)
    wanted = grid.run_config(tokens)
    for part in ("space", "search", "proxy", "latency"):
        if getattr(folder.config, part) != getattr(wanted, part):
            raise UsageError(
                f"{path} was trained with another {part}", "choose another --out, or the same grid as there"
            )
    return folder


def collect(grid: Grid, out: Path) -> list[Trained]:
    """Every model of the grid that has been begun, by budget, depth and width."""
    found = []
    for tokens in grid.budgets:
        folder = open_run(grid, out, tokens)
        if folder is None or not folder.study_path.exists():
            continue
        for candidate in candidates(open_study(folder), folder):
            values = candidate.evaluation.objectives if candidate.evaluation is not None else {}
            depth, width = (int(str(candidate.genome[name])) for name in (DEPTH, WIDTH))
            loss, latency = values.get("loss"), values.get("decode_latency")
            found.append(Trained(depth, width, tokens, candidate.outcome, loss, latency))
    return sorted(found, key=lambda model: (model.tokens, model.depth, model.width))
