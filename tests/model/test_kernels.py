"""Decode kernels against their twins, and decode plans against the model.

Kernels run in Triton's interpreter, which must be chosen before Triton is imported, so one test runs the tests that
need it in a process of their own. The others run here, on the twins.
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

from archsearch.architecture import make_architecture
from archsearch.errors import EnvironmentUnfit, UsageError
from archsearch.model import layers
from archsearch.model.decode import DecodeGraph, DecodePlan
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.model.kernels import TORCH, TRITON
from archsearch.model.kernels.attention import Heads, attend, attend_reference, attention_scratch, rotary_table
from archsearch.model.kernels.bandwidth import read_sums, read_sums_reference
from archsearch.model.kernels.chains import CHAINS
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
from archsearch.operators import OPERATORS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_interpreter starts")
VOCABULARY = 77
OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"head_dim": 32, "heads": 3, "kv_heads": 1, "qk_norm": True},
    "w": {"head_dim": 24, "heads": 4, "kv_heads": 2, "window": 5, "qkv_bias": True},
    "d": {"head_dim": 32},
    "gd": {"head_dim": 24, "heads": 2},
    "kda": {"head_dim": 24, "heads": 2, "expand_v": 1.5, "gate_rank": 20},
    "gl": {"head_dim": 24},
    "hg": {"head_dim": 48},
    "r7": {"head_dim": 24, "decay_rank": 8, "rate_rank": 40},
    "m": {"state": 12, "dt_rank": 40},
    "m2": {"head_dim": 32, "state": 16, "groups": 2},
    "f": {"ratio": 2, "multiple_of": 32},
}
KINDS = [*OPTIONS, *(kind for kind in OPERATORS if kind not in OPTIONS)]


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


def model_of(kinds: str, **fields: Any) -> HybridLM:
    options = {kind: OPTIONS.get(kind, {"head_dim": 32}) for kind in set(kinds.split())}
    sizes = {"hidden_size": 96, "vocab_size": VOCABULARY, "operators": kinds, "options": options, **fields}
    model = build_model(make_architecture(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def follow(model: HybridLM, plan: DecodePlan, tokens: Tensor, start: int) -> None:
    """Feed ``tokens`` from ``start`` on and compare each step's logits with the model's forward."""
    want = model(tokens)
    for i in range(start, tokens.shape[1]):
        plan.feed(tokens[:, i])
        plan.step()
        torch.testing.assert_close(plan.logits, want[:, i], rtol=1e-3, atol=1e-3)
        assert torch.equal(plan.token, plan.logits.argmax(-1))


def poison(plan: DecodePlan) -> None:
    for chain in plan.chains:
        for name in {"k", "v"} & set(chain.state):
            chain.state[name][:, :, int(plan.position) :] = torch.nan


@interpreted
def test_kernels_make_a_plan() -> None:
    options = {"a": {"head_dim": 16, "kv_heads": 1}, "m2": {"head_dim": 16, "state": 16}, "f": {"multiple_of": 32}}
    model = model_of("a m2 f", hidden_size=32, options=options, meta_tokens=2)
    plan = DecodePlan(model, 1, 6, TRITON)
    poison(plan)
    with torch.no_grad():
        follow(model, plan, torch.randint(VOCABULARY, (1, 2)), 0)


plain = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")


@plain
@pytest.mark.parametrize("kinds", [*KINDS, "a f d m2 f w gd kda gl r7 m f"])
@pytest.mark.parametrize("batch", [1, 3])
def test_plan_follows_the_model(kinds: str, batch: int) -> None:
    model = model_of(kinds, meta_tokens=3 * (batch == 1), tie_embeddings=batch == 1)
    plan = DecodePlan(model, batch, 20, TORCH)
    poison(plan)
    with torch.no_grad():
        follow(model, plan, torch.randint(VOCABULARY, (batch, 12)), 0)
        plan.begin()
        follow(model, plan, torch.randint(VOCABULARY, (batch, 12)), 0)
    assert int(plan.position) == 12 + plan.meta


@plain
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_plan_goes_on_from_a_prefill(prompt: int) -> None:
    model = model_of("a d w m2 m gl r7 gd kda hg f", meta_tokens=2)
    plan, tokens = DecodePlan(model, 2, 20, TORCH), torch.randint(VOCABULARY, (2, 14))
    state = model.allocate_state(2, 20)
    with torch.no_grad():
        model.prefill(tokens[:, :prompt], state)
        plan.load(state, tokens[:, prompt])
        poison(plan)
        follow(model, plan, tokens, prompt)


@plain
def test_plan_feeds_its_own_tokens_back() -> None:
    model = model_of("d a f")
    plan = DecodePlan(model, 1, 10, TORCH)
    tokens = [0]
    with torch.no_grad():
        for _ in range(5):
            plan.step()
            tokens.append(int(plan.token))
        assert model(torch.tensor([tokens[:-1]])).argmax(-1)[0].tolist() == tokens[1:]


@plain
def test_equal_fusion() -> None:
    plan = DecodePlan(model_of(" ".join(OPTIONS)), 1, 8, TORCH)
    mixers = dict.fromkeys(OPTIONS, 3)
    assert plan.kernels == {**mixers, "m": 4, "f": 2, "head": 2}
    assert plan.kernels_per_token == (len(OPTIONS) - 1) * 3 + 1 + 2 + 2
    assert not plan.plain


@plain
def test_kind_without_kernels_runs_its_own_step(monkeypatch) -> None:
    monkeypatch.delitem(CHAINS, layers.GatedDeltaNet)
    model = model_of("gd f", meta_tokens=2)
    plan, tokens = DecodePlan(model, 2, 20, TORCH), torch.randint(VOCABULARY, (2, 14))
    assert plan.plain == {"gd"}
    state = model.allocate_state(2, 20)
    with torch.no_grad():
        follow(model, plan, tokens, 0)
        model.prefill(tokens[:, :5], state)
        plan.load(state, tokens[:, 5])
        follow(model, plan, tokens, 5)


@plain
def test_plan_refuses_what_it_cannot_do() -> None:
    model = model_of("a f", meta_tokens=2)
    for batch, length in ((0, 8), (1, 0)):
        with pytest.raises(UsageError):
            DecodePlan(model, batch, length, TORCH)
    plan = DecodePlan(model, 1, 8, TORCH)
    for tokens in (-1, 8):
        with pytest.raises(UsageError):
            plan.seek(tokens)
    with pytest.raises(UsageError, match="2 x 10"):
        plan.load(model.allocate_state(2, 8), torch.zeros(2, dtype=torch.int64))
    plan.seek(7)
    plan.step()
    plan.check()
    plan.step()
    with pytest.raises(UsageError, match="11 tokens decoded into 10"):
        plan.check()
    with pytest.raises(UsageError, match="float64"):
        DecodePlan(model.double(), 1, 8, TORCH)


@plain
@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_graph_needs_a_gpu() -> None:
    with pytest.raises(EnvironmentUnfit):
        DecodeGraph(model_of("f"), 1, 8)


@plain
def test_kernels_of_larger_batches_are_counted() -> None:
    plan = DecodePlan(model_of("a d f"), 2, 8, TRITON)
    assert plan.kernels == {"a": 4, "d": 5, "f": 4, "head": 4}
    assert plan.kernels_per_token == 4 + 5 + 4 + 4
