"""Checks that every operator's layer must pass, whatever its kind.

The truth is the layer's own one-token step, run token by token in fp64 on a CPU: it follows the definition
of the recurrence and knows nothing of chunks, blocks or padding.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from archsearch.model.layers import LAYERS, Layer, State
from archsearch.operators import OPERATORS, OperatorConfig

LENGTHS = (1, 63, 65, 127, 300)
"""Shorter and longer than a chunk and than a window, and no multiple of either."""


@dataclass(frozen=True)
class Case:
    """A kind with options at a width."""

    kind: str
    hidden: int = 32
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> OperatorConfig:
        """The operator's configuration."""
        return OPERATORS[self.kind].model_validate(self.options)

    def build(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Layer:
        """The layer with weights large enough that every path matters."""
        layer = LAYERS[self.kind](self.config, self.hidden)
        generator = torch.Generator().manual_seed(0)
        layer.init_weights(generator, residual_std=0.3)
        with torch.no_grad():
            for parameter in layer.parameters():
                # of a wide layer's matrices less, or what they give grows with the width and saturates
                scale = 0.2 if parameter.ndim < 2 else min(0.2, parameter.shape[-1] ** -0.5)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        return layer.to(device, dtype)

    def inputs(self, length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        """Normal activations [batch, length, hidden], the same at every call."""
        generator = torch.Generator().manual_seed(length)
        return torch.randn(batch, length, self.hidden, generator=generator, dtype=torch.float64).to(dtype)

    def __str__(self) -> str:
        return "-".join([self.kind, *(f"{key}{value:g}" for key, value in self.options.items())])


def every_kind(cases: list[Case], *small: tuple[int, int]) -> list[Case]:
    """``cases``, and for each kind that has none one of each ``small`` pair of hidden size and head dim."""
    missing = OPERATORS.keys() - {case.kind for case in cases}
    found = list(cases)
    for kind in (kind for kind in OPERATORS if kind in missing):
        fields = OPERATORS[kind].model_fields.keys()
        for hidden, size in small:
            found.append(Case(kind, hidden, {name: size for name in ("head_dim", "state") if name in fields}))
    return found


CASES = [
    Case("a", options={"head_dim": 8, "kv_heads": 2, "qk_norm": True, "qkv_bias": True}),
    Case("a", options={"head_dim": 16, "heads": 4, "kv_heads": 1}),
    Case("w", options={"head_dim": 8, "kv_heads": 2, "window": 7}),
    Case("w", options={"head_dim": 16, "window": 70, "qk_norm": True}),
    Case("m", options={"state": 8}),
    Case("m", options={"state": 5, "expand": 1.5, "dt_rank": 3, "conv": 3}),
    Case("m2", options={"head_dim": 8, "state": 8, "groups": 2}),
    Case("m2", options={"head_dim": 16, "state": 24, "conv": 3}),
    Case("d", options={"head_dim": 8}),
    Case("d", options={"head_dim": 16, "heads": 3, "conv": 1}),
    Case("gd", options={"head_dim": 8, "expand_v": 1.5}),
    Case("gd", options={"head_dim": 16, "heads": 3}),
    Case("kda", options={"head_dim": 8, "expand_v": 1.5}),
    Case("kda", options={"head_dim": 16, "heads": 3, "gate_rank": 5, "conv": 2}),
    Case("gl", options={"head_dim": 8}),
    Case("gl", options={"head_dim": 16, "expand_k": 1.0, "gate_normalizer": 0.5}),
    Case("r7", options={"head_dim": 8}),
    Case("r7", options={"head_dim": 16, "decay_rank": 5, "rate_rank": 7, "gate_rank": 3}),
    Case("f", options={"multiple_of": 8}),
    Case("f", options={"ratio": 1.7, "multiple_of": 1}),
]
CASES = every_kind(CASES, (32, 8), (32, 16))


def new_state(layer: Layer, batch: int, length: int) -> State:
    """An empty state beside the layer's weights."""
    weight = next(layer.parameters())
    return layer.allocate_state(batch, length, weight.device, weight.dtype)


def run_steps(layer: Layer, x: Tensor, state: State, start: int = 0) -> Tensor:
    """Outputs [B, T, hidden] of stepping through ``x`` from position ``start``."""
    positions = torch.arange(start, start + x.shape[1], device=x.device)
    return torch.stack([layer.step(x[:, t], state, positions[t]) for t in range(x.shape[1])], dim=1)


def truth(layer: Layer, x: Tensor) -> Tensor:
    """What ``forward`` must give: the steps from an empty state. It can be differentiated."""
    return run_steps(layer, x, new_state(layer, len(x), x.shape[1]))


def gradients(layer: Layer, x: Tensor, *, stepwise: bool = False, first: int = 0) -> dict[str, Tensor]:
    """Output, and the gradients of a fixed function of its tokens from ``first`` on: input and every parameter."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    # the steps write into their state in place, so the backward pass needs copies of what it saves
    saved = torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda saved: saved)
    with saved if stepwise else contextlib.nullcontext():
        y = truth(layer, x) if stepwise else layer(x)
        weights = torch.cos(torch.arange(y.numel(), device=y.device)).reshape(y.shape)
        (y.float() if y.dtype is torch.bfloat16 else y).mul(weights)[:, first:].sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert x.grad is not None
    assert all(gradient is not None for gradient in found.values()), "a parameter is not used"
    return {"output": y.detach(), "input": x.grad, **found}


def check_gradients(case: Case, length: int) -> None:
    """Output and every gradient equal those of the steps."""
    layer, x = case.build(), case.inputs(length)
    expected, actual = (gradients(layer, x, stepwise=stepwise) for stepwise in (True, False))
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_single_precision(case: Case, length: int) -> None:
    """In fp32, output and every gradient stay close to those in fp64."""
    x = case.inputs(length, dtype=torch.float32)
    expected = gradients(case.build(), x.double(), stepwise=False)
    actual = gradients(case.build(torch.float32), x, stepwise=False)
    for name in expected:
        error = (actual[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


@torch.no_grad()
def check_prefill_then_step(case: Case, prompt: int, length: int) -> None:
    """Prefill of a prompt and steps after it equal ``forward``, from a state that held something else."""
    layer, x = case.build(), case.inputs(length, batch=3)
    state = new_state(layer, 3, length)
    layer.prefill(case.inputs(length - 1, batch=3), state)
    prefilled = layer.prefill(x[:, :prompt], state)
    stepped = run_steps(layer, x[:, prompt:], state, start=prompt)
    torch.testing.assert_close(torch.cat([prefilled, stepped], dim=1), layer(x), rtol=1e-8, atol=1e-9)


@torch.no_grad()
def check_states(case: Case, length: int) -> None:
    """Prefill leaves the very state that stepping leaves."""
    layer, x = case.build(), case.inputs(length)
    stepped, prefilled = new_state(layer, 2, length), new_state(layer, 2, length)
    run_steps(layer, x, stepped)
    layer.prefill(x, prefilled)
    torch.testing.assert_close(prefilled, stepped, rtol=1e-8, atol=1e-9)


def check_cost(case: Case, device: str = "cpu") -> None:
    """Parameters and state bytes are those that the configuration states."""
    layer, config = case.build(device=device), case.config
    assert sum(p.numel() for p in layer.parameters()) == config.parameters(case.hidden)
    matrices = sum(part.weight.numel() for part in layer.modules() if isinstance(part, torch.nn.Linear))
    assert matrices == config.matmul_parameters(case.hidden)
    for length in (3, 100):
        for dtype in (torch.bfloat16, torch.float32):
            state = layer.allocate_state(2, length, torch.device(device), dtype)
            stated = config.state_bytes(case.hidden, length, dtype.itemsize)
            assert sum(buffer.nbytes for buffer in state.values()) == 2 * stated


@torch.no_grad()
def check_bfloat16(case: Case, length: int, bound: float) -> None:
    """In bf16, and under autocast, the output's relative error stays below ``bound``."""
    x = case.inputs(length)
    half = case.build(torch.bfloat16)
    same = case.build(torch.float32)
    same.load_state_dict(half.state_dict())
    expected = same(x.bfloat16().float())
    mixed = case.build(torch.float32)
    mixed.load_state_dict(half.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = mixed(x.bfloat16().float())
    for actual in (half(x.bfloat16()), autocast):
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < bound, f"relative error {error:.1e}"


ROUNDINGS = 3.0
"""How often the effect of rounding the input is allowed: some ten independent roundings in a row add up to as much."""


def check_training_path(case: Case, length: int, device: str, bounds: dict[str, float]) -> None:
    """The path that ``device`` trains with, in bf16 under autocast, against the fp32 reference.

    Where rounding the input to bf16 alone moves the reference further than a bound, ``ROUNDINGS`` times that is
    the bound: no kernel can know better. Else that is 1 % and bounds nothing.

    Args:
        case: what to check.
        length: tokens of the two sequences.
        device: where both run.
        bounds: largest relative error of the ``output`` and of each gradient by name, ``other`` for the rest.
    """
    x = case.inputs(length, dtype=torch.float32).to(device)
    reference, trained = case.build(torch.float32, device), use_training_path(case.build(torch.float32, device))
    # The first token reads a multiple of its own value, and the norm behind takes the multiple away: by its queries
    # and keys there is no gradient but for rounding. Longer sequences leave it out.
    first = min(1, length - 1)
    expected = gradients(reference, x, first=first)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = gradients(trained, x, first=first)
    moved = gradients(reference, x.bfloat16().float(), first=first)
    scale = max(gradient.norm() for name, gradient in expected.items() if name not in ("output", "input"))
    errors, bad = {}, {}
    for name, true in expected.items():
        floor = 0.0 if name in ("output", "input") else (0.5 if length == 1 else 1e-3) * scale
        size = true.norm().clamp(min=floor)
        error, inherent = (float((found[name].float() - true).norm() / size) for found in (actual, moved))
        errors[name] = error
        if not error < max(bounds.get(name, bounds["other"]), ROUNDINGS * inherent):
            bad[name] = error, inherent
    print(f"{case} T={length}", " ".join(f"{name}={error:.1e}" for name, error in errors.items()))
    assert not bad, f"relative errors, and those of a rounded input alone: {bad}"


@torch.no_grad()
def check_prefill_on_training_path(case: Case, prompt: int, length: int, device: str, bound: float) -> None:
    """Prefill through the path that ``device`` trains with, in bf16, then fp32 steps, against the fp32 reference."""
    x = case.inputs(length, dtype=torch.float32).to(device)
    expected, layer = case.build(torch.float32, device)(x), use_training_path(case.build(torch.float32, device))
    state = new_state(layer, len(x), length)
    with torch.autocast(device, dtype=torch.bfloat16):
        prefilled = layer.prefill(x[:, :prompt], state)
    actual = torch.cat([prefilled.float(), run_steps(layer, x[:, prompt:], state, start=prompt)], dim=1)
    # token by token, so that a wrong state cannot hide behind a long prompt
    error = float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1).mean()).max())
    print(f"{case} prompt={prompt} error={error:.1e}")
    assert error < bound, f"relative error {error:.1e}"


def use_training_path(layer: Layer) -> Layer:
    """``layer`` on the fastest implementation that it has."""
    layer.path = layer.paths[-1]
    return layer


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch leaves uninitialised with NaN, so that reading it shows."""

    def poisoned(make: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return run

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
