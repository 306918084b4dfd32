"""The recurrences through flash-linear-attention's Triton kernels: what GPUs train with.

Same arguments and results as the functions of ``recurrence.py``, which are the truth that they are tested
against. Inputs are cast to bf16 (or fp16, where that is what comes in): the kernels take no fp32.
The operators' functions are called directly; the library's layer classes swallow unknown options.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from archsearch.errors import EnvironmentUnfit
from archsearch.model.recurrence import Mixed

MIN_TRITON = (3, 7, 1)
"""Triton from 3.4 up to this miscompiles the gated backward pass on Hopper: wrong gradients, no error."""

HOPPER = (9, 0)


def require(device: torch.device) -> None:
    """Raise EnvironmentUnfit where the kernels are missing or known to give wrong gradients on ``device``."""
    if device.type != "cuda":
        raise EnvironmentUnfit(f"flash-linear-attention's kernels do not run on {device}", "set proxy.kernels=auto")
    missing = [name for name in ("fla", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentUnfit(
            f"training on a GPU needs {' and '.join(missing)}",
            "pip install 'archsearch[cuda]', or set proxy.kernels=torch for the slow reference",
        )
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    if torch.cuda.get_device_capability(device) == HOPPER and (3, 4, 0) <= version < MIN_TRITON:
        raise EnvironmentUnfit(
            f"Triton {triton.__version__} gives wrong gradients of gated operators on Hopper GPUs",
            "install triton 3.7.1 or later, or set proxy.kernels=torch for the slow reference",
        )


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None) -> Mixed:
    """The delta rule with raw ``q`` and ``k``, which the kernels normalise; shapes as in ``delta_rule_chunked``."""
    q, k, v = _half(q, k, v)
    shared: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    if decay is None:
        from fla.ops.delta_rule import chunk_delta_rule

        o, state = chunk_delta_rule(q, k, v, beta.to(q.dtype), **shared)
        return o, state.mT
    if decay.dim() == k.dim():
        from fla.ops.kda import chunk_kda

        return chunk_kda(q, k, v, decay.float(), beta.float(), state_v_first=True, **shared)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, decay.float(), beta.float(), state_v_first=True, **shared)


def gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Mixed:
    """Gated linear attention; shapes as in ``gla_chunked``."""
    from fla.ops.gla import chunk_gla

    q, k, v = _half(q, k, v)
    return chunk_gla(q, k, v, decay.float(), output_final_state=True, state_v_first=True)


def rwkv7(r: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, strongest: float) -> Mixed:
    """RWKV-7's recurrence, its log decays at least ``strongest``; shapes as in ``dplr_chunked``."""
    from fla.ops.rwkv7 import chunk_rwkv7

    r, k, v, a, b, decay = _half(r, k, v, a, b, decay)
    # the library's layer asks for the same: with decays this weak a chunk of 64 stays in range on the tensor cores
    bounded: dict[str, Any] = {"safe_gate": True, "lower_bound": strongest, "chunk_size": 64}
    o, state = chunk_rwkv7(r, decay, k, v, a, b, scale=1.0, output_final_state=True, **bounded)
    return o, state.mT


def ssd(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, rate: Tensor) -> Mixed:
    """Mamba-2's state-space model as linear attention with one decay a head; shapes as in ``Mamba2.mix``."""
    from fla.ops.simple_gla import chunk_simple_gla

    repeats = x.shape[2] // b.shape[2]
    c, b = (t.repeat_interleave(repeats, dim=2) for t in (c, b))
    c, b, scaled = _half(c, b, x * dt[..., None].to(x.dtype))
    return chunk_simple_gla(c, b, scaled, (dt * rate).float(), scale=1.0, output_final_state=True, state_v_first=True)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of each query [B, heads, T, D] to the last ``window`` keys [B, kv_heads, T, D]."""
    from fla.ops.attn import parallel_attn

    q, k, v = (t.transpose(1, 2) for t in _half(q, k, v))
    return parallel_attn(q, k, v, window_size=window).transpose(1, 2)


def _half(*tensors: Tensor) -> tuple[Tensor, ...]:
    half = torch.float16 if tensors[0].dtype is torch.float16 else torch.bfloat16
    return tuple(t.to(half).contiguous() for t in tensors)
