"""What ``inspect`` says beside the numbers: how sure they are, and what early stopping saved."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

from archsearch.api import Results

if TYPE_CHECKING:
    from archsearch.search.rungs import Savings
    from archsearch.search.study import Candidate

REPLICATED = "other seeds"
TIED = "loss as"


def certainty_columns(results: Results) -> list[str]:
    """Columns of the front that there is something for."""
    columns = [REPLICATED] if results.replicates else []
    return [*columns, TIED] if tied(results) else columns


def certainty_cells(results: Results, candidate: Candidate, columns: list[str]) -> list[str]:
    """Mean, deviation and number of the replicates' losses; neighbours that seed noise cannot tell apart."""
    cells = []
    if REPLICATED in columns:
        cells.append(_replicated(results, candidate))
    if TIED in columns:
        cells.append(" ".join(str(number) for number in tied(results).get(candidate.number, [])))
    return cells


def _replicated(results: Results, candidate: Candidate) -> str:
    found = results.replicates.get(candidate.number)
    mean = found.mean("loss") if found else None
    if found is None or mean is None:
        return ""
    spread = found.std("loss")
    return f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "") + f" ({len(found.values('loss'))})"


def tied(results: Results) -> dict[int, list[int]]:
    """Trial of the front to the neighbours by loss that seed noise cannot tell from it.

    Where all the front has replicates their means are compared, which were not chosen for being low.
    """
    from archsearch.search.noise import ties

    if results.noise is None or "loss" not in results.config.search.objectives:
        return {}
    losses = {c.number: [c.evaluation.objectives["loss"]] for c in results.front if c.evaluation is not None}
    again = {number: found.values("loss") for number, found in results.replicates.items() if number in losses}
    return ties(again if all(again.get(number) for number in losses) else losses, results.noise)


def beaten(results: Results) -> dict[int, list[int]]:
    """Trial of the front to those that its replicates say beat it: a mean loss clearly lower, and nothing worse.

    "Clearly" as in ``tied``. A trial may stand on the front because one seed was kind to it.
    """
    if results.noise is None or "loss" not in results.config.search.objectives:
        return {}
    losses = {number: found.values("loss") for number, found in results.replicates.items()}
    members = [candidate for candidate in results.front if losses.get(candidate.number)]
    found: dict[int, list[int]] = {}
    for worse, better in permutations(members, 2):
        if results.noise.tells(losses[better.number], losses[worse.number]) and _no_worse(better, worse):
            found.setdefault(worse.number, []).append(better.number)
    return found


def _no_worse(candidate: Candidate, than: Candidate) -> bool:
    """In every objective but the loss."""
    if candidate.evaluation is None or than.evaluation is None:
        return False
    mine, other = candidate.evaluation.objectives, than.evaluation.objectives
    return all(mine[name] <= other[name] for name in mine if name != "loss")


def certainty_json(results: Results, candidate: Candidate) -> dict[str, Any]:
    """The same as plain data, for one candidate of the front."""
    found = results.replicates.get(candidate.number)
    replicates = {
        name: {"mean": found.mean(name), "std": found.std(name), "values": found.values(name)}
        for name in results.config.search.objectives
        if found is not None and found.evaluations and name in ("loss", "recall")
    }
    return {
        "replicates": replicates,
        "indistinguishable": tied(results).get(candidate.number, []),
        "beaten_by": beaten(results).get(candidate.number, []),
    }


def certainty_lines(results: Results) -> list[str]:
    """Sentences under the front."""
    lines = []
    if (noise := results.noise) is not None:
        lines.append(
            f"seed noise {noise.std:.4f} nats (95 % from {noise.low:.4f} to {noise.high:.4f}; {noise.source}): "
            f"two trainings differ from {noise.difference():.4f} on"
        )
    for number, others in beaten(results).items():
        names = ", ".join(map(str, others))
        lines.append(f"trial {number} owes its place to its seed: others put {names} ahead, no worse otherwise")
    if (saved := _savings(results)) is not None:
        at = ", ".join(f"{count} at {tokens:,}" for tokens, count in saved.stopped.items())
        lines.append(
            f"rungs: stopped {at} tokens; {saved.trained:,} tokens trained instead of {saved.without:,}, "
            f"{saved.share:.0%} saved"
        )
    return lines


def rungs_json(results: Results) -> dict[str, Any] | None:
    """What the rungs saved, as plain data."""
    saved = _savings(results)
    if saved is None:
        return None
    stopped = {str(tokens): count for tokens, count in saved.stopped.items()}
    return {"stopped": stopped, "tokens": saved.trained, "tokens_without": saved.without, "saved": saved.share}


def _savings(results: Results) -> Savings | None:
    from archsearch.search.rungs import savings

    return savings(results.config, results.candidates)
