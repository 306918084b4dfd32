"""The worker's side of early stopping: asks the rule at each rung of a training, and keeps what was known there."""

from __future__ import annotations

import math
from collections.abc import Mapping

from archsearch.config import ProxyConfig
from archsearch.evaluation import Rung
from archsearch.proxy.checkpoint import Curve
from archsearch.stopping import LOSS, StoppingRule, Verdict


class Stopped(Exception):
    """A candidate ended at a rung, clearly dominated."""

    def __init__(self, verdict: Verdict) -> None:
        least = verdict.expected - verdict.margin
        super().__init__(
            f"stopped after {verdict.tokens:,} tokens: its loss lets expect {verdict.expected:.4f} at the end and "
            f"hardly less than {least:.4f}; trial {verdict.dominated_by}, as good in all else, reached "
            f"{verdict.to_beat:.4f}"
        )


class Judge:
    """What ``train_proxy`` asks at each rung whether to go on.

    Args:
        config: of the proxy; its last rung is the end and no question.
        known: every objective of the search but the loss.
        rule: of the search; None lets everybody go on.
    """

    def __init__(self, config: ProxyConfig, known: Mapping[str, float], rule: StoppingRule | None) -> None:
        self.rungs = config.rungs[:-1]
        self.verdict: Verdict | None = None
        self._step = config.batch * config.context
        self._known, self._rule = dict(known), rule

    def __call__(self, tokens: int, loss: float) -> bool:
        """Whether the training goes on past the rung ``tokens``, where its validation loss is ``loss``."""
        if self._rule is not None:
            self.verdict = self._rule.verdict(tokens, self._known | {LOSS: loss})
        return self.verdict is None

    def reached(self, curve: Curve) -> tuple[Rung, ...]:
        """The rungs of a whole curve, those before a checkpoint included."""
        losses = dict(curve)
        places = {rung: math.ceil(rung / self._step) * self._step for rung in self.rungs}
        return tuple(
            Rung(tokens=rung, objectives=self._known | {LOSS: losses[place]})
            for rung, place in places.items()
            if place in losses
        )
