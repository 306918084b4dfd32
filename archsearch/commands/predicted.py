"""What ``inspect`` says of a run with a latency profile: how far its predictions were off what was measured."""

from __future__ import annotations

import statistics
from typing import Any

from archsearch.api import Results


def profile_json(results: Results) -> dict[str, Any] | None:
    """The profile's error over the candidates that were measured; None without a profile.

    ``errors`` are relative and signed, prediction over measurement - 1, by trial number.
    """
    found, errors = set(), {}
    for candidate in results.candidates:
        metrics = candidate.evaluation.metrics if candidate.evaluation is not None and candidate.is_distinct else {}
        if (predicted := metrics.get("latency_profile")) is None:
            continue
        found.add(predicted["id"])
        if (measured := metrics.get("latency")) is not None:
            errors[candidate.number] = predicted["seconds"] / measured["seconds"] - 1
    if not found:
        return None
    sizes = [abs(error) for error in errors.values()]
    return {
        "ids": sorted(found),
        "source": results.config.latency.source,
        "measured": len(errors),
        "median_error": statistics.median(sizes) if sizes else None,
        "worst_error": max(sizes, default=None),
        "errors": {str(number): error for number, error in errors.items()},
    }


def profile_lines(results: Results) -> list[str]:
    """The same as a sentence under the front."""
    found = profile_json(results)
    if found is None:
        return []
    name = f"latency profile {', '.join(found['ids'])}"
    if found["source"] == "profile":
        return [f"decode latency is predicted, not measured: {name}"]
    if not found["measured"]:
        return []
    return [
        f"{name}: off by {found['median_error']:.2%} in the median, {found['worst_error']:.2%} at worst, of "
        f"{found['measured']} measured candidates"
    ]
