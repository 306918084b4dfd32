"""Decode kernels against their twins.

Kernels run in Triton's interpreter, which must be chosen before Triton is imported, so one test runs the others in a
process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archsearch.model.decode import DecodePlan
from archsearch.model.kernels import TRITON, attention
from archsearch.model.kernels.attention import Heads, Tile, attend, attend_reference, attention_scratch, rotary_table
from archsearch.model.kernels.bandwidth import read_sums, read_sums_reference
from archsearch.model.kernels.convolution import Convolution, Output, padded, value_rows
from archsearch.model.kernels.delta import DeltaGates, delta_step, delta_step_reference
from archsearch.model.kernels.gla import Decay, gla_step, gla_step_reference
from archsearch.model.kernels.hgrn2 import hgrn2_step, hgrn2_step_reference
from archsearch.model.kernels.kda import KDAGates, kda_step, kda_step_reference
from archsearch.model.kernels.mamba import (
    Selective,
    selective_project,
    selective_project_reference,
    selective_step,
    selective_step_reference,
)
from archsearch.model.kernels.projection import (
    Epilogue,
    Norm,
    head,
    head_parts,
    head_reference,
    project,
    project_reference,
)
from archsearch.model.kernels.rwkv7 import TimeMix, rwkv7_step, rwkv7_step_reference
from archsearch.model.kernels.shift import Shift, shift_project, shift_project_reference
from archsearch.model.kernels.ssd import Rates, ssd_step, ssd_step_reference
from archsearch.model.kernels.token import select, select_reference
from tests.kits.decode_kit import VOCABULARY, follow, model_of, poison

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_interpreter starts")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.skipif(INTERPRETED, reason="is what starts this process")
def test_in_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "." * 30 in done.stdout, "the tests of the kernels were skipped"


def agree(
    kernel: Callable[..., None], reference: Callable[..., None], args: tuple[Any, ...], written: list[Tensor]
) -> None:
    """Run both on equal contents of the tensors that they write, and compare what they leave there."""
    before = [t.clone() for t in written]
    reference(*args)
    expected = [t.clone() for t in written]
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(old)
    kernel(*args)
    for tensor, want in zip(written, expected, strict=True):
        rtol, atol = (2e-2, 1e-2) if want.dtype == torch.bfloat16 else (1e-4, 2e-4)
        torch.testing.assert_close(tensor, want, rtol=rtol, atol=atol)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(10, 96), (37, 700)])
@pytest.mark.parametrize("epilogue", [Epilogue.PLAIN, Epilogue.GATED, Epilogue.RESIDUAL])
def test_gemv_kernel(n: int, k: int, dtype: torch.dtype, epilogue: Epilogue) -> None:
    x = torch.randn(1, k).to(dtype)
    weight = (torch.randn(n * (1 + (epilogue == Epilogue.GATED)), k) * k**-0.5).to(dtype)
    out = torch.randn(1, n).to(dtype) if epilogue == Epilogue.RESIDUAL else poisoned(1, n, dtype=dtype)
    bias = torch.randn(n).to(dtype) if epilogue == Epilogue.PLAIN else None
    norm = Norm(1e-3, gain=torch.rand(k).to(dtype)) if epilogue != Epilogue.RESIDUAL else None
    agree(project, project_reference, (x, weight, out, epilogue, norm, bias), [out])


@interpreted
@pytest.mark.parametrize(
    ("batch", "k", "groups", "parts"), [(1, 96, 3, 2), (1, 96, 1, 5), (1, 1536, 2, 1), (1, 1024, 8, 4), (3, 96, 3, 2)]
)
def test_projection_kernel_of_grouped_norms(batch: int, k: int, groups: int, parts: int) -> None:
    x, weight = torch.randn(batch, k), torch.randn(20, k) * k**-0.5
    out, norm = torch.randn(batch, 20), Norm(1e-3, squares=torch.rand(batch, groups, parts))
    agree(project, project_reference, (x, weight, out, Epilogue.RESIDUAL, norm), [out])


@interpreted
@pytest.mark.parametrize("batch", [2, 17])
@pytest.mark.parametrize("epilogue", [Epilogue.PLAIN, Epilogue.GATED])
def test_projections_of_batches(batch: int, epilogue: Epilogue) -> None:
    n, k = 21, 200
    x, weight = torch.randn(batch, k), torch.randn(2 * n, k) * k**-0.5
    weight = weight if epilogue == Epilogue.GATED else weight[:n]
    out, bias = poisoned(batch, n), torch.randn(n) if epilogue == Epilogue.PLAIN else None
    agree(project, project_reference, (x, weight, out, epilogue, Norm(1e-6, gain=torch.rand(k)), bias), [out])


@interpreted
@pytest.mark.parametrize("batch", [1, 3])
def test_head_and_select_kernels(batch: int) -> None:
    k, vocabulary = 48, 101
    x, weight = torch.randn(batch, k), torch.randn(vocabulary, k)
    weight[90] = weight[40] = weight[20] = 3 * torch.sign(x[0])  # equals: the first must win
    parts = head_parts(batch, vocabulary, k)
    best, best_row = poisoned(batch, parts), torch.full((batch, parts), -1, dtype=torch.int32)
    logits, norm = poisoned(batch, vocabulary), Norm(1e-6, gain=torch.rand(k))
    for run in (head_reference, head):
        run(x, weight, logits, best, best_row, norm)
        token, hidden = torch.full((batch,), -1), poisoned(batch, k)
        position = torch.tensor(6)
        args = best, best_row, weight, token, hidden, position
        agree(select, select_reference, args, [token, hidden, position])
        assert torch.equal(token, logits.argmax(-1))
        assert token[0] == 20
        assert int(position) == 7
    want = poisoned(batch, vocabulary)
    head_reference(x, weight, want, best.clone(), best_row.clone(), norm)
    torch.testing.assert_close(logits, want)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("query", "kv", "dim", "slots", "ring"), [(4, 2, 32, 300, False), (3, 1, 24, 40, True), (2, 2, 64, 140, True)]
)
def test_attend_kernel(query: int, kv: int, dim: int, slots: int, ring: bool, dtype: torch.dtype) -> None:
    heads, batch = Heads(query, kv, dim, 1e-6, ring), 2
    norms = (torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)) if query == 4 else None
    rotary = rotary_table(400, dim, 1e4, torch.device("cpu"))
    for here in [0, 1, 15, 16, 17, 128, 129, slots - 1, slots, 2 * slots + 3] if ring else [0, 1, 129, slots - 1]:
        keys, values = (torch.randn(batch, kv, slots, dim).to(dtype) for _ in range(2))
        keys[:, :, here:] = values[:, :, here:] = torch.nan
        out, scratch = poisoned(batch, query * dim, dtype=dtype), attention_scratch(batch, heads, slots, keys.device)
        scratch["partial"].fill_(torch.nan)
        args = torch.randn(batch, (query + 2 * kv) * dim).to(dtype), norms, rotary, torch.tensor(here), keys, values
        written = keys[:, :, : here + 1], values[:, :, : here + 1]
        agree(attend, attend_reference, (*args, scratch, out, heads), [out, *written])
        assert not scratch["arrivals"].any()


@interpreted
def test_attend_kernel_over_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits that are longer than what is loaded ahead."""
    cut = Tile(group=2, block=4, unroll=2, splits=2, tokens=16, warps=4)
    monkeypatch.setattr(attention, "attention_shape", lambda *sizes: cut)
    heads, rotary = Heads(4, 2, 32, 1e-6, False), rotary_table(128, 32, 1e4, torch.device("cpu"))
    for here in (31, 72, 127):
        keys, values = (torch.randn(1, 2, 128, 32) for _ in range(2))
        keys[:, :, here:] = values[:, :, here:] = torch.nan
        out, scratch = poisoned(1, 128), attention_scratch(1, heads, 128, keys.device)
        args = torch.randn(1, 256), None, rotary, torch.tensor(here), keys, values, scratch, out, heads
        agree(attend, attend_reference, args, [out, keys[:, :, : here + 1], values[:, :, : here + 1]])


