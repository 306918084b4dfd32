"""Decode kernels in Triton, each beside its twin in plain torch.

``TRITON`` and ``TORCH`` hold the same functions under the same names: the kernels, and their twins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from archsearch.model.kernels.attention import attend, attend_reference
from archsearch.model.kernels.delta import delta_step, delta_step_reference
from archsearch.model.kernels.gla import gla_step, gla_step_reference
from archsearch.model.kernels.hgrn2 import hgrn2_step, hgrn2_step_reference
from archsearch.model.kernels.kda import kda_step, kda_step_reference
from archsearch.model.kernels.projection import head, head_reference, project, project_reference
from archsearch.model.kernels.ssd import ssd_step, ssd_step_reference
from archsearch.model.kernels.token import select, select_reference

Launch = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of everything that a decode step launches."""

    project: Launch
    attend: Launch
    delta: Launch
    kda: Launch
    gla: Launch
    hgrn2: Launch
    ssd: Launch
    head: Launch
    select: Launch


TRITON = Kernels(project, attend, delta_step, kda_step, gla_step, hgrn2_step, ssd_step, head, select)
TORCH = Kernels(
    project_reference,
    attend_reference,
    delta_step_reference,
    kda_step_reference,
    gla_step_reference,
    hgrn2_step_reference,
    ssd_step_reference,
    head_reference,
    select_reference,
)
