"""``archsearch doctor --tune``: kernel configurations of this very GPU."""

from __future__ import annotations

import os
import time

from archsearch.commands.console import say
from archsearch.errors import EnvironmentUnfit


def tune_kernels() -> None:
    """Tune every shape of ``tune.SHAPES`` and write the file that training reads from then on.

    Raises:
        EnvironmentUnfit: there is no GPU, or no shape could be tuned.
    """
    import torch

    from archsearch.model import fla_library
    from archsearch.model.tune import SHAPES, tune

    if not torch.cuda.is_available():
        raise EnvironmentUnfit("no NVIDIA GPU to tune kernels for", "run doctor --tune where the search will train")
    fla_library.require(torch.device("cuda"))
    from archsearch.model import tuned

    kernels: tuned.Kernels = {}
    start = time.perf_counter()
    for shape, seconds, found in tune(SHAPES, max(1, len(os.sched_getaffinity(0)) // 4)):
        if isinstance(found, Exception):
            say(f"{shape}: {type(found).__name__}: {found}")
            continue
        say(f"{shape}: {len(found)} kernels in {seconds:.0f} s")
        for name, entries in found.items():
            kernels.setdefault(name, []).extend(entries)
        tuned.write(tuned.own_file(), kernels)  # at once: an interrupted tuning keeps what it has
    if not kernels:
        raise EnvironmentUnfit("no kernel could be tuned", "look at the messages above")
    say(f"{tuned.own_file()}: {len(kernels)} kernels, {time.perf_counter() - start:.0f} s")