def outputs(batch: int, heads: int, value_dim: int) -> Output:
    width = padded(value_dim)
    parts = width // min(width, value_rows(batch, heads, value_dim))
    return Output(poisoned(batch, heads * width), poisoned(batch, heads, parts), torch.rand(value_dim))


def convolution(batch: int, channels: int, taps: int, bias: bool) -> Convolution:
    offsets = torch.randn(channels) if bias else None
    return Convolution(torch.randn(taps, channels), offsets, torch.randn(batch, taps, channels))


def total(squares: Tensor) -> Tensor:
    return squares.sum(-1)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("heads", "k", "v", "taps"), [(2, 32, 32, 4), (2, 24, 20, 1), (1, 16, 8, 3)])
def test_delta_kernel(heads: int, k: int, v: int, taps: int, gated: bool) -> None:
    batch, channels = 2, heads * (2 * k + v)
    state, output = torch.randn(batch, heads, v, k), outputs(batch, heads, v)
    gates = DeltaGates(-torch.rand(heads), torch.randn(heads)) if gated else None
    part = convolution(batch, channels, taps, bias=False)
    for here in (0, taps):
        x = torch.randn(batch, channels + heads * (2 + v if gated else 1))
        sums = poisoned(batch, heads)
        agree(
            lambda *a: (delta_step(*a), sums.copy_(total(output.squares))),  # noqa: B023
            lambda *a: (delta_step_reference(*a), sums.copy_(total(output.squares))),  # noqa: B023
            (x, part, gates, state, torch.tensor(here), output),
            [state, part.ring, output.mixed, sums],
        )


