"""StoppingRule: what a search knows when a candidate starts, and who must stop at a rung because of it.

Plain data that travels to the worker with its candidate, so that a decision needs no shared disk, no message
and no barrier. ``search/rungs.py`` makes it from the study.

Asynchronous successive halving (Li et al. 2020, ASHA) stops all but the best 1/eta at each rung, whatever the
evidence; for several objectives Schmucker et al. 2021 (MO-ASHA) rank by non-domination instead of the loss. Here a
candidate stops only if it is *clearly* dominated. For each rung the candidates that were trained to the end give a
linear forecast of the last loss from what was known there: the loss l, and the other objectives o, because slow
models often learn late,

    L = c + a l + sum_i b_i log(1 + o_i),

with a residual deviation s that holds everything by which a rung deceives: seeds, curves that cross. With x for
(1, l, log(1 + o)) and X for the rows of those that ended, a candidate stops if

    L(x) - t s sqrt(1 + x' (X'X)^-1 x)  >  L(y)

for some y that ended and is no worse in any other objective, such as the latency that is known before training. t
is Student's quantile at the wanted confidence: the left side is the lower end of a prediction interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from archsearch.schema import Frozen

LOSS = "loss"


def features(objectives: Sequence[str], known: Mapping[str, float]) -> list[float]:
    """What a forecast is made from: 1, the loss, and log(1 + o) of the other objectives in their order."""
    return [1.0, known[LOSS], *(math.log1p(known[name]) for name in objectives if name != LOSS)]


class Forecast(Frozen):
    """How what is known at a rung foretells the last loss, and how surely. Losses are in nats a token.

    ``weights`` belong to ``features``; ``width`` is Student's quantile times the residual deviation, and
    ``inverse`` the (pseudo-)inverse of X'X.
    """

    weights: tuple[float, ...]
    width: float
    inverse: tuple[tuple[float, ...], ...]

    def expected(self, x: Sequence[float]) -> float:
        """The last loss to be expected of a candidate with the features ``x``."""
        return _dot(self.weights, x)

    def margin(self, x: Sequence[float]) -> float:
        """How far below the expected its last loss may well be."""
        leverage = _dot(x, [_dot(row, x) for row in self.inverse])
        return self.width * math.sqrt(1 + max(leverage, 0.0))


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


class Verdict(Frozen):
    """Why a candidate stopped: the trial that it cannot be expected to beat, and what was expected of it."""

    tokens: int
    dominated_by: int
    expected: float
    margin: float
    to_beat: float


class StoppingRule(Frozen):
    """Who must stop.

    Attributes:
        objectives: of the search, in order.
        front: trial number and objectives of each candidate that ended and that no other dominates.
        forecasts: tokens of a rung to its forecast; a rung without one stops nobody.
    """

    objectives: tuple[str, ...]
    front: tuple[tuple[int, tuple[float, ...]], ...] = ()
    forecasts: dict[int, Forecast] = {}

    def verdict(self, tokens: int, known: Mapping[str, float]) -> Verdict | None:
        """The verdict on a candidate at a rung; None where it goes on.

        Args:
            tokens: of the rung, as the config writes it.
            known: every objective of the search; ``loss`` as it is at the rung.
        """
        forecast = self.forecasts.get(tokens)
        if forecast is None:
            return None
        x = features(self.objectives, known)
        expected, margin = forecast.expected(x), forecast.margin(x)
        place = self.objectives.index(LOSS)
        rivals = [(values[place], number) for number, values in self.front if self._no_worse(values, known)]
        if not rivals or min(rivals)[0] >= expected - margin:
            return None
        to_beat, number = min(rivals)
        return Verdict(tokens=tokens, dominated_by=number, expected=expected, margin=margin, to_beat=to_beat)

    def _no_worse(self, values: tuple[float, ...], known: Mapping[str, float]) -> bool:
        """Whether a result is at least as good in everything but the loss."""
        pairs = zip(self.objectives, values, strict=True)
        return all(value <= known[name] for name, value in pairs if name != LOSS)
