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
from archsearch.model.kernels.mamba import (
    selective_project,
    selective_project_reference,
    selective_step,
    selective_step_reference,
)
from archsearch.model.kernels.projection import head, head_reference, project, project_reference
from archsearch.model.kernels.rwkv7 import rwkv7_step, rwkv7_step_reference
from archsearch.model.kernels.shift import shift_project, shift_project_reference
from archsearch.model.kernels.ssd import ssd_step, ssd_step_reference
from archsearch.model.kernels.token import select, select_reference

Launch = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of everything that a decode step launches."""

    project: Launch
    shift: Launch
    attend: Launch
    delta: Launch
    kda: Launch
    gla: Launch
    hgrn2: Launch
    selective_project: Launch
    selective_step: Launch
    ssd: Launch
    rwkv7: Launch
    head: Launch
    select: Launch


TRITON = Kernels(
    project=project,
    shift=shift_project,
    attend=attend,
    delta=delta_step,
    kda=kda_step,
    gla=gla_step,
    hgrn2=hgrn2_step,
    selective_project=selective_project,
    selective_step=selective_step,
    ssd=ssd_step,
    rwkv7=rwkv7_step,
    head=head,
    select=select,
)
TORCH = Kernels(
    project=project_reference,
    shift=shift_project_reference,
    attend=attend_reference,
    delta=delta_step_reference,
    kda=kda_step_reference,
    gla=gla_step_reference,
    hgrn2=hgrn2_step_reference,
    selective_project=selective_project_reference,
    selective_step=selective_step_reference,
    ssd=ssd_step_reference,
    rwkv7=rwkv7_step_reference,
    head=head_reference,
    select=select_reference,
)
