"""What makes a latency count: the timed path computes the model, moves on, and the device was well."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from archsearch.errors import ArchsearchError
from archsearch.latency.runtime import Runtime
from archsearch.model.hybrid import HybridLM

CHECKED_TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative error ‖step - forward‖ / ‖forward‖ of the logits; bf16 rounds each of dozens of layers."""


class InvalidMeasurement(ArchsearchError):
    """A latency was measured that cannot be trusted."""

    exit_code = 4


class Disturbed(InvalidMeasurement):
    """The device was not left alone: measuring again may help."""


def check_runtime(runtime: Runtime, model: HybridLM, batch: int, tokens: int) -> float:
    """Feed random tokens through the very steps that will be timed and compare with the model's forward.

    Each step must give the forward's logits, feed its own argmax back and count one token. That also
    catches a graph that reads a stale buffer, where greedy tokens of random weights may rightly repeat.

    Returns:
        The largest relative error of the logits.

    Raises:
        InvalidMeasurement: any of these fails.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary, length = model.architecture.vocab_size, min(CHECKED_TOKENS, tokens)
    fed = torch.randint(vocabulary, (batch, length), generator=generator).to(runtime.token.device)
    rows = sorted({0, batch - 1})
    expected = model(fed[rows])
    runtime.begin()
    errors = []
    for index in range(length):
        runtime.feed(fed[:, index])
        runtime.step()
        errors.append(_error(runtime.logits[rows], expected[:, index]))
        _check_moved_on(runtime, index + 1)
    return _worst(errors, runtime)


def _worst(errors: list[float], runtime: Runtime) -> float:
    worst = float(np.max(errors))  # unlike Python's max, NaN wins
    if not worst <= TOLERANCE[runtime.logits.dtype]:
        raise InvalidMeasurement(
            f"decode steps ({runtime.path}) give other logits than the forward pass: relative error {worst:.2g}",
            "report this with the architecture: one of the two is wrong",
        )
    return worst


def check_depth(runtime: Runtime, model: HybridLM, tokens: int) -> float:
    """Compare one step deep in the cache with the model's own, from the same state of random numbers.

    The forward pass of ``check_runtime`` is short; this is where the cache is split among many programs.

    Returns:
        The largest relative error of the logits, over all sequences, in the middle and at the last position.

    Raises:
        InvalidMeasurement: the two do not agree.
    """
    weight = model.embed_tokens.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    state = model.allocate_state(1, tokens)
    for layer in state.layers:
        for buffer in layer.values():
            buffer.normal_(generator=generator)
    errors = []
    for depth in sorted({tokens // 2, tokens - 1}):
        state.position.fill_(depth + model.n_meta)
        token = torch.randint(len(weight), (1,), device=weight.device, generator=generator)
        runtime.load(state, token.expand(len(runtime.token)))
        runtime.step()
        errors.append(_error(runtime.logits, model.step(token, state)))
        _check_moved_on(runtime, depth + 1)
    return _worst(errors, runtime)


def check_prefill(model: HybridLM, path: str, length: int) -> float:
    """Compare a prompt through the implementation ``path`` with the plain-torch reference.

    Returns:
        The largest relative error, of the logits and of each state buffer.

    Raises:
        InvalidMeasurement: the two do not agree.
    """
    weight = model.embed_tokens.weight
    tokens = torch.randint(len(weight), (1, length), generator=torch.Generator().manual_seed(0)).to(weight.device)

    def prefilled(path: str) -> list[Tensor]:
        state = model.use(path).allocate_state(1, length)
        logits = model.prefill(tokens, state)
        return [logits, *(buffer.flatten() for layer in state.layers for buffer in layer.values())]

    pairs = zip(prefilled("torch"), prefilled(path), strict=True)
    logits, *states = [_error(found, expected) for expected, found in pairs]
    worst = float(np.max([logits, *states]))
    # a state holds what the layers before it rounded, and no final norm and head smooth it
    if not (logits <= TOLERANCE[weight.dtype] and worst <= 2 * TOLERANCE[weight.dtype]):
        cause = f"prefill ({path}) gives other logits or states than the reference: relative error {worst:.2g}"
        cause += f", of the logits {logits:.2g}"
        raise InvalidMeasurement(cause, "report this with the architecture: one of the two is wrong")
    return worst


def _error(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.float() - expected.float(), dim=-1)
    return float((difference / torch.linalg.vector_norm(expected.float(), dim=-1)).max())


def _check_moved_on(runtime: Runtime, position: int) -> None:
    if not torch.equal(runtime.token, runtime.logits.argmax(-1)):
        raise InvalidMeasurement(f"a decode step ({runtime.path}) does not feed its token back", "report this")
    check_position(runtime, position)


def check_position(runtime: Runtime, expected: int) -> None:
    """Raise InvalidMeasurement unless the device has counted ``expected`` tokens."""
    if (found := runtime.position()) != expected:
        cause = f"after {expected} tokens the device ({runtime.path}) counts {found}"
        raise InvalidMeasurement(cause, "report this: steps were lost or repeated")


def check_end(runtime: Runtime) -> None:
    """Raise InvalidMeasurement if the last logits are not finite."""
    if not bool(torch.isfinite(runtime.logits).all()):
        raise InvalidMeasurement("decoding ended in NaN or infinity", "check the architecture's operators")
