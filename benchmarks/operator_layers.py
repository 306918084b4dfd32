"""The layers that ``operators.py`` compares, ours and the same of flash-linear-attention, and how a step is timed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from archsearch.operators import OPERATORS

if TYPE_CHECKING:
    import torch

BATCH, LENGTH = 16, 1024

WARM_S = 0.1
"""Seconds of steps before those that are measured."""

MEASURED = 3
"""Times as many steps are measured."""


def ours(kind: str, hidden: int) -> torch.nn.Module:
    """Our layer with drawn weights, in fp32 as in training, on the GPU path."""
    import torch

    from archsearch.model.layers import LAYERS

    with torch.device("cuda"):
        layer = LAYERS[kind](OPERATORS[kind](), hidden)
        layer.init_weights(torch.Generator("cuda").manual_seed(0), 0.02)
    layer.require()
    layer.path = "fla"
    return layer


def theirs(kind: str, hidden: int) -> torch.nn.Module | None:
    """The same layer of flash-linear-attention, where it can run."""
    from archsearch.model import fla_library
    from archsearch.model.requirements import installed

    if kind in ("m", "m2"):
        if not installed("mamba_ssm"):
            return None
        fla_library.load("mamba_ssm.ops.triton.ssd_combined")  # whose package cannot be imported without its extension
    from archsearch.model import tuned

    layer = _theirs(kind, hidden, hidden // 128).cuda()
    tuned.install()
    # in training mode these two ask for causal-conv1d's extension; in eval mode they run a Triton convolution
    return layer.eval() if kind in ("m", "m2") else layer


def _theirs(kind: str, hidden: int, heads: int) -> torch.nn.Module:
    from fla import layers
    from fla.modules.mlp import GatedMLP

    if kind in ("a", "w"):
        layers.attn.flash_attn_func = flash_attention
        return layers.Attention(hidden_size=hidden, num_heads=heads, window_size=512 if kind == "w" else None)
    if kind == "m":
        return layers.Mamba(hidden_size=hidden, intermediate_size=2 * hidden, layer_idx=0)
    if kind == "m2":
        sizes = {"num_heads": hidden // 32, "head_dim": 64, "state_size": 128, "expand": 2, "n_groups": 1}
        return layers.Mamba2(hidden_size=hidden, layer_idx=0, **sizes)
    if kind == "d":
        return layers.DeltaNet(hidden_size=hidden, num_heads=heads, norm_eps=1e-6)
    if kind == "gd":
        return layers.GatedDeltaNet(hidden_size=hidden, head_dim=128, num_heads=heads, expand_v=1, norm_eps=1e-6)
    if kind == "kda":
        return layers.KimiDeltaAttention(hidden_size=hidden, num_heads=heads, norm_eps=1e-6)
    if kind == "gl":
        return layers.GatedLinearAttention(hidden_size=hidden, num_heads=hidden // 256, norm_eps=1e-6)
    if kind == "r7":
        return layers.RWKV7Attention(hidden_size=hidden, layer_idx=0, num_hidden_layers=24)
    if kind == "hg":
        return layers.HGRN2Attention(hidden_size=hidden, norm_eps=1e-6)
    return GatedMLP(hidden_size=hidden, intermediate_size=3 * hidden)


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, window_size: tuple[int, int]
) -> torch.Tensor:
    """``flash_attn_func`` of the package flash-attn, by the copy of its kernels (FlashAttention-2) within torch."""
    import torch

    left, right = window_size
    window: dict[str, Any] = {} if left < 0 else {"window_size_left": left, "window_size_right": right}
    lengths = q.shape[1], k.shape[1]
    return torch.ops.aten._flash_attention_forward(q, k, v, None, None, *lengths, 0.0, causal, False, **window)[0]


def step(layer: torch.nn.Module, x: torch.Tensor) -> None:
    """One forward and backward."""
    import torch

    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.ones_like(y))


def wake_autograd() -> None:
    """Run a kernel in the thread that computes gradients: cuBLAS, often the first there, finds no context else."""
    import torch

    (2 * torch.zeros(1, device="cuda", requires_grad=True)).sum().backward()


def timed(run: Callable[[], Any]) -> float:
    """Median milliseconds of ``run``, by device events.

    Many of them: where the host limits them, a few are at the mercy of what the machine does beside.
    """
    import torch

    start, repeats = time.perf_counter(), 0
    while repeats < 3 or time.perf_counter() - start < WARM_S:
        run()
        torch.cuda.synchronize()
        repeats += 1
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(max(20, MEASURED * repeats) + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def captured(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """The step as one CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer.zero_grad()
            step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layer, x)
    return graph.replay


def figures(layer: torch.nn.Module, hidden: int) -> dict[str, Any]:
    """Time eager and as a graph, and peak memory, of one step."""
    import torch

    x = torch.randn(BATCH, LENGTH, hidden, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"ms": timed(lambda: step(layer, x))}
    row["memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        row["graph_ms"] = timed(captured(layer, x))
    except Exception as problem:  # a layer that waits for the device cannot be captured: that is a finding
        row["graph_ms"], row["no_graph"] = None, str(problem).partition("\n")[0]
    return row
