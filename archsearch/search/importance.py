"""Which genes matter for an objective: PED-ANOVA (Watanabe et al. 2023), as Optuna computes it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

from archsearch.search.ledger import distributions
from archsearch.search.study import Candidate
from archsearch.space import SearchSpace


def gene_importances(
    candidates: Sequence[Candidate], space: SearchSpace, objectives: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Objective to gene to its share of what sets the best tenth of the candidates apart, most important first.

    The shares of an objective sum to 1. An objective that cannot tell the candidates apart is absent:
    fewer than two results, or as many in the best tenth as there are.
    """
    known = distributions(space)
    sound = [c for c in candidates if c.is_distinct and c.evaluation is not None and c.evaluation.ok]
    study = optuna.create_study(directions=["minimize"] * len(objectives))
    for candidate in sound:
        values = [candidate.evaluation.objectives[name] for name in objectives if candidate.evaluation is not None]
        study.add_trial(create_trial(params=dict(candidate.genome), distributions=known, values=values))
    found = {name: _importances(study, index) for index, name in enumerate(objectives)} if len(sound) > 1 else {}
    return {name: shares for name, shares in found.items() if shares}


def _importances(study: optuna.Study, index: int) -> dict[str, float]:
    def target(trial: FrozenTrial) -> float:
        return float(trial.values[index])

    with warnings.catch_warnings():
        # Where ties leave no best tenth, Optuna warns and gives zeros; equal shares would say more than is known.
        warnings.simplefilter("ignore")
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=target, normalize=False)
    total = sum(found.values())
    return {gene: value / total for gene, value in found.items()} if total > 0 else {}
