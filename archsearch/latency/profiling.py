"""Measures the latency profile of a device: chains of equal operators, then whole architectures.

What one more operator costs is seen in models of N and of 2 N copies of it, measured as any other model is, with all
proofs of the protocol. N is such that the two lie around the size of the space's models: models that are small
against the GPU's cache run by other rules than large ones.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from archsearch.architecture import Architecture, dump_operator
from archsearch.config import RunConfig
from archsearch.errors import ConfigError, InvalidArchitecture
from archsearch.latency.compiling import Task, compile_shared, compile_side_by_side, compile_step
from archsearch.latency.decode import measure_decode
from archsearch.latency.device import describe
from archsearch.latency.profile_check import versions_here
from archsearch.latency.profile_fit import chain_model, finish
from archsearch.latency.protocol import VERSION, kernel_hash
from archsearch.latency.validity import Disturbed
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
)
from archsearch.operators import OperatorConfig
from archsearch.space import SearchSpace

Say = Callable[[str], None]
FEWEST_COPIES, MOST_COPIES = 4, 48
MOST_PUT_OFF = 5
"""Disturbed measurements that are tried once more at the end."""
TRIES = 20_000
"""Genomes drawn to find architectures to check with."""


def measure_profile(config: RunConfig, path: Path, device: torch.device, checks: int, say: Say) -> LatencyProfile:
    """Measure what the profile in ``path`` lacks for the space of ``config``, and write it.

    It is written after each measurement, so a run that was ended goes on where it was.

    Args:
        config: its space and latency settings count.
        path: a file that is there is completed if it is of this device and these settings.
        device: where to measure.
        checks: whole architectures to measure; half of them are held out.
        say: told what is done.

    Raises:
        ProfileUnfit: the file there is of another device, other kernels or settings.
        ConfigError: the file there is damaged.
        ArchsearchError: as ``measure_decode`` does.
    """
    profile = _opened(path, take_fingerprint(config, device))
    tasks = _missing(profile, config, checks)
    if device.type == "cuda" and tasks:
        _compile(config, device, [task.model for task in tasks if task.chain is not None], say)
    waiting, put_off = deque(tasks), set[_Task]()
    while waiting:
        task = waiting.popleft()
        try:
            ms = _measure(task.model, config, device, say)
        except Disturbed as error:
            # What disturbed may be gone by then; what disturbs all the time ends it.
            if task in put_off or len(put_off) >= MOST_PUT_OFF:
                raise
            put_off.add(task)
            waiting.append(task)
            say(f"put off: {error.cause}")
            continue
        profile = task.kept(profile, ms)
        profile.save(path)
        say(f"{len(tasks) - len(waiting)} of {len(tasks)}: {task.name}: {ms:.4g} ms")
    profile = finish(profile)
    profile.save(path)
    return profile


@dataclass(frozen=True)
class _Task:
    """One measurement: of a chain, or of a whole architecture."""

    model: Architecture
    chain: Chain | None = None

    @property
    def name(self) -> str:
        if self.chain is None:
            return f"{self.model.hidden_size} wide {self.model.notation}"
        return f"{self.chain.copies} x {named(self.chain.hidden_size, self.chain.operator)}"

    def __hash__(self) -> int:
        return hash(self.model.id)

    def kept(self, profile: LatencyProfile, ms: float) -> LatencyProfile:
        """``profile`` with its result."""
        if self.chain is None:
            return profile.model_copy(update={"checked": (*profile.checked, _checked(self.model, ms))})
        return profile.model_copy(update={"chains": (*profile.chains, self.chain.model_copy(update={"ms": ms}))})


def _missing(profile: LatencyProfile, config: RunConfig, checks: int) -> list[_Task]:
    """What is to be measured: chains first, so that a run that is ended early has what a table needs."""
    sample = sample_architectures(config.space, checks)
    usual = statistics.median(len(architecture.operators) for architecture in sample)
    known = {_told(one) for one in profile.checked}
    unseen = [_Task(architecture) for architecture in sample if _told(_checked(architecture, 1.0)) not in known]
    return [*_missing_chains(profile, config, usual), *unseen]


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
    """Different random architectures, so many or as many as are found; the same ones each time.

    Raises:
        ConfigError: none is found.
    """
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
    if not found:
        space.check_feasible()  # tells what stands against the last one it tried
        raise ConfigError(f"no feasible architecture of {space.name} in {TRIES:,} draws", "widen it or its limits")
    return list(found.values())


def _missing_chains(profile: LatencyProfile, config: RunConfig, usual: float) -> Iterator[_Task]:
    """Two lengths of each operator; ``usual`` is the number of operators in the space's architectures."""
    measured: dict[str, set[int]] = {}
    for chain in profile.chains:
        measured.setdefault(key(chain.hidden_size, chain.operator), set()).add(chain.copies)
    width = getattr(torch, profile.fingerprint.dtype).itemsize
    for hidden in config.space.hidden_size:
        found = operators_of(config.space, hidden)
        sizes = [_bytes(operator, hidden, config, width) for operator in found]
        for operator, size in zip(found, sizes, strict=True):
            plain = dump_operator(operator)
            lengths = measured.get(key(hidden, plain), set())
            copies = math.ceil(usual * statistics.mean(sizes) / size / 1.5)
            copies = min(max(copies, FEWEST_COPIES), MOST_COPIES)
            for length in (copies, 2 * copies) if len(lengths) < 2 else ():
                if length not in lengths:
                    chain = Chain(hidden_size=hidden, operator=plain, copies=length, ms=1)
                    yield _Task(chain_model(chain, profile), chain)


def _bytes(operator: OperatorConfig, hidden: int, config: RunConfig, width: int) -> int:
    """What a step moves for it."""
    state = operator.step_bytes(hidden, config.latency.tokens // 2 + config.space.meta_tokens, width)
    return (operator.parameters(hidden) + hidden) * width + config.latency.batch * state


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
