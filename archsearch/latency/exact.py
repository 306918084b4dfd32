"""The definition of decode latency, three times: every token decoded, each time in a fresh process.

What differs between processes (placement in memory, above all) is usually more than what differs within one. The same
processes also measure by strata, so the short measurement of the search is held against the definition.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from archsearch.architecture import Architecture
from archsearch.config import LatencyConfig
from archsearch.errors import ArchsearchError, EnvironmentUnfit
from archsearch.latency.decode import measure_decode
from archsearch.latency.device import DoesNotFit
from archsearch.latency.result import DecodeLatency
from archsearch.latency.validity import InvalidMeasurement
from archsearch.schema import Frozen

PROCESSES = 3
ALARM = 0.01
"""Relative spread, or error of the strata, above which a note says so."""
_ERRORS: dict[str, type[ArchsearchError]] = {
    kind.__name__: kind for kind in (DoesNotFit, InvalidMeasurement, EnvironmentUnfit)
}


class Exact(Frozen):
    """Full runs in fresh processes.

    Attributes:
        seconds: to decode all tokens: the median of the processes.
        tpot_ms: milliseconds a token.
        spread: (slowest - fastest) / median.
        strata_error: the largest |strata - full| / full of one process.
        runs: what each process found.
    """

    seconds: float
    tpot_ms: float
    spread: float
    strata_error: float
    runs: tuple[DecodeLatency, ...]
    notes: tuple[str, ...]


def measure_exact(architecture: Architecture, config: LatencyConfig, device: str, processes: int = PROCESSES) -> Exact:
    """Decode ``config.tokens`` tokens in each of ``processes`` fresh processes, one after the other.

    Raises:
        DoesNotFit, InvalidMeasurement, EnvironmentUnfit: what a process met.
    """
    runs = tuple(_fresh(architecture, config, device) for _ in range(processes))
    taken = [run.full.seconds for run in runs if run.full is not None]
    seconds, error = statistics.median(taken), max(run.full.strata_error for run in runs if run.full is not None)
    spread = (max(taken) - min(taken)) / seconds
    notes = []
    if spread > ALARM:
        notes.append(f"the processes differ by {spread:.1%}")
    if error > ALARM:
        notes.append(f"the strata are {error:.1%} off the full run")
    return Exact(
        seconds=seconds,
        tpot_ms=1e3 * seconds / config.tokens,
        spread=spread,
        strata_error=error,
        runs=runs,
        notes=tuple(notes),
    )


def _fresh(architecture: Architecture, config: LatencyConfig, device: str) -> DecodeLatency:
    request = {"architecture": architecture.to_dict(), "config": config.model_dump(mode="json"), "device": device}
    done = subprocess.run(
        [sys.executable, "-m", "archsearch.latency.exact"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return DecodeLatency.model_validate_json(done.stdout.strip().splitlines()[-1])
    raise _error(done.stdout, done.returncode, done.stderr)


def _error(stdout: str, code: int, stderr: str) -> ArchsearchError:
    try:
        told = json.loads(stdout)
        return _ERRORS.get(told["error"], EnvironmentUnfit)(told["cause"], told["remedy"])
    except (json.JSONDecodeError, KeyError, TypeError):
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        return EnvironmentUnfit(f"a measuring process ended with code {code}: {last}", "see `archsearch doctor`")


def main() -> int:
    """One process: a request on stdin, a ``DecodeLatency`` or an error on stdout."""
    request: dict[str, Any] = json.load(sys.stdin)
    architecture = Architecture.model_validate(request["architecture"])
    config = LatencyConfig.model_validate(request["config"])
    try:
        print(measure_decode(architecture, config, device=request["device"], full=True).model_dump_json())
    except ArchsearchError as error:
        print(json.dumps({"error": _name(error), "cause": error.cause, "remedy": error.remedy}))
        return error.exit_code
    return 0


def _name(error: ArchsearchError) -> str:
    """The most special of the kinds that the other side knows."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS), "")


if __name__ == "__main__":
    sys.exit(main())
