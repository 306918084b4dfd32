"""The command that measures this device's latency profile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from archsearch.commands.console import print_json, say
from archsearch.config import RunConfig
from archsearch.errors import StorageError, UsageError
from archsearch.latency_profile import LatencyProfile, named

FOLDER = Path("latency_profiles")
FEWEST_CHECKS = 3


def start(config: RunConfig, out: Path | None, *, checks: int, device: str, json: bool) -> None:
    """Measure what is missing, write the file, print table and error.

    Args:
        config: its space and latency settings count.
        out: the file; ``latency_profiles/DEVICE-SPACE.json`` if absent.
        checks: whole architectures to measure.
        device: as for ``resolve_device``.
        json: print one JSON object.

    Raises:
        ArchsearchError: as ``measure_profile`` does.
    """
    if checks < FEWEST_CHECKS:
        raise UsageError(f"--check {checks}", f"give {FEWEST_CHECKS} or more: a profile states how far it is off")
    from archsearch.latency.device import device_name
    from archsearch.latency.profiling import measure_profile
    from archsearch.latency.validity import InvalidMeasurement
    from archsearch.worker import prepare_device

    place = prepare_device(device)
    path = out or FOLDER / f"{_slug(device_name(place))}-{_slug(config.space.name)}.json"
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "give --out the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {path.parent}: {error.strerror}", "choose another --out") from error
    say(f"latency profile: {path}")
    try:
        profile = measure_profile(config, path, place, checks, say)
    except (KeyboardInterrupt, InvalidMeasurement):
        if path.is_file():
            say(f"go on with the same command: {path} keeps what was measured")
        raise
    if json:
        print_json("profile", {"path": str(path), "id": profile.id, **_summary(profile)})
    else:
        print(*lines(profile), sep="\n")


def _summary(profile: LatencyProfile) -> dict[str, Any]:
    return profile.model_dump(mode="json", exclude={"schema_version", "chains"})


def lines(profile: LatencyProfile) -> list[str]:
    """A profile as text: its device, its table, its error."""
    about, error = profile.fingerprint, profile.error
    found = [
        f"{about.device}, {about.dtype}, batch {about.batch}, {about.tokens:,} tokens, kernels {about.kernel_hash}",
        *(f"{entry.us:10.2f} us  {named(entry.hidden_size, entry.operator)}" for entry in profile.table),
    ]
    if error is not None:
        rank = "" if error.spearman is None else f", Spearman {error.spearman:.4f}"
        found.append(
            f"error on {error.architectures} held-out architectures: median {error.median:.2%}, worst "
            f"{error.worst:.2%}{rank}; from chains alone {error.chains_alone:.2%}"
        )
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
