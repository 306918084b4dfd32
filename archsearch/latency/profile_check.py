"""Whether a latency profile may stand for measurements here. The driver of a search asks, so no torch is loaded."""

from __future__ import annotations

import logging

from archsearch.config import RunConfig
from archsearch.environment import cpu_name, find_gpus
from archsearch.latency.protocol import VERSION, kernel_hash
from archsearch.latency_profile import load_profile

log = logging.getLogger(__name__)


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
    profile.check_space(config.space)
    profile.check_settings(config.latency, kernel_hash(), VERSION)
    gpus = [] if config.execution.device == "cpu" else find_gpus()
    if config.execution.address is not None or (not gpus and config.execution.device == "cuda"):
        return
    names = [gpu.name for gpu in gpus] or [cpu_name()]
    profile.check_device(profile.fingerprint.device if profile.fingerprint.device in names else names[0])
    for difference in profile.version_differences(gpus[0].driver if gpus else ""):
        log.warning("%s was measured with %s: measure it again where that may matter", profile.name, difference)
