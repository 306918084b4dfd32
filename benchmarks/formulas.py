"""Invented language-model problems: the space of search_spaces/hybrid.yaml (26 genes) with formulas for training.

    python benchmarks/formulas.py            # computes the bounds and fronts of benchmarks/formulas.json anew

No table can hold 4.5e13 genomes, so loss and latency are computed from the architecture. The formulas are made
up; what they share with real models is their structure, and each has one of its own:

* ``scaling``: a power law in depth, width and parameters, and a quality of each kind. Smooth.
* ``interplay``: besides, which mixers stand beside each other, where attention stands, the share of the FFNs,
  and a little noise (a fixed property of the architecture, as that of a seeded training is).
* ``rugged``: besides, every block has a value of its own that nothing predicts, kinds suit widths, and more noise.

The bounds are the least values of the front and the 95th percentiles of random architectures (the greatest values
would make any front look complete). The front is the best of long evolutionary searches from several seeds; it is
near the true one, so a hypervolume may pass 1 by a hair.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from archsearch.architecture import SPACES, Architecture
from archsearch.config import load_config
from archsearch.errors import InvalidArchitecture
from archsearch.files import write_atomic
from archsearch.search.pareto import front, hypervolume
from archsearch.space import SearchSpace

KINDS = ("a", "w", "d", "gd", "gl", "m2")
QUALITY = {"a": 0.00, "w": 0.04, "d": -0.01, "gd": -0.03, "gl": 0.02, "m2": -0.02}  # nats; less is better
KERNELS = {"a": 4, "w": 4, "d": 3, "gd": 3, "gl": 3, "m2": 3, "f": 2}
LAUNCH, BANDWIDTH, CONTEXT = 2.5e-6, 2.4e12, 4096
RANDOM, WORST = 10_000, 0.95
RECORD = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Formula:
    """A problem of the name ``name``; a ``benchmarks.tables.Problem``."""

    name: str

    @cached_property
    def space(self) -> SearchSpace:
        """The genes of the default space with at most two blocks a stage, so that it needs no limits.

        Optuna's samplers learn nothing from infeasible genomes, and seeds are known to ours alone.
        """
        data = load_config(SPACES / "hybrid.yaml").space.model_dump(exclude={"limits", "seeds"}, exclude_unset=True)
        for stage in data["stages"]:
            stage["blocks"] = [count for count in stage["blocks"] if count <= 2]
        return SearchSpace.model_validate(data)

    @cached_property
    def _record(self) -> dict[str, list[float]]:
        return dict(json.loads(RECORD.read_text())[self.name])

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Of loss and latency."""
        return np.array(self._record["low"]), np.array(self._record["high"])

    @property
    def whole(self) -> float:
        """Hypervolume of the best front that is known."""
        low, high = self.bounds
        points = (np.array(self._record["front"]) - low) / (high - low)
        return hypervolume(points, np.ones(2))

    def objectives(self, architecture: Architecture) -> tuple[float, float]:
        """Loss in nats and seconds a token."""
        return _objectives(self.name, architecture)


def _objectives(name: str, architecture: Architecture) -> tuple[float, float]:
    loss, latency = _power_law(architecture), _latency(architecture)
    if name != "scaling":
        loss += _neighbours(architecture) + _places(architecture) + _ffn_share(architecture)
        loss += 0.004 * _draw("noise", architecture.id)
    if name == "rugged":
        loss += _taste(architecture) + 0.012 * _draw("more noise", architecture.id)
        latency *= 1.0 + 0.02 * _draw("clock", architecture.id) + 0.06 * (architecture.hidden_size % 512 > 0)
    return loss, latency


@lru_cache(maxsize=100_000)
def _draw(*words: str) -> float:
    """A standard normal number, always the same for the same words."""
    seed = int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "big")
    return float(np.random.default_rng(seed).standard_normal())


def _mixers(architecture: Architecture) -> list[str]:
    return [operator.kind for operator in architecture.operators if operator.kind != "f"]


def _power_law(architecture: Architecture) -> float:
    """L0 + a D^-alpha + b W^-beta + c P^-gamma, and the mean quality of the mixers and their options."""
    depth, width = len(architecture.operators), architecture.hidden_size
    size = architecture.parameters - architecture.vocab_size * width
    loss = 1.7 + 0.25 * (depth / 16) ** -0.6 + 0.20 * (width / 1024) ** -0.7 + 0.15 * (size / 2e8) ** -0.3
    values = [QUALITY[o.kind] - 0.01 * math.log2(_memory(o)) for o in architecture.operators if o.kind != "f"]
    variety = len(set(_mixers(architecture)))
    return loss + sum(values) / len(values) - 0.03 * math.log(variety)


