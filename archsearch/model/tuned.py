"""Tuned configurations of Triton kernels, so that nothing is benchmarked while a candidate waits.

Triton's autotuner tries every configuration of a kernel at each new key; fla's keys hold widths, heads and
buckets of the token count, which a search varies, and each costs minutes. A file a device keeps what the
tuner once chose: kernel, key, configuration. At run time each tuner is offered the choice of the nearest
known key alone (``Choice``), and benchmarks nothing.

A kernel of which nothing is known is tuned once (``self_check`` sees to it at a size like training's), kept in this
device's own file (``remember``), and serves its likes from then on.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from triton.runtime import driver
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.autotuner import Autotuner

from archsearch.errors import ConfigError
from archsearch.files import write_atomic

FOLDER = Path(__file__).parent / "kernel_configs"
LIBRARIES = ("fla.", "mamba_ssm.")

MANY = 24
"""Configurations of a kernel from which on the unlikely ones are not tried."""

COMPILERS = 8
"""Compilations that a tuning process runs at a time."""

Key = tuple[Any, ...]
Kernels = dict[str, list[dict[str, Any]]]
"""By name of a kernel: entries of ``key`` and ``config``."""


class Choice:
    """Decides for one autotuner what it tries at a new key: the configuration that was best at the nearest known
    one, alone and therefore unmeasured; all of them where no known key is alike, or while tuning.

    Two keys are alike when they have the same length and differ in numbers only; the nearest is the one
    with the smallest sum of ``|log2(a / b)|`` over them. The library's own pruning always comes first: it
    excludes configurations that are known to be wrong at a shape.
    """

    tuning: ClassVar[bool] = False
    missed: ClassVar[set[str]] = set()
    """Kernels that had to be tuned because no choice was known."""

    def __init__(self, tuner: Autotuner, entries: list[dict[str, Any]]) -> None:
        self.tuner, self.library_prune, self.alone = tuner, tuner.prune_configs, False
        self.known: dict[Key, triton.Config] = {}
        for entry in entries:
            # one of the tuner's own, with its hooks; what another version chose and this one lacks is left out
            like = [config for config in tuner.configs if _plain(config) == entry["config"]]
            if like:
                self.known[tuple(entry["key"])] = like[0]

    def prune(self, kwargs: dict[str, Any]) -> list[triton.Config]:
        """The configurations to try with the arguments of this launch."""
        allowed: list[triton.Config] = self.library_prune(kwargs)
        if Choice.tuning:
            self.alone = False
            return _compiled(self.tuner, _worth_trying(allowed), kwargs)
        key, known = self._key(kwargs), {**self.known, **self.tuner.cache}
        near = ((_distance(key, other), at) for at, other in enumerate(known))
        choices = [list(known.values())[at] for distance, at in sorted(near) if distance < math.inf]
        found = (config for config in dict.fromkeys(choices) if config in allowed and self._fits(config, kwargs))
        best = next(found, None)
        self.alone = best is not None
        if best is not None:
            return [best]
        Choice.missed.add(self.tuner.base_fn.__name__)
        return _compiled(self.tuner, _worth_trying(allowed), kwargs)

    def _fits(self, config: triton.Config, kwargs: dict[str, Any]) -> bool:
        """Whether this device has the shared memory: what was best at a smaller shape may ask for too much here."""
        kernel = self.tuner.fn.run(**self.tuner.nargs, **{**kwargs, "warmup": True}, **config.all_kwargs())
        return bool(kernel.metadata.shared <= _shared_memory())

    def bench(self, call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        """Seconds of a kernel; one that is alone is the best, and not run for it."""
        if self.alone:
            return [0.0] * len(quantiles)
        with Path(tempfile.gettempdir(), "archsearch-tuning.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes that tune at the same time would disturb each other
            timings: list[float] = driver.active.get_benchmarker()(call, quantiles=quantiles, warmup=3, rep=15)
        return timings

    def _key(self, kwargs: dict[str, Any]) -> Key:
        """The tuner's own key of this launch."""
        given = {**self.tuner.nargs, **kwargs}
        given = {name: value for name, value in given.items() if name in self.tuner.arg_names}
        parts = [given[name] for name in self.tuner.keys if name in given]
        return *parts, *(str(value.dtype) for value in given.values() if hasattr(value, "dtype"))