@interpreted
@pytest.mark.parametrize(
    ("heads", "k", "v", "taps", "rank"), [(2, 32, 32, 4, 32), (2, 24, 20, 1, 40), (1, 16, 8, 3, 5)]
)
def test_kda_kernel(heads: int, k: int, v: int, taps: int, rank: int) -> None:
    batch, channels = 2, heads * (2 * k + v)
    state, output, sums = torch.randn(batch, heads, v, k), outputs(batch, heads, v), poisoned(batch, heads)
    ups = torch.randn(heads * k, rank) * rank**-0.5, torch.randn(heads * v, rank) * rank**-0.5
    gates = KDAGates(-torch.rand(heads), torch.randn(heads * k), *ups, torch.randn(heads * v))
    part = convolution(batch, channels, taps, bias=False)
    for here in (0, taps):
        x = torch.randn(batch, channels + heads + 2 * rank)
        agree(
            lambda *a: (kda_step(*a), sums.copy_(total(output.squares))),
            lambda *a: (kda_step_reference(*a), sums.copy_(total(output.squares))),
            (x, part, gates, state, torch.tensor(here), output),
            [state, part.ring, output.mixed, sums],
        )


@interpreted
@pytest.mark.parametrize(("heads", "k", "v", "rank"), [(2, 32, 64, 16), (1, 24, 40, 3)])
def test_gla_kernel(heads: int, k: int, v: int, rank: int) -> None:
    batch = 2
    state, output, sums = torch.randn(batch, heads, v, k), outputs(batch, heads, v), poisoned(batch, heads)
    decay = Decay(torch.randn(heads * k, rank), torch.randn(heads * k), 4.0)
    x = torch.randn(batch, 2 * heads * (k + v) + rank)
    agree(
        lambda *a: (gla_step(*a), sums.copy_(total(output.squares))),
        lambda *a: (gla_step_reference(*a), sums.copy_(total(output.squares))),
        (x, decay, state, output),
        [state, output.mixed, sums],
    )


@interpreted
@pytest.mark.parametrize(("heads", "size"), [(2, 32), (3, 24)])
def test_hgrn2_kernel(heads: int, size: int) -> None:
    batch, single = 2, outputs(2, heads, size)
    squares = single.squares.reshape(batch, 1, -1)
    state, sums = torch.randn(batch, heads, size, size), poisoned(batch, 1)
    output = Output(single.mixed, squares, torch.rand(heads * size))
    agree(
        lambda *a: (hgrn2_step(*a), sums.copy_(total(squares))),
        lambda *a: (hgrn2_step_reference(*a), sums.copy_(total(squares))),
        (torch.randn(batch, 3 * heads * size), state, output),
        [state, output.mixed, sums],
    )


