"""From measured chains to costs of operators, and from measured architectures to a correction and its error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from archsearch.architecture import Architecture, make_architecture
from archsearch.latency_profile import Chain, Checked, Correction, Entry, LatencyProfile, ProfileError

Floats = npt.NDArray[np.float64]
FIT_EVERY = 3
"""One in so many measured architectures is for the correction, the others are held out."""
FEWEST = 9
"""Architectures below which nothing is fitted, and all are held out."""
TERMS: tuple[tuple[str, ...], ...] = ((), ("scale",), ("scale", "constant_us"), ("scale", "operator_us"))
"""Corrections to choose from, the simplest first."""
PAYS = 0.9
"""A correction with more terms must cut the error of architectures left out to this share."""


def finish(profile: LatencyProfile) -> LatencyProfile:
    """``profile`` with table, correction and error from what it holds of measurements."""
    table = fit_table(profile.chains)
    additive = profile.model_copy(update={"table": table, "correction": Correction()})
    architectures = [rebuilt(checked, profile) for checked in profile.checked]
    fitted = [index % FIT_EVERY == 0 and len(architectures) >= FEWEST for index in range(len(architectures))]
    rows = np.array([[*additive.parts(a), len(a.operators)] for a in architectures]).reshape(-1, 3)
    measured = np.array([1e3 * checked.measured_ms for checked in profile.checked])
    correction = fit_correction(rows[fitted], measured[fitted])
    corrected = additive.model_copy(update={"correction": correction})
    checked = tuple(
        one.model_copy(update={"predicted_ms": corrected.ms(architecture), "fitted": used})
        for one, architecture, used in zip(profile.checked, architectures, fitted, strict=True)
    )
    held = ~np.array(fitted, dtype=bool)
    error = _error(
        np.array([1e3 * (one.predicted_ms or 0.0) for one in checked])[held], rows[held, :2].sum(1), measured[held]
    )
    error = error.model_copy(update={"chains": chain_error(additive)})
    return corrected.model_copy(update={"checked": checked, "error": error})


def fit_table(chains: Sequence[Chain]) -> tuple[Entry, ...]:
    """Costs that explain the chains of each width best: step = head + copies x cost, none of them negative.

    All chains of a width share its head, and relative errors count, so that fast operators weigh as much as slow ones.
    """
    entries: list[Entry] = []
    for width in sorted({chain.hidden_size for chain in chains}):
        rows = [chain for chain in chains if chain.hidden_size == width]
        names = list(dict.fromkeys(_text(chain.operator) for chain in rows))
        design = np.zeros((len(rows), 1 + len(names)))
        design[:, 0] = 1
        for row, chain in zip(design, rows, strict=True):
            row[1 + names.index(_text(chain.operator))] = chain.copies
        us = np.array([1e3 * chain.ms for chain in rows])
        costs, _ = nnls(design / us[:, None], np.ones(len(us)))
        operators = [None, *(json.loads(name) for name in names)]
        entries += [
            Entry(hidden_size=width, operator=operator, us=float(cost))
            for operator, cost in zip(operators, costs, strict=True)
        ]
    return tuple(entries)


def fit_correction(rows: Floats, measured: Floats) -> Correction:
    """The correction whose predictions of architectures left out one at a time are best; none where that is as good.

    Args:
        rows: (n, 3) microseconds of head and operators by the table, and the number of operators.
        measured: (n,) microseconds.
    """
    best, least = Correction(), np.inf
    for terms in TERMS:
        if len(measured) < 2 * len(terms) + 1:
            continue
        left_out = []
        for index in range(len(measured)):
            others = np.arange(len(measured)) != index
            found = _fit(terms, rows[others], measured[others])
            left_out.append(abs(_predict(found, rows[[index]])[0] / measured[index] - 1))
        if (error := float(np.mean(left_out))) < PAYS * least:
            best, least = _fit(terms, rows, measured), error
    return best


def _fit(terms: Sequence[str], rows: Floats, measured: Floats) -> Correction:
    if not terms:
        return Correction()
    head, total, count = rows.T
    columns = {"scale": total, "constant_us": np.ones(len(rows)), "operator_us": count}
    design = np.stack([columns[term] for term in terms], axis=1)
    values, *_ = np.linalg.lstsq(design / measured[:, None], (measured - head) / measured, rcond=None)
    return Correction(**dict(zip(terms, values.tolist(), strict=True)))


def _predict(correction: Correction, rows: Floats) -> Floats:
    head, total, count = rows.T
    return np.asarray(head + correction.scale * total + correction.operator_us * count + correction.constant_us)


def _error(predicted: Floats, uncorrected: Floats, measured: Floats) -> ProfileError:
    errors = np.abs(predicted / measured - 1)
    return ProfileError(
        median=float(np.median(errors)),
        worst=float(errors.max()),
        spearman=_spearman(predicted, measured) if len(measured) > 2 else None,
        uncorrected=float(np.median(np.abs(uncorrected / measured - 1))),
        chains=0.0,
        architectures=len(measured),
    )


def _spearman(one: Floats, other: Floats) -> float:
    ranks = [values.argsort().argsort() for values in (one, other)]
    return float(np.corrcoef(ranks)[0, 1])


def chain_error(profile: LatencyProfile) -> float:
    """The worst relative error of the additive table on the chains it was fitted to."""
    return max(abs(profile.ms(chain_model(chain, profile)) / chain.ms - 1) for chain in profile.chains)


def chain_model(chain: Chain, profile: LatencyProfile) -> Architecture:
    """The model that was measured."""
    return _make(profile, chain.hidden_size, [chain.operator] * chain.copies)


def rebuilt(checked: Checked, profile: LatencyProfile) -> Architecture:
    """The architecture that was measured."""
    operators = [{"kind": kind, **checked.options.get(kind, {})} for kind in checked.operators.split()]
    return _make(profile, checked.hidden_size, operators)


def _make(profile: LatencyProfile, hidden: int, operators: list[dict[str, Any]]) -> Architecture:
    about = profile.fingerprint
    return make_architecture(
        hidden_size=hidden, vocab_size=about.vocab_size, meta_tokens=about.meta_tokens, operators=operators
    )


def _text(operator: dict[str, Any]) -> str:
    return json.dumps(operator, sort_keys=True)
