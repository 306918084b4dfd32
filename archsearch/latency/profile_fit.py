"""From measured chains and architectures to what operators cost, and how far the sum of them is off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from archsearch.architecture import Architecture, dump_operator, make_architecture
from archsearch.latency_profile import Chain, Checked, Entry, LatencyProfile, ProfileError, key

Floats = npt.NDArray[np.float64]
Measured = tuple[Architecture, float]
"""A model and its microseconds a token."""
FEWEST = 8
"""Architectures below which the table comes from chains alone, and all of them are held out."""
WEIGHT = 2.0
"""Of an architecture against a chain: a search predicts mixtures, not chains."""


def finish(profile: LatencyProfile) -> LatencyProfile:
    """``profile`` with table and error from what it holds of measurements.

    Every second architecture is fitted to, the others are held out.
    """
    chains = [(chain_model(chain, profile), 1e3 * chain.ms) for chain in profile.chains]
    whole = [(rebuilt(checked, profile), 1e3 * checked.measured_ms) for checked in profile.checked]
    enough = len(whole) >= FEWEST
    fitted, held = (whole[::2], whole[1::2]) if enough else ([], whole)
    alone = profile.model_copy(update={"table": fit_table(chains, [])})
    final = profile.model_copy(update={"table": fit_table(chains, fitted)})
    checked = tuple(
        one.model_copy(update={"predicted_ms": final.ms(model), "fitted": enough and index % 2 == 0})
        for index, (one, (model, _)) in enumerate(zip(profile.checked, whole, strict=True))
    )
    errors = relative_errors(final, held)
    error = ProfileError(
        median=float(np.median(errors)),
        worst=float(errors.max()),
        spearman=_spearman(final, held) if len(held) > 2 else None,
        chains_alone=float(np.median(relative_errors(alone, held))),
        chains=float(relative_errors(alone, chains).max()),
        architectures=len(held),
    )
    return final.model_copy(update={"checked": checked, "error": error})


def fit_table(chains: Sequence[Measured], whole: Sequence[Measured]) -> tuple[Entry, ...]:
    """Costs that explain all measurements best: step = head + the sum of its operators, no cost negative.

    Chains tell the cost of each operator from that of the others; whole architectures tell what it is beside others,
    where its weights and instructions are no longer in a cache. Relative errors count, so that fast models weigh as
    much as slow ones.

    Args:
        chains: two lengths of each operator, at each width.
        whole: of the same operators; they count ``WEIGHT`` times.
    """
    models = [*chains, *whole]
    columns: dict[str, tuple[int, dict[str, Any] | None]] = {}
    for model, _ in chains:
        for operator in (None, dump_operator(model.operators[0])):
            columns.setdefault(key(model.hidden_size, operator), (model.hidden_size, operator))
    names = {name: index for index, name in enumerate(columns)}
    design = np.zeros((len(models), len(names)))
    for row, (model, _) in zip(design, models, strict=True):
        row[names[key(model.hidden_size, None)]] = 1
        for operator, count in Counter(model.operators).items():
            row[names[key(model.hidden_size, dump_operator(operator))]] += count
    weights = np.array([1.0] * len(chains) + [WEIGHT] * len(whole))
    us = np.array([measured for _, measured in models])
    costs, _ = nnls(design * (weights / us)[:, None], weights)
    return tuple(
        Entry(hidden_size=hidden, operator=operator, us=float(cost))
        for (hidden, operator), cost in zip(columns.values(), costs, strict=True)
    )


def relative_errors(profile: LatencyProfile, models: Sequence[Measured]) -> Floats:
    """|predicted - measured| / measured of each, (models,)."""
    return np.array([abs(1e3 * profile.ms(model) / measured - 1) for model, measured in models])


def _spearman(profile: LatencyProfile, models: Sequence[Measured]) -> float:
    values = np.array([[profile.ms(model), measured] for model, measured in models])
    return float(np.corrcoef(values.argsort(axis=0).argsort(axis=0), rowvar=False)[0, 1])


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
