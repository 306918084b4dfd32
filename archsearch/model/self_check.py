"""The GPU kernels against the plain-torch reference on this very device, before anything is trained with them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from archsearch.errors import EnvironmentUnfit
from archsearch.model.layers import LAYERS, Layer
from archsearch.operators import OperatorConfig

LENGTH = 150
"""Tokens: two chunks of the kernels and a part of a third."""

BOUND = 0.04
"""Largest relative error (2-norm) that bf16 explains, in the output and in every gradient."""


class WrongKernels(EnvironmentUnfit):
    """A kernel's output or gradient is not that of its reference: nothing may be trained with it."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Relative errors in the 2-norm by name: ``output``, ``input`` and every parameter's gradient."""

    errors: dict[str, float]

    @property
    def worst(self) -> str:
        """Name of the largest error; one that is NaN is the largest."""
        return max(self.errors, key=lambda name: (self.errors[name] != self.errors[name], self.errors[name]))

    @property
    def sound(self) -> bool:
        """Whether bf16 explains all of them."""
        return all(error < BOUND for error in self.errors.values())


@functools.cache
def agreement(config: OperatorConfig, hidden: int, device: torch.device, length: int = LENGTH) -> Agreement:
    """One forward and backward of the operator's GPU path in bf16, against the reference in fp32.

    Once a process for each operator and width: what it compiles is what training needs.
    """
    x = torch.randn(1, length, hidden, device=device, generator=torch.Generator(device).manual_seed(1))
    found = []
    for path in ("fla", "torch"):
        layer = _build(config, hidden, device, path)
        found.append(_gradients(layer, x.clone().requires_grad_(), half=path != "torch"))
    actual, expected = found
    return Agreement({name: _error(actual[name], truth) for name, truth in expected.items()})


def require_sound(config: OperatorConfig, hidden: int, device: torch.device) -> Agreement:
    """``agreement``, or WrongKernels."""
    found = agreement(config, hidden, device)
    if not found.sound:
        error = found.errors[found.worst]
        raise WrongKernels(
            f"the GPU kernels of operator {config.kind} at width {hidden} are off by {error:.1e} in {found.worst}",
            "check the versions of torch, triton and flash-linear-attention, or set proxy.kernels=torch",
        )
    return found


def _build(config: OperatorConfig, hidden: int, device: torch.device, path: str) -> Layer:
    with device:
        layer = LAYERS[config.kind](config, hidden)
        layer.init_weights(torch.Generator(device).manual_seed(0), 0.02)
    layer.path = path
    return layer


def _gradients(layer: Layer, x: Tensor, *, half: bool) -> dict[str, Tensor]:
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
        y = layer(x)
    y.float().backward(torch.cos(torch.arange(y.numel(), device=y.device).view_as(y).float()))
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad, **gradients}


def _error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12))
