"""Evaluators that take milliseconds, and configs around them."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.evaluation import Evaluation, Evaluator, Outcome, Rung
from archsearch.stopping import StoppingRule

SPACE: dict[str, Any] = {
    "name": "small",
    "hidden_size": [64, 96, 128, 160],
    "vocab_size": 256,
    "stages": [
        {"name": "early", "mixers": ["a", "d", "m2", "d+m2"], "ffns": [0, 1, 2], "blocks": {"min": 1, "max": 4}},
        {"name": "late", "mixers": ["a", "d", "m2", "d+m2"], "ffns": [0, 1, 2], "blocks": {"min": 1, "max": 4}},
    ],
    "options": {"a": {"head_dim": 32}, "d": {"head_dim": 32}, "m2": {"head_dim": 32, "state": [16, 32]}},
}
AGING = {"mode": "paper", "population_size": 6, "tournament_size": 3}
"""The mode that proposes within a millisecond; the default mode fits surrogates."""


def make_config(
    space: dict[str, Any] | None = None,
    execution: dict[str, Any] | None = None,
    proxy: dict[str, Any] | None = None,
    **search: Any,
) -> RunConfig:
    """A config of the small space, inline unless told otherwise."""
    data = {
        "space": space or SPACE,
        "search": {"evaluations": 20, "aging": AGING, **search},
        "proxy": proxy or {},
        "execution": {"executor": "inline", "min_free_bytes": 0, **(execution or {})},
    }
    return RunConfig.model_validate(data)


def objectives_of(architecture: Architecture) -> dict[str, float]:
    """Two objectives at odds: size costs time and buys loss; the rest is a hash."""
    noise = int(hashlib.sha256(architecture.id.encode()).hexdigest()[:6], 16) / 16**6
    size = architecture.parameters / 1e6
    return {"loss": 2.0 + 1.0 / (1.0 + size) + 0.2 * noise, "decode_latency": 0.1 + 0.05 * size + 0.01 * noise}


@dataclass(frozen=True)
class FakeEvaluator:
    """The true function after ``seconds`` of sleep; every call is noted in ``log`` where it is given."""

    seconds: float = 0.0
    log: str | None = None

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        """Evaluate."""
        if self.log is not None:
            append_line(self.log, architecture.id)
        time.sleep(self.seconds)
        return Evaluation(
            architecture=architecture, outcome=Outcome.OK, objectives=objectives_of(architecture), seed=seed
        )


@dataclass(frozen=True)
class RungEvaluator:
    """Trains past the rungs of 10 and 20 tokens to the end at 40, or to where the rule stops it."""

    log: str | None = None

    def __call__(self, architecture: Architecture, *, seed: int, stopping: StoppingRule | None = None) -> Evaluation:
        """Evaluate."""
        if self.log is not None:
            append_line(self.log, architecture.id)
        values = objectives_of(architecture)
        reached, verdict = [], None
        for tokens, excess in ((10, 1.0), (20, 0.4)):
            wobble = int(hashlib.sha256(f"{architecture.id} {tokens}".encode()).hexdigest()[:4], 16) / 16**4
            loss = values["loss"] + excess + 0.02 * excess * wobble
            reached.append(Rung(tokens=tokens, objectives=values | {"loss": loss}))
            verdict = stopping.verdict(tokens, reached[-1].objectives) if stopping is not None else None
            if verdict is not None:
                break
        found = {
            "rungs": tuple(reached),
            "seed": seed,
            "curve": tuple((r.tokens, r.objectives["loss"]) for r in reached),
        }
        if verdict is not None:
            return Evaluation(architecture=architecture, outcome=Outcome.STOPPED, verdict=verdict, **found)
        return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=values, **found)


RUNGS = {"batch": 1, "context": 10, "rungs": [10, 20, 40]}
"""The proxy of ``RungEvaluator``."""


@dataclass(frozen=True)
class FaultyEvaluator:
    """Every architecture whose id begins with one of ``digits`` meets ``fault``; the others are evaluated."""

    fault: str
    digits: str = "0123"
    log: str | None = None

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        """Evaluate, or fail."""
        if architecture.id[0] not in self.digits:
            return FakeEvaluator(log=self.log)(architecture, seed=seed)
        if self.log is not None:
            append_line(self.log, architecture.id)
        return _FAULTS[self.fault](architecture)


@dataclass(frozen=True)
class Tagged:
    """Writes the worker's process id and variables into each evaluation."""

    inner: Evaluator

    def __call__(self, architecture: Architecture, *, seed: int) -> Evaluation:
        """Evaluate with the inner one."""
        variables = f"{os.environ.get('CUDA_VISIBLE_DEVICES')}/{os.environ.get('OMP_NUM_THREADS')}"
        return self.inner(architecture, seed=seed).model_copy(update={"device": f"{os.getpid()}/{variables}"})


def append_line(path: str, line: str) -> None:
    """Append a line that survives a kill."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, f"{line}\n".encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise(architecture: Architecture) -> Evaluation:
    raise ValueError("broken on purpose")


def _hang(architecture: Architecture) -> Evaluation:
    time.sleep(3600)
    raise AssertionError


def _exit(architecture: Architecture) -> Evaluation:
    os._exit(7)


def _segfault(architecture: Architecture) -> Evaluation:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def _system_exit(architecture: Architecture) -> Evaluation:
    raise SystemExit(3)


def _memory(architecture: Architecture) -> Evaluation:
    raise MemoryError("too large")


def _nothing(architecture: Architecture) -> Any:
    return None


def _nan(architecture: Architecture) -> Evaluation:
    objectives = objectives_of(architecture) | {"loss": float("nan")}
    return Evaluation.model_construct(architecture=architecture, outcome=Outcome.OK, objectives=objectives)


def _infinite(architecture: Architecture) -> Evaluation:
    objectives = objectives_of(architecture) | {"decode_latency": float("inf")}
    return Evaluation.model_construct(architecture=architecture, outcome=Outcome.OK, objectives=objectives)


def _text(architecture: Architecture) -> Evaluation:
    objectives: Any = objectives_of(architecture) | {"loss": "low"}
    return Evaluation.model_construct(architecture=architecture, outcome=Outcome.OK, objectives=objectives)


def _missing(architecture: Architecture) -> Evaluation:
    return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives={"loss": 2.0})


def _out_of_memory(architecture: Architecture) -> Evaluation:
    return Evaluation(architecture=architecture, outcome=Outcome.OOM, error="device out of memory")


_FAULTS: dict[str, Any] = {
    "raise": _raise,
    "hang": _hang,
    "exit": _exit,
    "segfault": _segfault,
    "system_exit": _system_exit,
    "memory": _memory,
    "nothing": _nothing,
    "nan": _nan,
    "infinite": _infinite,
    "text": _text,
    "missing": _missing,
    "oom": _out_of_memory,
}
