"""Timing decode steps: where, how long, from when on, and what the samples add up to."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from archsearch.config import LatencyConfig
from archsearch.latency.runtime import Runtime
from archsearch.latency.samples import summarize

GROUP = 8
"""Replays between two events on a GPU: one event a step would be a part of what it times."""
RESAMPLES = 1000
BUDGET = 60.0
"""Seconds after which no further pass over the strata begins."""
MOST_TURNS = 3
"""Passes at most, as a multiple of those asked for, while other processes disturb."""
OWN_SHARE = 0.97
"""Share of a step's wall clock that the core must have spent on it, or the step was interrupted."""
FEWEST = 3
"""Samples below which a median or its interval is not taken."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Equal strata of positions; ``steps`` advancing steps are timed in the middle of each.

    Attributes:
        starts: tokens in the cache before the first timed step of each stratum.
        steps: timed steps a stratum and pass.
        width: tokens a stratum stands for.
    """

    starts: tuple[int, ...]
    steps: int
    width: float

    @property
    def middles(self) -> tuple[int, ...]:
        """Tokens in the cache in the middle of each stratum's steps."""
        return tuple(start + self.steps // 2 for start in self.starts)


def make_plan(config: LatencyConfig) -> Plan:
    """The strata of ``config``; never more steps than there are tokens, so a short run times each step once a pass."""
    count = min(config.strata, config.tokens)
    width = config.tokens / count
    steps = min(config.steps, int(width))
    starts = tuple(int(index * width + (width - steps) / 2) for index in range(count))
    return Plan(starts, steps, width)


def fitted(plan: Plan, step_seconds: float) -> Plan:
    """``plan`` with so many steps a stratum that a pass stays within a third of ``BUDGET``; one at least."""
    most = int(BUDGET / 3 / (step_seconds * len(plan.starts)))
    if plan.steps <= most:
        return plan
    steps = max(1, most)
    starts = tuple(middle - steps // 2 for middle in plan.middles)
    return Plan(starts, steps, plan.width)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive timed steps: seconds of each, and the share of them that the CPU spent on this thread."""

    seconds: list[float]
    shares: list[float]


def time_steps(runtime: Runtime, start: int, steps: int) -> Run:
    """Time ``steps`` advancing steps from ``start`` tokens on: each on a CPU, groups of ``GROUP`` on a GPU."""
    runtime.seek(start)
    runtime.step()  # On a GPU the next steps queue up behind this one, so no launch is waited for.
    runtime.seek(start)
    timed = _time_on_gpu if runtime.token.is_cuda else _time_on_cpu
    return timed(runtime, steps)


def _time_on_cpu(runtime: Runtime, steps: int) -> Run:
    marks = [(time.perf_counter(), time.thread_time())]
    for _ in range(steps):
        runtime.step()
        marks.append((time.perf_counter(), time.thread_time()))
    wall, cpu = np.diff(marks, axis=0).T
    # Several threads share the work and wait for each other: the share of one of them says nothing.
    shares = cpu / wall if torch.get_num_threads() == 1 else np.ones(steps)
    return Run(wall.tolist(), shares.tolist())


def _time_on_gpu(runtime: Runtime, steps: int) -> Run:
    groups = [min(GROUP, steps - first) for first in range(0, steps, GROUP)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(groups) + 1)]
    events[0].record()
    for event, group in zip(events[1:], groups, strict=True):
        for _ in range(group):
            runtime.step()
        event.record()
    events[-1].synchronize()
    seconds = [events[i].elapsed_time(events[i + 1]) / 1e3 / group for i, group in enumerate(groups)]
    return Run(seconds, [1.0] * len(groups))


STRETCH = 512
"""Steps between two events of a run over all tokens."""


def time_all(runtime: Runtime, tokens: int) -> tuple[list[tuple[int, float]], float]:
    """Decode ``tokens`` tokens from the start: (steps, seconds) of each stretch, and seconds by the wall clock."""
    runtime.begin()
    runtime.step()
    runtime.begin()
    stretches = [min(STRETCH, tokens - first) for first in range(0, tokens, STRETCH)]
    cuda = runtime.token.is_cuda
    if cuda:
        torch.cuda.synchronize()
    begun, marks = time.perf_counter(), [_mark(cuda)]
    for stretch in stretches:
        for _ in range(stretch):
            runtime.step()
        marks.append(_mark(cuda))
    if cuda:
        torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    return [
        (stretch, _between(*pair)) for stretch, pair in zip(stretches, itertools.pairwise(marks), strict=True)
    ], wall


def _mark(cuda: bool) -> Any:
    """A moment: an event on a GPU, seconds on a CPU."""
    if not cuda:
        # One thread: what its core spent on it, as other processes may have had the core in between.
        return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    return float(end - start)


def undisturbed(runs: Sequence[Run]) -> npt.NDArray[np.float64]:
    """Seconds a step, those aside during which the kernel gave the core to another process.

    Such a step times the scheduler. Where fewer than ``FEWEST`` are left (a machine that busy, or steps that
    long), the time that the core itself spent on each step stands in for the wall clock.
    """
    seconds = np.concatenate([run.seconds for run in runs])
    shares = np.concatenate([run.shares for run in runs])
    kept = seconds[shares >= OWN_SHARE]
    return kept if len(kept) >= min(FEWEST, len(seconds)) else seconds * shares


def warm_up(runtime: Runtime, plan: Plan) -> bool:
    """Step in the middle stratum until two runs in a row agree; False where they never do in time.

    A GPU raises its clocks for about half a second, and then agrees within 1 %; a CPU shared with others
    is content with 5 %.
    """
    shortest, longest, tolerance = (0.5, 5.0, 0.01) if runtime.token.is_cuda else (0.0, 0.5, 0.05)
    start = plan.starts[len(plan.starts) // 2]
    begun = time.perf_counter()
    before = 0.0
    while (elapsed := time.perf_counter() - begun) < longest or before == 0.0:
        now = float(np.median(undisturbed([time_steps(runtime, start, plan.steps)])))
        if elapsed >= shortest and abs(now - before) <= tolerance * now:
            return True
        before = now
    return False


def time_strata(
    runtime: Runtime, plan: Plan, repeats: int, between: Callable[[], None] = lambda: None
) -> list[list[Run]]:
    """Runs of each stratum: ``repeats`` passes over all strata, more while the result is not sure enough.

    That is, on a GPU, until the interval of the median is narrow; on a CPU, until enough steps were undisturbed.
    The passes are what spreads a disturbance over the strata. ``between`` is called after each; ends early when
    ``BUDGET`` is spent.
    """
    sure = _narrow if runtime.token.is_cuda else _undisturbed
    runs: list[list[Run]] = [[] for _ in plan.starts]
    end = time.perf_counter() + BUDGET
    for turn in range(MOST_TURNS * repeats):
        if turn and time.perf_counter() > end:
            break
        if turn >= repeats and sure(runs, repeats):
            break
        for start, stratum in zip(plan.starts, runs, strict=True):
            stratum.append(time_steps(runtime, start, plan.steps))
        between()
    return runs


def _narrow(runs: Sequence[Sequence[Run]], repeats: int) -> bool:
    return summarize([undisturbed(stratum) for stratum in runs], 0).narrow


def _undisturbed(runs: Sequence[Sequence[Run]], repeats: int) -> bool:
    return all(_enough(stratum, repeats) for stratum in runs)


def _enough(stratum: Sequence[Run], repeats: int) -> bool:
    """Whether half of the steps asked for were undisturbed."""
    wanted = repeats * len(stratum[0].shares) / 2
    return sum(share >= OWN_SHARE for run in stratum for share in run.shares) >= wanted


def interrupted(runs: Sequence[Sequence[Run]]) -> float:
    """Share of the timed steps during which another process had the core."""
    shares = [share for stratum in runs for run in stratum for share in run.shares]
    return sum(share < OWN_SHARE for share in shares) / len(shares)


def integrate(samples: Sequence[npt.NDArray[np.float64]], width: float) -> tuple[float, tuple[float, float] | None]:
    """Seconds to decode all strata, and their 95 % interval.

    Each stratum counts ``width`` times its median step time. The interval is a percentile bootstrap over
    the samples inside each stratum, so it covers their scatter, not a drift of the whole machine; there is
    none where a stratum has fewer than ``FEWEST`` samples.

    Args:
        samples: seconds a step, for each stratum.
        width: tokens a stratum stands for.
    """
    seconds = width * sum(float(np.median(stratum)) for stratum in samples)
    if min(len(stratum) for stratum in samples) < FEWEST:
        return seconds, None
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(stratum, size=(RESAMPLES, len(stratum))), axis=1) for stratum in samples]
    low, high = np.quantile(width * np.sum(medians, axis=0), [0.025, 0.975])
    return seconds, (float(low), float(high))
