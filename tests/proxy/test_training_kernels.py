"""The kernels of the training step against torch; on a CPU in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from archsearch.architecture import make_architecture
from archsearch.model.hybrid import build_model
from archsearch.proxy import kernels
from archsearch.proxy.cross_entropy import LinearCrossEntropy
from archsearch.proxy.weight_norm import WeightNormalization

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"
)


@pytest.mark.skipif(INTERPRETED, reason="is what starts this process")
def test_in_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "." * 6 in done.stdout, "the tests of the kernels were skipped"


def inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, hidden, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator).to(DEVICE)
    return rows.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (tokens,)).to(DEVICE)


@pytest.mark.gpu
@runs_kernels
@pytest.mark.parametrize(
    ("vocabulary", "max_logits", "block"),
    [(77, 2**26, 8192), (77, 77 * 5, 8192), (300, 300, 64)],
    ids=["whole", "pieces", "rows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(
    vocabulary: int, max_logits: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype is torch.float32 and DEVICE == "cuda":
        pytest.skip("products of fp32 do not name their output's type")
    monkeypatch.setattr(kernels, "MAX_BLOCK", block)
    rows, weight, targets = inputs(17, 16, vocabulary, dtype)
    loss = LinearCrossEntropy.apply(rows, weight, targets, True, max_logits)
    found = torch.autograd.grad(3 * loss, (rows, weight))
    truth = F.cross_entropy(rows.double() @ weight.to(dtype).double().T, targets)
    expected = torch.autograd.grad(3 * truth, (rows, weight))
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=bound)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is other.dtype
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < bound


@pytest.mark.gpu
@runs_kernels
def test_without_gradient_and_with_infinite_logits() -> None:
    rows, weight, targets = inputs(17, 16, 77, torch.bfloat16)
    with torch.no_grad():
        plain = LinearCrossEntropy.apply(rows, weight, targets, False)
    torch.testing.assert_close(plain, LinearCrossEntropy.apply(rows, weight, targets, True).detach())
    poisoned = rows.detach().clone()
    poisoned[3] = float("inf")
    assert not torch.isfinite(LinearCrossEntropy.apply(poisoned.requires_grad_(), weight, targets, True))


@pytest.mark.gpu
@runs_kernels
@pytest.mark.parametrize("hidden", [48, 144])
def test_normalized_rows_and_columns(hidden: int) -> None:
    options = {"a": {"head_dim": 12}, "gl": {"head_dim": 12}, "f": {"multiple_of": 20}}
    model = build_model(
        make_architecture(hidden_size=hidden, vocab_size=256, operators="a f gl", options=options, tie_embeddings=False)
    )
    model.layers[1].op.up_proj.weight.data[2] = 0
    expected = copy.deepcopy(model)
    WeightNormalization(expected)()
    WeightNormalization(model.to(DEVICE)).launch()
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).cpu(), weight)
