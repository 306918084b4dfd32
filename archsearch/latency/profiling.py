"""Measures the latency profile of a device: chains of equal operators, then whole architectures.

What one more operator costs is seen in models of N and of 2 N copies of it, measured as any other model is, with all
proofs of the protocol. N is such that the two lie around the size of the space's models: models that are small
against the GPU's cache run by other rules than large ones.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archsearch.architecture import Architecture, dump_operator, make_architecture
from archsearch.config import RunConfig
from archsearch.errors import InvalidArchitecture
from archsearch.latency.compiling import Task, compile_shared, compile_side_by_side, compile_step
from archsearch.latency.decode import measure_decode
from archsearch.latency.device import describe
from archsearch.latency.profile_fit import finish
from archsearch.latency.protocol import VERSION, kernel_hash
from archsearch.latency_profile import (
    Chain,
    Checked,
    Fingerprint,
    LatencyProfile,
    ProfileUnfit,
    key,
    load_profile,
    named,
    operators_of,
    versions_here,
)
from archsearch.operators import OperatorConfig
from archsearch.space import SearchSpace

Say = Callable[[str], None]
FEWEST_COPIES, MOST_COPIES = 4, 48
TRIES = 20_000
"""Genomes drawn to find architectures to check with."""


def measure_profile(config: RunConfig, path: Path, device: torch.device, checks: int, say: Say) -> LatencyProfile:
    """Measure what the profile in ``path`` lacks for the space of ``config``, and write it.

    It is written after each measurement, so a run that was ended goes on where it was.

    Args:
        config: its space and latency settings count.
        path: a file that is there is completed if it is of this device and these settings.
        device: where to measure.
        checks: whole architectures to measure; a third of them for the correction, the others held out.
        say: told what is done.

    Raises:
        ProfileUnfit: the file there is of another device, other kernels or settings.
        ConfigError: the file there is damaged.
        ArchsearchError: as ``measure_decode`` does.
    """
    profile = _opened(path, take_fingerprint(config, device))
    sample = sample_architectures(config.space, checks)
    chains = list(_missing_chains(profile, config, statistics.median(len(a.operators) for a in sample)))
    known = {_told(one) for one in profile.checked}
    unseen = [architecture for architecture in sample if _told(_checked(architecture, 1.0)) not in known]
    if device.type == "cuda" and (chains or unseen):
        _compile(config, device, [model for _, model in chains], say)
    total, done = len(chains) + len(unseen), 0
    for chain, model in chains:
        ms = _measure(model, config, device, say)
        profile = profile.model_copy(update={"chains": (*profile.chains, chain.model_copy(update={"ms": ms}))})
        profile.save(path)
        done += 1
        say(f"{done} of {total}: {chain.copies} x {named(chain.hidden_size, chain.operator)}: {ms:.4g} ms")
    for architecture in unseen:
        ms = _measure(architecture, config, device, say)
        profile = profile.model_copy(update={"checked": (*profile.checked, _checked(architecture, ms))})
        profile.save(path)
        done += 1
        say(f"{done} of {total}: {architecture.hidden_size} wide {architecture.notation}: {ms:.4g} ms")
    profile = finish(profile)
    profile.save(path)
    return profile


def take_fingerprint(config: RunConfig, device: torch.device) -> Fingerprint:
    """What a profile taken now would hold for."""
    info, latency = describe(device), config.latency
    return Fingerprint(
        device=info.name,
        kind=info.kind,
        threads=torch.get_num_threads() if info.kind == "cpu" else 0,
        kernel_hash=kernel_hash(),
        protocol=VERSION,
        dtype=latency.dtype_on(info.kind),
        batch=latency.batch,
        tokens=latency.tokens,
        strata=latency.strata,
        vocab_size=config.space.vocab_size,
        meta_tokens=config.space.meta_tokens,
        versions=versions_here(info.driver),
    )


def _opened(path: Path, fingerprint: Fingerprint) -> LatencyProfile:
    if not path.exists():
        return LatencyProfile(fingerprint=fingerprint)
    profile = load_profile(path, complete=False)
    for name in Fingerprint.model_fields:
        taken, here = getattr(profile.fingerprint, name), getattr(fingerprint, name)
        if taken != here:
            raise ProfileUnfit(f"{path} was taken with {name} {taken}, here is {here}", "name another --out")
    return profile.model_copy(update={"error": None})


def sample_architectures(space: SearchSpace, count: int) -> list[Architecture]:
    """Different random architectures, so many or as many as the space has; the same ones each time."""
    rng, found = np.random.default_rng(0), dict[str, Architecture]()
    for genome in space.seed_genomes[: max(0, count)]:
        architecture = space.build(genome)
        found[architecture.id] = architecture
    for _ in range(TRIES):
        if len(found) >= count:
            break
        try:
            architecture = space.build(space.sample(rng))
        except InvalidArchitecture:
            continue
        found.setdefault(architecture.id, architecture)
    return list(found.values())


def _missing_chains(
    profile: LatencyProfile, config: RunConfig, operators: float
) -> Iterator[tuple[Chain, Architecture]]:
    """What has no chain yet, in two lengths; ``operators`` is the usual number of them in the space."""
    measured: dict[str, int] = {}
    for chain in profile.chains:
        name = key(chain.hidden_size, chain.operator)
        measured[name] = measured.get(name, 0) + 1
    width = getattr(torch, profile.fingerprint.dtype).itemsize
    for hidden in config.space.hidden_size:
        found = operators_of(config.space, hidden)
        sizes = [_bytes(operator, hidden, config, width) for operator in found]
        for operator, size in zip(found, sizes, strict=True):
            plain = dump_operator(operator)
            copies = math.ceil(operators * statistics.mean(sizes) / size / 1.5)
            copies = min(max(copies, FEWEST_COPIES), MOST_COPIES)
            for length in (copies, 2 * copies)[measured.get(key(hidden, plain), 0) :]:
                yield (
                    Chain(hidden_size=hidden, operator=plain, copies=length, ms=1),
                    _chain(config, hidden, plain, length),
                )


def _bytes(operator: OperatorConfig, hidden: int, config: RunConfig, width: int) -> int:
    """What a step moves for it."""
    state = operator.step_bytes(hidden, config.latency.tokens // 2 + config.space.meta_tokens, width)
    return (operator.parameters(hidden) + hidden) * width + config.latency.batch * state


def _chain(config: RunConfig, hidden: int, operator: dict[str, Any], copies: int) -> Architecture:
    return make_architecture(
        hidden_size=hidden,
        vocab_size=config.space.vocab_size,
        meta_tokens=config.space.meta_tokens,
        operators=[operator] * copies,
    )


def _checked(architecture: Architecture, ms: float) -> Checked:
    options = {}
    for operator in architecture.operators:
        plain = dump_operator(operator)
        options[plain.pop("kind")] = plain
    return Checked(
        hidden_size=architecture.hidden_size, operators=architecture.notation, options=options, measured_ms=ms
    )


def _told(checked: Checked) -> str:
    """What tells checked architectures apart."""
    return checked.model_dump_json(include={"hidden_size", "operators", "options"})


def _compile(config: RunConfig, device: torch.device, models: list[Architecture], say: Say) -> None:
    """One operator of each sort; kernels of whole architectures are the same."""
    dtype = config.latency.dtype_on(device.type)
    tasks: dict[str, Task] = {"what all measurements run": functools.partial(compile_shared, str(device))}
    for model in models:
        one = model.model_copy(update={"operators": model.operators[:1]})
        name = named(one.hidden_size, dump_operator(one.operators[0]))
        tasks[name] = functools.partial(
            compile_step, one, config.latency.batch, config.latency.tokens, str(device), dtype
        )
    say(f"compiling the kernels of {len(tasks) - 1} operators side by side")
    compile_side_by_side(tasks, say)


def _measure(architecture: Architecture, config: RunConfig, device: torch.device, say: Say) -> float:
    """Milliseconds a token."""
    waiting = lambda: say("another measurement has this device: waiting")  # noqa: E731
    return measure_decode(architecture, config.latency, device=device, on_wait=waiting).tpot_ms
