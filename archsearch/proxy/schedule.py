"""The learning rate over the steps of a training, and the steps after which it is validated."""

from __future__ import annotations

import math
from collections.abc import Iterable

from archsearch.config import ProxyConfig


def learning_rate(config: ProxyConfig, index: int, steps: int) -> float:
    """The learning rate of step ``index`` (from 0) of ``steps``: linear warm-up, then ``config.schedule``.

    ``cosine`` and ``linear`` fall from the peak to ``final_rate`` of it over all the steps that remain;
    ``wsd`` (warm-up, stable, decay; arXiv 2404.06395) stays at the peak and falls linearly over the last
    ``cooldown`` of the steps; ``constant`` stays.

    Losses at a rung compare models that are equally far into the same schedule, so that every schedule
    ranks fairly at one rung, and cosine, the paper's, is the default. Losses of different rungs compare only
    under ``constant``, and under ``wsd`` before its decay: elsewhere a lower rate alone lowers the loss.
    """
    rising = math.ceil(config.warmup * steps)
    if index < rising:
        return config.learning_rate * (index + 1) / rising
    last = max(steps - 1, 1)
    if config.schedule == "constant":
        falling = 0.0
    elif config.schedule == "wsd":
        falling = max(0.0, 1 - (last - index) / max(math.ceil(config.cooldown * steps), 1))
    else:
        falling = (index - rising) / max(last - rising, 1)
    if config.schedule == "cosine":
        falling = 0.5 * (1 - math.cos(math.pi * falling))
    return config.learning_rate * (1 - (1 - config.final_rate) * falling)


def validation_steps(steps: int, validations: int, rungs: Iterable[int] = ()) -> list[int]:
    """Steps after which to validate: evenly spaced, and the steps ``rungs`` too; the last one is always included."""
    even = {math.ceil(steps * (point + 1) / validations) for point in range(validations)}
    return sorted(even | {rung for rung in rungs if 0 < rung < steps})
