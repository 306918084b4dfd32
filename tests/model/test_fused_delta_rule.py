"""The delta rule's fused kernels against plain torch, forward and backward, in Triton's interpreter.

flash-linear-attention's kernels, which carry the memory over the chunks, are replaced by plain torch here; on a GPU
the whole runs in tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archsearch.model.chunked import delta_rule_chunked
from archsearch.model.fused import chunks, delta_rule
from archsearch.model.fused.wy import wy, wy_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_interpreter starts")
HEADS = 2


@pytest.mark.skipif(INTERPRETED, reason="is what starts this process")
def test_in_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "." * 4 in done.stdout, "the tests of the kernels were skipped"


def draw(key_dim: int, value_dim: int, length: int) -> list[Tensor]:
    """``q``, ``k``, ``v``, and ``logits`` as a slice of wider tokens."""
    generator = torch.Generator().manual_seed(length)
    q, k = (F.normalize(torch.randn(2, length, HEADS, key_dim, generator=generator), dim=-1) for _ in range(2))
    v = torch.randn(2, length, HEADS, value_dim, generator=generator)
    return [q, k, v, torch.randn(2, length, 7, generator=generator)[..., 3:6]]


def carry_forward(k: Tensor, w: Tensor, u: Tensor, output_final_state: bool, chunk_size: int):
    keys, writes, values = (chunks.split(t) for t in (k, w, u))
    state, states, new = torch.zeros(*keys.shape[:2], k.shape[-1], u.shape[-1]), [], []
    for n in range(keys.shape[2]):
        states.append(state)
        new.append(values[:, :, n] - writes[:, :, n] @ state)
        state = state + keys[:, :, n].mT @ new[-1]
    found = chunks.join(torch.stack(new, 2), k.shape[1]).contiguous()
    return torch.stack(states, 1), found, state if output_final_state else None


def carry_backward(q, k, w, h0, dht, do, dv, scale, chunk_size):
    queries, keys, writes, outputs, inner = (chunks.split(t) for t in (q, k, w, do, dv))
    d_state, d_states, d_new = torch.zeros(*keys.shape[:2], k.shape[-1], dv.shape[-1]), [], []
    for n in reversed(range(keys.shape[2])):
        d_states.append(d_state)
        d_new.append(inner[:, :, n] + keys[:, :, n] @ d_state)
        d_state = d_state + scale * queries[:, :, n].mT @ outputs[:, :, n] - writes[:, :, n].mT @ d_new[-1]
    return torch.stack(d_states[::-1], 1), None, chunks.join(torch.stack(d_new[::-1], 2), k.shape[1]).contiguous()


@interpreted
@pytest.mark.parametrize(("key_dim", "value_dim", "length"), [(16, 16, 64), (24, 40, 150), (128, 8, 70)])
def test_outputs_and_gradients(key_dim, value_dim, length, monkeypatch):
    carry = {"chunk_gated_delta_rule_fwd_h": carry_forward, "chunk_gated_delta_rule_bwd_dhu": carry_backward}
    monkeypatch.setattr(delta_rule, "operator", lambda path: carry[path.partition(":")[2]])
    inputs = [*draw(key_dim, value_dim, length), torch.linspace(0.5, 2, value_dim)]
    found = []
    for fused in (True, False):
        q, k, v, logits, gain = leaves = [x.clone().requires_grad_() for x in inputs]
        if fused:
            y, state = delta_rule.DeltaRule.apply(q, k, v, logits, gain, 1e-6, True)
        else:
            o, state = delta_rule_chunked(q, k, v, logits[..., :HEADS].sigmoid())
            y, state = F.rms_norm(o, gain.shape, gain, 1e-6), state.mT
        (torch.cos(torch.arange(y.numel()).view_as(y)) * y)[:, 1:].sum().backward()
        found.append([y.detach(), state.detach(), *(x.grad for x in leaves)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@interpreted
def test_inverse_of_one_key_repeated():
    _, k, v, logits = draw(16, 16, 100)
    repeated = k[:, :1].expand_as(k).contiguous()
    for actual, expected in zip(
        wy(repeated, v, logits + 8), wy_reference(repeated.double(), v.double(), logits.double() + 8), strict=True
    ):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)
