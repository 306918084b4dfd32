"""The kernel between layers against its plain-torch twin; on a CPU in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archsearch.model.fused.residual import add_norm, add_norm_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.skipif(INTERPRETED, reason="is what starts this process")
def test_in_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "." * 4 in done.stdout, "the tests of the kernel were skipped"


def run(function: Callable[..., tuple[Tensor, Tensor]], size: int, used: str) -> list[Tensor]:
    """Outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, size), (2, 3, size), (size,)
    leaves = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
    total, normed = function(*leaves, 1e-6)
    wave = torch.cos(torch.arange(total.numel(), device=DEVICE)).view_as(total)
    loss = {"both": (total + 2 * normed), "sum": total, "norm": normed}[used]
    (loss * wave).sum().backward()
    return [total.detach(), normed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize(("size", "used"), [(40, "both"), (1000, "both"), (40, "sum"), (40, "norm")])
def test_add_norm(size: int, used: str) -> None:
    found, expected = (run(function, size, used) for function in (add_norm, add_norm_reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
