"""What ``validate-proxy`` trains: a sample of a space, short with some seeds and long with one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.errors import ConfigError, InvalidArchitecture, StorageError, UsageError
from archsearch.schema import Frozen
from archsearch.search.batch import Task
from archsearch.validity.agreement import FEWEST

TRIES = 1000
"""Draws an architecture before a space counts as too small."""
FINEST = 4
"""The curve of the long training begins at this part of the short budget, that of the short one too."""
APART = 1.3
"""Least factor between two budgets of a curve."""


class Plan(Frozen):
    """A sample and how it is trained. Saved as ``plan.json``; a study of another plan is not gone on with."""

    config: RunConfig
    architectures: tuple[Architecture, ...]
    short: int
    long: int
    seeds: int

    @cached_property
    def short_config(self) -> RunConfig:
        """The proxy as a search would run it, and the decode latency."""
        return self._config(self.short, ("loss", "decode_latency"))

    @cached_property
    def seed_config(self) -> RunConfig:
        """The proxy alone, for the other seeds."""
        return self._config(self.short, ("loss",))

    @cached_property
    def long_config(self) -> RunConfig:
        """The long training, validated on the way at budgets that double."""
        return self._config(self.long, ("loss",))

    @property
    def budgets(self) -> tuple[int, ...]:
        """Budgets of the long training's curve, the last one the whole."""
        return curve_budgets(self.config, self.short, self.long)

    def _config(self, tokens: int, objectives: Sequence[str]) -> RunConfig:
        budgets = curve_budgets(self.config, self.short, tokens)
        limits = self.config.space.limits.model_copy(update={"decode_latency": None, "recall": None})
        return self.config.model_copy(
            update={
                "space": self.config.space.model_copy(update={"limits": limits}),
                "search": self.config.search.model_copy(update={"objectives": tuple(objectives)}),
                "proxy": self.config.proxy.model_copy(
                    update={"tokens": tokens, "rungs": budgets if len(budgets) > 1 else ()}
                ),
            }
        )

    @property
    def tasks(self) -> list[Task]:
        """One training an architecture, with the seed of the search; named by index and seed."""
        return self._tasks([self.config.search.seed])

    @property
    def seed_tasks(self) -> list[Task]:
        """The same with the other seeds."""
        first = self.config.search.seed
        return self._tasks(range(first + 1, first + self.seeds))

    def _tasks(self, seeds: Sequence[int]) -> list[Task]:
        return [
            Task(f"{index:03d}-{seed}", architecture, seed)
            for seed in seeds
            for index, architecture in enumerate(self.architectures)
        ]


def curve_budgets(config: RunConfig, short: int, tokens: int) -> tuple[int, ...]:
    """``tokens``, its halves down to a part of ``short``, and ``short`` itself; no two within a step or too close."""
    step = config.proxy.batch * config.proxy.context
    least = max(short / FINEST, step)
    halves = [tokens // 2**power for power in range(64) if tokens // 2**power >= least]
    kept = sorted({short, tokens} if short < tokens else {tokens})
    for budget in halves:
        if all(max(budget, other) >= max(APART * min(budget, other), min(budget, other) + step) for other in kept):
            kept = sorted([*kept, budget])
    return tuple(kept)


def make_plan(config: RunConfig, architectures: int, *, long: int, short: int | None = None, seeds: int = 2) -> Plan:
    """A checked plan with a random sample of the space, fixed by the seed of the search.

    Args:
        config: space, proxy, latency and execution settings.
        architectures: how many to train.
        long: tokens of the long training.
        short: tokens of the proxy; ``proxy.tokens`` if absent.
        seeds: short trainings an architecture.

    Raises:
        UsageError: too few architectures or seeds, or a long training that is not longer.
        ConfigError: the space has not that many architectures.
    """
    short = config.proxy.tokens if short is None else short
    if architectures < FEWEST:
        raise UsageError(f"--architectures {architectures} rank nothing", f"give at least {FEWEST}")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}", "give 1 or more; 2 and more tell the seed noise")
    step = config.proxy.batch * config.proxy.context
    if short < 1 or math.ceil(long / step) <= math.ceil(short / step):
        cause = f"--long {long:,} tokens are no longer training than {short:,} (a step has {step:,})"
        raise UsageError(cause, "give a larger --long, or a smaller --short")
    sample = _sample(config, architectures)
    return Plan(config=config, architectures=sample, short=short, long=long, seeds=seeds)


def _sample(config: RunConfig, count: int) -> tuple[Architecture, ...]:
    rng = np.random.default_rng(config.search.seed)
    found: dict[str, Architecture] = {}
    tries = int(TRIES * count)
    for _ in range(tries):
        try:
            architecture = config.space.build(config.space.sample(rng))
        except InvalidArchitecture:
            continue
        found[architecture.id] = architecture
        if len(found) == count:
            return tuple(found.values())
    cause = f"{config.space.name}: {len(found)} different architectures in {tries:,} draws, {count} wanted"
    raise ConfigError(cause, "give fewer --architectures, or widen the space")


def read_plan(folder: Path) -> Plan | None:
    """The plan of a study that was begun, or None. Raises StorageError where it is damaged."""
    path = folder / "plan.json"
    try:
        return Plan.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise StorageError(f"cannot read {path}: {reason}", "restore it, or choose another --out") from error
