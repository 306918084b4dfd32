"""Makes the file of tuned kernel configurations of this device (``tuned.py``): a process a shape, all at once."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from archsearch.operators import OPERATORS

if TYPE_CHECKING:
    from archsearch.model.tuned import Kernels

BATCH, LENGTH, HIDDEN = 16, 1024, 1024
"""What the kernels are tuned at: the nearest shape serves every other."""


@dataclass(frozen=True)
class Shape:
    """An operator to tune: its kind, its options and a width."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    hidden: int = HIDDEN

    def __str__(self) -> str:
        return "-".join([self.kind, *(f"{name}{value:g}" for name, value in self.options.items()), str(self.hidden)])


SHAPES = (
    Shape("d"),
    Shape("d", {"head_dim": 64}),
    Shape("gd"),
    Shape("gd", {"head_dim": 64}),
    Shape("kda"),
    Shape("kda", {"head_dim": 64}),
    Shape("r7"),
    Shape("r7", {"head_dim": 128}),
    Shape("hg", {"head_dim": 64}),
    Shape("gl"),
    Shape("gl", {"head_dim": 64}),
    Shape("m2"),
    Shape("m2", {"state": 64}),
)


def tune(shapes: Iterable[Shape], workers: int) -> Iterator[tuple[Shape, float, Kernels | Exception]]:
    """Let the libraries tune ``shapes``, each in a process of its own: seconds and what was chosen, as they end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(tune_one, shape): shape for shape in shapes}
        for done in as_completed(running):
            error = done.exception()
            if isinstance(error, Exception):
                yield running[done], 0.0, error
            else:
                seconds, kernels = done.result()
                yield running[done], seconds, kernels


def tune_one(shape: Shape) -> tuple[float, Kernels]:
    """One forward and backward of ``shape`` in this process, with every kernel tuned at it."""
    import torch

    from archsearch.model import tuned
    from archsearch.model.layers import LAYERS

    tuned.Choice.tuning = True
    start = time.perf_counter()
    with torch.device("cuda"):
        layer = LAYERS[shape.kind](OPERATORS[shape.kind].model_validate(shape.options), shape.hidden)
        layer.path = "fla"
        x = torch.randn(BATCH, LENGTH, shape.hidden, requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start, tuned.chosen()
