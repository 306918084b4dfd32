"""The GPU kernels against the plain-torch reference on this very device, before anything is trained with them."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from archsearch.errors import ArchsearchError, EnvironmentUnfit, InvalidArchitecture
from archsearch.model.fla_library import miscompiles
from archsearch.model.layers import LAYERS, Layer
from archsearch.operators import OPERATORS, OperatorConfig

LENGTH = 150
"""Tokens: two chunks of the kernels and a part of a third."""

BOUND = 0.04
"""Largest relative error (2-norm) that bf16 explains, in the output and in every gradient."""

DRAWS = 3
"""Inputs that may be tried. Where a norm follows a memory that happens to answer next to nothing, any rounding is
magnified: that is a draw's bad luck, while a kernel that is wrong is wrong on all of them.
"""

REMEDY = "install triton 3.7.1 or later and flash-linear-attention 0.6, or set proxy.kernels=torch"


SMALLER = "choose a smaller head_dim, state or expand_v, or set proxy.kernels=torch"


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
def agreement(
    config: OperatorConfig, hidden: int, device: torch.device, length: int = LENGTH, draw: int = 1
) -> Agreement:
    """One forward and backward of the operator's GPU path in bf16, against the reference in fp32.

    Once a process for each operator and width: what it compiles is what training needs.
    """
    if device.type == "cuda" and draw == 1:
        _settle(_build(config, hidden, device, "fla"), hidden)
    x = torch.randn(1, length, hidden, device=device, generator=torch.Generator(device).manual_seed(draw))
    found = []
    for path in ("fla", "torch"):
        layer = _build(config, hidden, device, path)
        found.append(_gradients(layer, x.clone().requires_grad_(), half=path != "torch"))
    actual, expected = found
    return Agreement({name: _error(actual[name], truth) for name, truth in expected.items()})


def require_sound(config: OperatorConfig, hidden: int, device: torch.device) -> Agreement:
    """The first sound ``agreement``, or WrongKernels with what was found; also where a kernel does not run at all.

    Raises:
        InvalidArchitecture: a kernel asks for more shared memory or registers than this GPU has.
        WrongKernels: see above.
    """
    name = f"operator {config.kind} {config.model_dump(mode='json', exclude_defaults=True)} at width {hidden}"
    try:
        for draw in range(1, DRAWS + 1):
            found = agreement(config, hidden, device, draw=draw)
            if found.sound:
                return found
    except (ArchsearchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfResources":  # Triton's; it is no dependency where there is no GPU
            wanted = f"{error.required} of {error.name}, and this GPU has {error.limit}"
            raise InvalidArchitecture(f"the GPU kernels of {name} need {wanted}", SMALLER) from error
        message = (str(error).splitlines() or [""])[0]
        raise WrongKernels(
            f"the GPU kernels of {name} do not run: {type(error).__name__}: {message}", REMEDY
        ) from error
    cause = f"the GPU kernels of {name} are off by {found.errors[found.worst]:.1e} in {found.worst}"
    known = "; this Triton is known to miscompile gated operators on Hopper GPUs" if miscompiles(device) else ""
    raise WrongKernels(cause + known, REMEDY)


def _settle(layer: Layer, hidden: int) -> None:
    """One step at a size like training's: what no configuration is known for is tuned here, not on a few tokens."""
    from archsearch.model import tuned

    device = next(layer.parameters()).device
    _gradients(layer, torch.randn(4, 1024, hidden, device=device, requires_grad=True), half=True)
    tuned.remember()


def _build(config: OperatorConfig, hidden: int, device: torch.device, path: str) -> Layer:
    with device:
        layer = LAYERS[config.kind](config, hidden)
        layer.init_weights(torch.Generator(device).manual_seed(0), 0.02)
    layer.path = path
    return layer


def _gradients(layer: Layer, x: Tensor, *, half: bool) -> dict[str, Tensor]:
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
        y = layer(x)
    cotangent = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(2))
    cotangent[:, 0] = 0  # a first token reads a multiple of its own value, and a norm behind hides by how much
    (y.float() * cotangent).sum().backward()  # of a scalar: for a gradient that is handed in torch imports sympy
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad, **gradients}


def _error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12))


def main() -> None:
    """Check one operator in a process of its own, for what that compiles: ``kind options hidden``."""
    kind, options, hidden = sys.argv[1:]
    require_sound(OPERATORS[kind].model_validate(json.loads(options)), int(hidden), torch.device("cuda"))


if __name__ == "__main__":
    main()
