"""What many timed blocks add up to: a median and how sure it is, without assuming a distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from archsearch.schema import Frozen

NARROW, FEWEST_BLOCKS = 0.005, 10
"""Relative width of the interval, and blocks, at which measuring may stop."""


class Samples(Frozen):
    """Timed blocks, in milliseconds a token.

    A block of one stratum is scaled by the mean over all strata, so that all blocks show the same quantity.

    Attributes:
        median, iqr, lowest: of the blocks that count.
        interval: 95 % interval of the median, from order statistics; absent below six blocks.
        count: blocks that count.
        rejected: blocks set aside: taken while something else disturbed.
    """

    median: float
    iqr: float
    lowest: float
    interval: tuple[float, float] | None
    count: int
    rejected: int

    @property
    def narrow(self) -> bool:
        """Whether the median is known well enough to stop."""
        if self.interval is None or self.count < FEWEST_BLOCKS:
            return False
        return self.interval[1] - self.interval[0] < NARROW * self.median


def median_interval(values: npt.NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of the median from order statistics, or None below six values.

    The ranks are those of the normal approximation of the binomial distribution, rounded outwards.
    """
    count = len(values)
    if count < 6:
        return None
    rank = max(1, int((count - 1.96 * count**0.5) / 2))
    ordered = np.sort(values)
    return float(ordered[rank - 1]), float(ordered[count - rank])


def summarize(strata: Sequence[npt.NDArray[np.float64]], rejected: int) -> Samples:
    """All blocks of all strata as one sample.

    Args:
        strata: seconds a step of the blocks that count, for each stratum.
        rejected: blocks set aside.
    """
    middle = np.mean([np.median(stratum) for stratum in strata])
    blocks = 1e3 * np.concatenate([stratum / np.median(stratum) * middle for stratum in strata])
    low, high = np.quantile(blocks, [0.25, 0.75])
    return Samples(
        median=float(np.median(blocks)),
        iqr=float(high - low),
        lowest=float(blocks.min()),
        interval=median_interval(blocks),
        count=len(blocks),
        rejected=rejected,
    )