def _memory(operator: object) -> float:
    """How much an operator may remember, beside the least that the space allows."""
    for name, least in (("kv_heads", 1), ("window", 512), ("state", 64)):
        if getattr(operator, name, None):
            return float(getattr(operator, name)) / least
    return 1.0


def _latency(architecture: Architecture) -> float:
    launches = sum(KERNELS[operator.kind] for operator in architecture.operators) + 2
    return LAUNCH * launches + architecture.step_bytes(CONTEXT) / BANDWIDTH


def _neighbours(architecture: Architecture) -> float:
    """Mixers help or hinder the next one."""
    pairs = list(itertools.pairwise(_mixers(architecture)))
    return sum(0.08 * _draw("pair", *pair) for pair in pairs) / max(len(pairs), 1)


def _places(architecture: Architecture) -> float:
    """Attention is worth most in the later half, and the first of it far more than the fourth."""
    kinds = _mixers(architecture)
    worth = sum(0.5 + i / len(kinds) for i, kind in enumerate(kinds) if kind == "a")
    return -0.10 * (1 - math.exp(-worth))


def _ffn_share(architecture: Architecture) -> float:
    """FFNs do best with about 55 % of the parameters of all layers."""
    sizes = [(o.kind == "f", o.parameters(architecture.hidden_size)) for o in architecture.operators]
    share = sum(size for is_ffn, size in sizes if is_ffn) / sum(size for _, size in sizes)
    return 0.8 * (share - 0.55) ** 2


def _taste(architecture: Architecture) -> float:
    """A value of its own for every run of three operators, and kinds that suit some widths."""
    kinds = [operator.kind for operator in architecture.operators]
    runs = [" ".join(kinds[i : i + 3]) for i in range(len(kinds) - 2)]
    own = sum(0.08 * _draw("run", run) for run in runs) / max(len(runs), 1)
    width, mixers = str(architecture.hidden_size), _mixers(architecture)
    return own + sum(0.03 * _draw("width", width, kind) for kind in mixers) / len(mixers)


FORMULAS = {name: Formula(name) for name in ("scaling", "interplay", "rugged")}


# Bounds and fronts


def survey(formula: Formula, seed: int, bred: int = 20_000) -> np.ndarray:
    """Objectives of random architectures and of a long search, (architectures, 2)."""
    rng, space = np.random.default_rng(seed), formula.space
    points: list[tuple[float, float]] = []
    genomes = []
    while len(points) < RANDOM:
        genomes += _add(formula, space.sample(rng), points)
    best = list(front(np.array(points)))
    for step in range(bred):
        parent = genomes[best[int(rng.integers(len(best)))]]
        if rng.random() < 0.3:
            mate = genomes[best[int(rng.integers(len(best)))]]
            parent = {name: (parent if rng.random() < 0.5 else mate)[name] for name in parent}
        for _ in range(int(rng.geometric(0.5))):
            parent = space.mutate(parent, rng)
        genomes += _add(formula, parent, points)
        if step % 200 == 0:
            best += range(max(best) + 1, len(points))
            best = [best[i] for i in front(np.array(points)[best])]
    return np.array(points)


def _add(formula: Formula, genome: dict[str, object], points: list[tuple[float, float]]) -> list[dict[str, object]]:
    try:
        points.append(formula.objectives(formula.space.build(genome)))
    except InvalidArchitecture:
        return []
    return [genome]


def main() -> int:
    """Write the record."""
    record = {}
    for name, formula in FORMULAS.items():
        surveys = [survey(formula, seed) for seed in range(2)]
        points, drawn = np.concatenate(surveys), np.concatenate([survey[:RANDOM] for survey in surveys])
        members = np.unique(points[front(points)], axis=0)
        record[name] = {"low": points.min(axis=0).tolist(), "high": np.quantile(drawn, WORST, axis=0).tolist()}
        record[name]["front"] = members.round(9).tolist()
        print(f"{name}: {len(points):,} architectures, {len(members)} on the front", flush=True)
    write_atomic(RECORD, json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
