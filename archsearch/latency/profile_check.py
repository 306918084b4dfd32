"""Whether a latency profile may stand for measurements here. The driver of a search asks, so no torch is loaded."""

from __future__ import annotations

import logging
from typing import Any

from archsearch.architecture import dump_operator
from archsearch.config import LatencyConfig, RunConfig
from archsearch.environment import cpu_name, find_gpus, package_version
from archsearch.latency.protocol import VERSION, kernel_hash
from archsearch.latency_profile import AGAIN, LatencyProfile, ProfileUnfit, load_profile, named, operators_of
from archsearch.space import SearchSpace

log = logging.getLogger(__name__)
NAMED = 3
"""Missing operators that an error names."""


def prepare_profile(config: RunConfig) -> None:
    """Check the latency profile that a run is told to use, before the first candidate asks for it.

    The device is that of this machine; on a cluster, and where NVML does not answer, the workers check theirs.

    Raises:
        ConfigError: there is no such file, or it is damaged.
        ProfileUnfit: it is of another device, other kernels or settings, or it lacks an operator of the space.
    """
    if config.latency.profile is None:
        return
    profile = load_profile(config.latency.profile)
    check_space(profile, config.space)
    check_settings(profile, config.latency)
    gpus = [] if config.execution.device == "cpu" else find_gpus()
    if config.execution.address is not None or (not gpus and config.execution.device == "cuda"):
        return
    names = [gpu.name for gpu in gpus] or [cpu_name()]
    check_device(profile, profile.fingerprint.device if profile.fingerprint.device in names else names[0])
    taken = profile.fingerprint.versions
    for name, version in versions_here(gpus[0].driver if gpus else "").items():
        if taken.get(name) != version:
            text = "%s was measured with %s %s, here is %s: measure it again where that may matter"
            log.warning(text, profile.name, name, taken.get(name), version)


def check_space(profile: LatencyProfile, space: SearchSpace) -> None:
    """Raise ProfileUnfit where ``profile`` does not speak of all that ``space`` can choose."""
    missing = [
        named(width, operator)
        for width in space.hidden_size
        for operator in (None, *map(dump_operator, operators_of(space, width)))
        if not profile.holds(width, operator)
    ]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        cause = f"the latency profile lacks {', '.join(missing[:NAMED])}{more} of the space {space.name}"
        raise ProfileUnfit(cause, "run `archsearch profile` with this space and the same --out: it adds them")
    _check(profile, {"vocab_size": space.vocab_size, "meta_tokens": space.meta_tokens})


def check_settings(profile: LatencyProfile, latency: LatencyConfig) -> None:
    """Raise ProfileUnfit where it was taken with other settings, kernels or rules."""
    wanted: dict[str, Any] = {name: getattr(latency, name) for name in ("batch", "tokens", "strata")}
    wanted |= {"dtype": latency.dtype_on(profile.fingerprint.kind)}
    _check(profile, wanted | {"kernel_hash": kernel_hash(), "protocol": VERSION})


def check_device(profile: LatencyProfile, name: str, threads: int | None = None) -> None:
    """Raise ProfileUnfit where it was taken on another device, or with another number of CPU threads."""
    counted = threads is not None and profile.fingerprint.kind == "cpu"
    _check(profile, {"device": name} | ({"threads": threads} if counted else {}))


def _check(profile: LatencyProfile, here: dict[str, Any]) -> None:
    for name, value in here.items():
        taken = getattr(profile.fingerprint, name)
        if taken != value:
            what = name.replace("_", " ")
            raise ProfileUnfit(f"the latency profile was taken with {what} {taken}, here is {value}", AGAIN)


def versions_here(driver: str) -> dict[str, str]:
    """What a device's speed depends on besides itself and our kernels; ``driver`` is empty on a CPU."""
    return {"driver": driver} | {name: package_version(name) or "" for name in ("torch", "triton")}