@interpreted
@pytest.mark.parametrize(("heads", "v", "k", "groups"), [(4, 32, 16, 1), (4, 24, 24, 2)])
def test_ssd_kernel(heads: int, v: int, k: int, groups: int) -> None:
    batch, inner = 2, heads * v
    parts = -(-v // value_rows(batch, heads, v))
    squares, sums = poisoned(batch, groups, heads // groups * parts), poisoned(batch, groups)
    output = Output(poisoned(batch, inner), squares, torch.rand(inner))
    part = convolution(batch, inner + 2 * groups * k, 4, bias=True)
    rates = Rates(-torch.rand(heads), torch.randn(heads), torch.randn(heads))
    state = torch.randn(batch, heads, v, k)
    for here in (2, 3):
        x = torch.randn(batch, 2 * inner + 2 * groups * k + heads)
        agree(
            lambda *a: (ssd_step(*a), sums.copy_(total(squares))),
            lambda *a: (ssd_step_reference(*a), sums.copy_(total(squares))),
            (x, part, rates, state, torch.tensor(here), groups, output),
            [state, part.ring, output.mixed, sums],
        )


@interpreted
@pytest.mark.parametrize(("batch", "k"), [(1, 96), (1, 700), (3, 200), (17, 96)])
def test_shift_project_kernel(batch: int, k: int) -> None:
    x, weight, out = torch.randn(batch, k), torch.randn(64, k) * k**-0.5, poisoned(batch, 64)
    shift = Shift(torch.rand(3, k), torch.tensor([0, 2, 2, 1], dtype=torch.int32), torch.randn(batch, 2, k))
    for here in (0, 1):
        args = x, torch.rand(k), 1e-3, shift, torch.tensor(here), weight, out
        agree(shift_project, shift_project_reference, args, [out, shift.ring])


@interpreted
@pytest.mark.parametrize(("heads", "d", "ranks"), [(2, 32, (32, 40, 16)), (3, 24, (5, 7, 64))])
def test_rwkv7_kernel(heads: int, d: int, ranks: tuple[int, int, int]) -> None:
    batch, hidden = 2, heads * d
    ups = [torch.randn(hidden, rank) * rank**-0.5 for rank in ranks]
    starts = (0, hidden, 2 * hidden, 3 * hidden, 3 * hidden + ranks[0], 3 * hidden + sum(ranks[:2]))
    mix = TimeMix(*ups, *(torch.randn(hidden) for _ in range(7)), -0.6, 1e-4, starts)
    state, mixed = torch.randn(batch, heads, d, d), poisoned(batch, hidden)
    projected = torch.randn(batch, 3 * hidden + sum(ranks))
    agree(rwkv7_step, rwkv7_step_reference, (projected, mix, state, mixed), [state, mixed])


@interpreted
@pytest.mark.parametrize(("inner", "k", "rank", "taps"), [(64, 16, 8, 4), (1100, 5, 40, 3)])
def test_mamba_kernels(inner: int, k: int, rank: int, taps: int) -> None:
    batch, part = 2, convolution(2, inner, taps, bias=True)
    down, convolved = torch.randn(rank + 2 * k, inner) * inner**-0.5, poisoned(batch, inner)
    selected = poisoned(batch, rank + 2 * k)
    own = torch.randn(inner, rank) * rank**-0.5, torch.randn(inner), -torch.rand(inner, k), torch.randn(inner)
    state, mixed = torch.randn(batch, inner, k), poisoned(batch, inner)
    for here in (0, taps):
        x = torch.randn(batch, 2 * inner)
        args = x, part, torch.tensor(here), down, convolved, selected
        agree(selective_project, selective_project_reference, args, [convolved, selected, part.ring])
        args = x, convolved, selected, Selective(*own), state, mixed
        agree(selective_step, selective_step_reference, args, [state, mixed])


@interpreted
def test_read_kernel() -> None:
    x = torch.randint(-999, 999, (2 * 16384,), dtype=torch.int32)
    out = torch.zeros(2, dtype=torch.int32)
    agree(read_sums, read_sums_reference, (x, out), [out])


@interpreted
def test_kernels_make_a_plan() -> None:
    options = {"a": {"head_dim": 16, "kv_heads": 1}, "m2": {"head_dim": 16, "state": 16}, "f": {"multiple_of": 32}}
    model = model_of("a m2 f", hidden_size=32, options=options, meta_tokens=2)
    plan = DecodePlan(model, 1, 6, TRITON)
    poison(plan)
    with torch.no_grad():
        follow(model, plan, torch.randint(VOCABULARY, (1, 2)), 0)
