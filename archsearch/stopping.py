"""StoppingRule: what a search knows when a candidate starts, and who must stop at a rung because of it.

Plain data that travels to the worker with its candidate, so that a decision needs no shared disk, no message
and no barrier. ``search/rungs.py`` makes it from the study.

Asynchronous successive halving (Li et al. 2020, ASHA) stops all but the best 1/eta at each rung, whatever the
evidence; for several objectives Schmucker et al. 2021 (MO-ASHA) rank by non-domination instead of the loss. Here a
candidate stops only if it is *clearly* dominated. At rung r the losses l_r of those that were trained to the end
give a line to their last losses, L = a_r l_r + b_r, with a residual deviation s_r that holds everything by which
rungs deceive: seeds, curves that cross, models that learn late. A candidate with the loss l stops if

    a_r l + b_r - t_r s_r sqrt(1 + h(l))  >  L(y)

for some y that ended and is no worse in any other objective, such as the latency that is known before training. t_r
is Student's quantile at the wanted confidence and h(l) the leverage of l: this is the line's prediction interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from archsearch.schema import Frozen

LOSS = "loss"


class Line(Frozen):
    """How losses at a rung foretell the last ones: ``slope * loss + intercept``, and how surely.

    ``width`` is Student's quantile times the residual deviation, ``count`` results around ``mean`` with the sum of
    squares ``spread`` carry the line. All losses are in nats a token.
    """

    slope: float
    intercept: float
    width: float
    count: int
    mean: float
    spread: float

    def expected(self, loss: float) -> float:
        """The last loss that ``loss`` at the rung lets expect."""
        return self.slope * loss + self.intercept

    def margin(self, loss: float) -> float:
        """How far below the expected the last loss may well end."""
        leverage = 1 / self.count + (loss - self.mean) ** 2 / self.spread
        return self.width * math.sqrt(1 + leverage)


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
        lines: tokens of a rung to its line; a rung without one stops nobody.
    """

    objectives: tuple[str, ...]
    front: tuple[tuple[int, tuple[float, ...]], ...] = ()
    lines: dict[int, Line] = {}

    def verdict(self, tokens: int, known: Mapping[str, float]) -> Verdict | None:
        """The verdict on a candidate at a rung; None where it goes on.

        Args:
            tokens: of the rung, as the config writes it.
            known: every objective of the search; ``loss`` as it is at the rung.
        """
        line = self.lines.get(tokens)
        if line is None:
            return None
        loss = known[LOSS]
        expected, margin = line.expected(loss), line.margin(loss)
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
