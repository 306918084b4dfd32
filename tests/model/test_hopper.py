"""The machine code of the kernels that a decode step waits for most, compiled for a Hopper GPU without one."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from archsearch.model.kernels.gemv import gemv_kernel
from archsearch.model.kernels.split_attention import attend_kernel


def compiled(kernel: Any, floats: tuple[str, ...], pointers: dict[str, str], warps: int, **constants: Any) -> str:
    """The PTX of ``kernel``, which Triton's assembler accepted for Hopper; unnamed arguments are multiples of 16."""
    types, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        types[name] = "constexpr" if name in constants else "fp32" if name in floats else pointers.get(name, "i32")
        if types[name] not in ("constexpr", "fp32"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "launch_pdl": True}
    ).asm["ptx"]


@pytest.mark.parametrize(("dtype", "epilogue", "products"), [("bf16", 0, 2), ("bf16", 1, 4), ("fp32", 0, 0)])
def test_a_projection_asks_for_its_weights_and_then_waits(dtype: str, epilogue: int, products: int) -> None:
    names = ("x", "gain", "weight", "bias", "out")
    pointers = dict.fromkeys(names, f"*{dtype}") | {"squares": "*fp32", "best": "*fp32", "best_row": "*i32"}
    sizes = {"K": 256, "GROUP": 256, "ROWS": 2, "STEPS": 1, "CHUNK": 256, "PARTS": 1, "PARTS_BLOCK": 1}
    flags = {"GAIN": True, "SQUARES": False, "BIAS": False, "EPILOGUE": epilogue, "PDL": True}
    ptx = compiled(gemv_kernel, ("eps",), pointers, warps=1, **sizes, **flags)
    before, after = ptx.split("griddepcontrol.wait")
    halves = 4 if epilogue == 1 else 2
    loads = 256 * halves * (2 if dtype == "bf16" else 4) // (32 * 16)
    assert before.count("evict_first") >= loads, "all weights, sixteen bytes a load"
    assert "evict_first" not in after
    assert ptx.count("mma.sync") == products


def test_attention_unpacks_its_cache_without_detours() -> None:
    names = ("projected", "q_gain", "k_gain", "keys", "values", "out")
    sums = ("rotary", "partial", "tops", "weights")
    pointers = {**dict.fromkeys(names, "*bf16"), **dict.fromkeys(sums, "*fp32"), "position": "*i64", "arrivals": "*i32"}
    sizes = {"DIM": 128, "DIM_BLOCK": 128, "GROUP": 1, "BLOCK": 8, "UNROLL": 2, "SPLITS": 4, "TOKENS": 128}
    ptx = compiled(attend_kernel, ("scale", "eps"), pointers, warps=4, **sizes, NORM=False, RING=False, PDL=True)
    tiles = 2 * 2 * 4  # of keys and values, two a step, four pairs of numbers a thread in each
    assert ptx.count("0xffff0000") >= tiles
    before, _ = ptx.split("griddepcontrol.wait")
    assert before.count(".v4.b32") >= 4, "the first tokens are asked for before the wait"
