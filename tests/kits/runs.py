"""Runs that take milliseconds: the whole command line over an evaluator that only does arithmetic."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from archsearch.api import Run, create_run
from archsearch.architecture import SPACES, Architecture
from archsearch.config import RunConfig, load_config
from archsearch.evaluation import Evaluation, Outcome, Rung
from archsearch.stopping import StoppingRule

TINY = SPACES / "tiny.yaml"
SMALL = (
    "search.evaluations=12",
    "search.aging.population_size=4",
    "search.aging.tournament_size=2",
    "execution.executor=inline",
)
SMALL_FLAGS = [word for value in SMALL for word in ("--set", value)]


class FakeEvaluator:
    """Stands in for ``ProxyEvaluator``: larger models lose less and take longer; some with Mamba-2 fail."""

    def __init__(self, config: RunConfig, weights: str | None = None, checkpoints: str | None = None) -> None:
        self.config = config

    def __call__(self, architecture: Architecture, *, seed: int, stopping: StoppingRule | None = None) -> Evaluation:
        """Evaluate."""
        noise = int(hashlib.sha256(architecture.id.encode()).hexdigest()[:4], 16) / 16**4
        if noise > 0.7 and "m2" in architecture.notation:
            return Evaluation(architecture=architecture, outcome=Outcome.NAN, error="the loss is not finite", seed=seed)
        size = architecture.parameters / 1e6
        found = {
            "loss": 2 + 1 / (1 + size) + 0.2 * noise,
            "decode_latency": 0.1 + 0.05 * size + 0.01 * noise,
            "parameters": float(architecture.parameters),
            "state_bytes": float(architecture.state_bytes(self.config.space.limits.state_context)),
        }
        found["loss"] += 0.002 * seed
        objectives = {name: found[name] for name in self.config.search.objectives}
        reached: list[Rung] = []
        for tokens in self.config.proxy.rungs[:-1]:
            reached.append(Rung(tokens=tokens, objectives=found | {"loss": found["loss"] + 0.5 + 0.01 * noise}))
            verdict = stopping.verdict(tokens, reached[-1].objectives) if stopping else None
            if verdict is not None:
                return Evaluation(
                    architecture=architecture, outcome=Outcome.STOPPED, rungs=tuple(reached), verdict=verdict, seed=seed
                )
        return Evaluation(
            architecture=architecture,
            outcome=Outcome.OK,
            objectives=objectives,
            curve=((1000, 3.0), (2000, 2.5)),
            rungs=tuple(reached),
            seconds={"train": 0.1},
            paths={"decode": "fake"},
            device="fake device",
            seed=seed,
        )


def fake_evaluations(patch: pytest.MonkeyPatch) -> None:
    """Let every search from here on use ``FakeEvaluator``."""
    patch.setattr("archsearch.api.ProxyEvaluator", FakeEvaluator)


def make_run(path: Path, *overrides: str) -> Run:
    """A finished run of twelve candidates; needs ``fake_evaluations``."""
    run = create_run(load_config(TINY, [*SMALL, *overrides]), path)
    run.search()
    return run
