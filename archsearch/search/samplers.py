"""The samplers by name. Each proposal gets a fresh one, seeded by the run's seed and what was proposed before.

With one worker, a search that was interrupted therefore proposes what it would have proposed. That
holds for all five: aging, TPE, GP and random read only the study; NSGA-II keeps its generations in
the trials' attributes, which the study stores with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.latency_profile import LatencyProfile, load_profile
from archsearch.search.aging import AgingEvolutionSampler

SamplerFor = Callable[[int, bool], BaseSampler]
"""The number of genomes proposed before, and whether the last of them was refused, to the sampler of the next."""
RELIEF = 4
"""One in so many proposals after a refused one is random, where the sampler learns nothing from refusals."""


def make_sampler(config: RunConfig) -> SamplerFor:
    """The sampler of ``config.search.sampler``.

    ``gp`` imports torch into this process, because Optuna's own sampler is written in it; it is the
    only choice that does. Its objectives are all modelled, so it slows down from some hundred trials on.

    Optuna's samplers learn nothing from an infeasible genome, and may propose its like for ever; random genomes
    among theirs bring them on.
    """
    if config.search.sampler == "aging":
        aging = _aging(config)
        return lambda count, refused: aging
    make = _OPTUNA[config.search.sampler]

    def sampler_for(count: int, refused: bool) -> BaseSampler:
        seed = int(np.random.SeedSequence([config.search.seed, count]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return (_random if refused and count % RELIEF == 0 else make)(seed, config)

    return sampler_for


def _aging(config: RunConfig) -> AgingEvolutionSampler:
    """The paper's mode aims at the space's latency limit; the default mode uses what is known without measuring."""
    search, latency, settings = config.search, config.latency, config.search.aging.model_dump()
    ceiling, ceilings = config.space.limits.decode_latency, {}
    profile = None if latency.profile is None else load_profile(latency.profile)
    if settings["mode"] == "paper" and "decode_latency" in search.objectives:
        settings["latency_target"] = ceiling
        if ceiling is not None and profile is not None and "hidden_size" in config.space.genes:
            settings["fit_width"] = "hidden_size"
    if ceiling is not None and profile is not None and profile.error is not None:
        # What is measured may still keep a limit that its prediction breaks by as little as the profile errs.
        ceilings["decode_latency"] = ceiling * (1 if latency.source == "profile" else 1 + profile.error.worst)
    return AgingEvolutionSampler(
        config.space,
        objectives=search.objectives,
        cheap=_cheap(config, profile),
        ceilings=ceilings,
        seed=search.seed,
        **settings,
    )


def _cheap(
    config: RunConfig, profile: LatencyProfile | None
) -> Callable[[Mapping[str, Any]], Mapping[str, float]] | None:
    """The objectives and limits that an architecture has before anything runs, if the search has such ones."""
    space, known = config.space, dict[str, Callable[[Architecture], float]]()
    if "parameters" in config.search.objectives:
        known["parameters"] = lambda architecture: float(architecture.parameters)
    if "state_bytes" in config.search.objectives:
        known["state_bytes"] = lambda architecture: float(architecture.state_bytes(space.limits.state_context))
    timed = "decode_latency" in config.search.objectives or space.limits.decode_latency is not None
    if profile is not None and timed:
        known["decode_latency"] = profile.seconds
    if not known:
        return None

    def cheap(genome: Mapping[str, Any]) -> Mapping[str, float]:
        architecture = space.build(genome)
        return {name: value(architecture) for name, value in known.items()}

    return cheap


def _tpe(seed: int, config: RunConfig) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _nsga2(seed: int, config: RunConfig) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=config.search.aging.population_size)


def _gp(seed: int, config: RunConfig) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed)


def _random(seed: int, config: RunConfig) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


_OPTUNA: dict[str, Callable[[int, RunConfig], BaseSampler]] = {
    "tpe": _tpe,
    "nsga2": _nsga2,
    "gp": _gp,
    "random": _random,
}