def install() -> None:
    """Let ``Choice`` decide for every autotuner of the libraries' modules that are imported."""
    known = _known()
    for tuner in tuners():
        if "prune_configs" not in vars(tuner):
            tuner.cache_results &= not Choice.tuning  # what was measured before may have been disturbed
            choice = Choice(tuner, known.get(tuner.base_fn.__name__, []))
            tuner.prune_configs, tuner.do_bench = choice.prune, choice.bench


def _worth_trying(configs: list[triton.Config]) -> list[triton.Config]:
    """All of a few; of many only those with several warps and less than four stages, which are best nearly always."""
    likely = [config for config in configs if config.num_warps > 1 and config.num_stages < 4]
    return likely if len(configs) > MANY and likely else configs


@functools.cache
def _shared_memory() -> int:
    """Bytes of shared memory that a kernel may ask of this device."""
    device = driver.active.get_current_device()
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _compiled(tuner: Autotuner, configs: list[triton.Config], kwargs: dict[str, Any]) -> list[triton.Config]:
    """``configs``, compiled side by side: the tuner itself would compile one after the other."""
    with ThreadPoolExecutor(COMPILERS) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for config in configs:
            tuner.fn.run(**tuner.nargs, **{**kwargs, "warmup": True}, **config.all_kwargs())
    return configs


def tuners() -> Iterator[Autotuner]:
    """The autotuners of the libraries' modules that are imported, each once."""
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        if not name.startswith(LIBRARIES):
            continue
        for value in list(vars(module).values()):
            while value is not None and not isinstance(value, Autotuner):
                value = vars(value).get("fn") if type(value).__module__.startswith("triton.") else None
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                yield value


def chosen() -> Kernels:
    """What the tuners hold now, as plain data."""
    found: Kernels = {}
    for tuner in tuners():
        entries = [{"key": list(key), "config": _plain(config)} for key, config in tuner.cache.items()]
        if entries:
            found.setdefault(tuner.base_fn.__name__, []).extend(entries)
    return found


def write(path: Path, kernels: Kernels) -> None:
    """Write a file of configurations for this device; of entries with the same kernel and key the last is kept."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "fla-core")}
    about = {"device": torch.cuda.get_device_name(), "versions": versions}
    blocks = []
    for name, entries in sorted(kernels.items()):
        last = {json.dumps(entry["key"]): json.dumps(entry) for entry in entries}
        blocks.append(f"  {json.dumps(name)}: [\n   " + ",\n   ".join(last.values()) + "\n  ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(about)[:-1] + ', "kernels": {\n' + ",\n".join(blocks) + "\n}}\n")


def remember() -> None:
    """Keep in ``own_file`` what had to be tuned in this process, so that no later one tunes it again."""
    if not Choice.missed:
        return
    path = own_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernels = _read(path) if path.exists() else {}
        for name, entries in chosen().items():
            if name in Choice.missed:
                kernels.setdefault(name, []).extend(entries)
        write(path, kernels)
    Choice.missed.clear()


def own_file() -> Path:
    """Where ``archsearch doctor --tune`` keeps the configurations of this very device."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "archsearch", "kernels", f"{name}.json")


def known_files() -> list[Path]:
    """The files that serve this device: the shipped one of its architecture, then its own, which goes before."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [path for path in (FOLDER / f"sm{major}{minor}.json", own_file()) if path.exists()]


@functools.cache
def _known() -> Kernels:
    found: Kernels = {}
    for path in known_files():
        for name, entries in _read(path).items():
            found.setdefault(name, []).extend(entries)
    return found


def _read(path: Path) -> Kernels:
    try:
        kernels: Kernels = json.loads(path.read_text())["kernels"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no kernel configurations: {error}", "remove it") from error
    return kernels


def _plain(config: triton.Config) -> dict[str, Any]:
    return {"kwargs": config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def _distance(a: Key, b: Key) -> float:
    """How far two keys are apart; infinite where more than numbers differs."""
    if len(a) != len(b):
        return math.inf
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x == y:
            continue
        numbers = all(isinstance(part, int | float) and not isinstance(part, bool) and part > 0 for part in (x, y))
        if not numbers:
            return math.inf
        total += abs(math.log2(x / y))
    return total
