"""What makes a latency count: the timed path computes the model, moves on, and the device was well."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from archsearch.errors import ArchsearchError
from archsearch.latency.runtime import Runtime
from archsearch.model.hybrid import DecodeState, HybridLM, build_model
from archsearch.schema import Frozen

CHECKED_TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative error ‖step - forward‖ / ‖forward‖ of the logits; bf16 rounds each of dozens of layers."""
ROUNDING = 1.5
"""Where two implementations differ by more, how far the kernels' may be from the same weights in fp32, plain torch in
the model's own type being 1 away: both round each layer, in different places, and what differs grows with depth."""
REPORT = "report this with the architecture: one of the two is wrong"
Outputs = dict[str, list[Tensor]]
"""What two implementations are compared in, under the name of its kind: logits, states."""


class InvalidMeasurement(ArchsearchError):
    """A latency was measured that cannot be trusted."""

    exit_code = 4


class Disturbed(InvalidMeasurement):
    """The device was not left alone: measuring again may help."""


class Errors(Frozen):
    """What kernels were accepted with: the largest relative errors, of the logits and, after a prefill, of the states.

    Attributes:
        reference: against plain torch in the model's own type.
        fp32: of the kernels and of that reference, each against plain torch in fp32, under the name of what was
            compared; absent where the first comparison was enough.
    """

    reference: float
    fp32: dict[str, tuple[float, float]] | None = None


def check_runtime(runtime: Runtime, model: HybridLM, batch: int, tokens: int) -> Errors:
    """Feed random tokens through the very steps that will be timed and compare with the model's forward.

    Each step must give the forward's logits, feed its own argmax back and count one token. That also
    catches a graph that reads a stale buffer, where greedy tokens of random weights may rightly repeat.

    Raises:
        InvalidMeasurement: any of these fails.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary, length = model.architecture.vocab_size, min(CHECKED_TOKENS, tokens)
    fed = torch.randint(vocabulary, (batch, length), generator=generator).to(runtime.token.device)
    rows = sorted({0, batch - 1})
    runtime.begin()
    found = []
    for index in range(length):
        runtime.feed(fed[:, index])
        runtime.step()
        found.append(runtime.logits[rows])
        _check_moved_on(runtime, index + 1)

    def forward(model: HybridLM) -> Outputs:
        return {"logits": list(model(fed[rows]).unbind(1))}

    return _accepted(f"decode steps ({runtime.path}) give", {"logits": found}, forward, model)


def check_depth(runtime: Runtime, model: HybridLM, tokens: int) -> Errors:
    """Compare one step deep in the cache with the model's own, from the same state of random numbers.

    The forward pass of ``check_runtime`` is short; this is where the cache is split among many programs: in its
    middle and at the last position, all sequences alike.

    Raises:
        InvalidMeasurement: the two do not agree.
    """
    drawn, token = _draw(model, tokens)
    depths = sorted({tokens // 2, tokens - 1})
    found = []
    for depth in depths:
        drawn.position.fill_(depth + model.n_meta)
        runtime.load(drawn, token.expand(len(runtime.token)))
        runtime.step()
        found.append(runtime.logits.clone())
        _check_moved_on(runtime, depth + 1)

    def step(model: HybridLM) -> Outputs:
        logits = []
        for depth in depths:
            state = model.allocate_state(1, tokens)
            state.position.fill_(depth + model.n_meta)
            for buffers, random in zip(state.layers, drawn.layers, strict=True):
                for name, buffer in buffers.items():
                    buffer.copy_(random[name])
            logits.append(model.step(token, state))
        return {"logits": logits}

    return _accepted(f"decode steps ({runtime.path}) give", {"logits": found}, step, model)


def _draw(model: HybridLM, tokens: int) -> tuple[DecodeState, Tensor]:
    """A state of random numbers and a random token."""
    weight = model.embed_tokens.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    state = model.allocate_state(1, tokens)
    for layer in state.layers:
        for buffer in layer.values():
            buffer.normal_(generator=generator)
    return state, torch.randint(len(weight), (1,), device=weight.device, generator=generator)


def check_prefill(model: HybridLM, path: str, length: int) -> Errors:
    """Compare a prompt through the implementation ``path`` with the plain-torch reference.

    Raises:
        InvalidMeasurement: the two do not agree.
    """
    weight = model.embed_tokens.weight
    tokens = torch.randint(len(weight), (1, length), generator=torch.Generator().manual_seed(0)).to(weight.device)

    def prefilled(model: HybridLM) -> Outputs:
        state = model.allocate_state(1, length)
        logits = model.prefill(tokens, state)
        return {"logits": [logits], "states": [buffer.flatten() for layer in state.layers for buffer in layer.values()]}

    found = prefilled(model.use(path))
    return _accepted(f"prefill ({path}) gives", found, prefilled, model.use("torch"))


def _accepted(what: str, found: Outputs, reference: Callable[[HybridLM], Outputs], model: HybridLM) -> Errors:
    """Hold what kernels gave against ``reference`` of the model; where that is not enough, of the model in fp32.

    Raises:
        InvalidMeasurement: the kernels are further from fp32 than rounding explains.
    """
    dtype, plain = model.embed_tokens.weight.dtype, reference(model)
    # a state holds what the layers before it rounded, and no final norm and head smooth it
    bounds = {"logits": TOLERANCE[dtype], "states": 2 * TOLERANCE[dtype]}
    errors = {name: _largest(found[name], plain[name]) for name in found}
    worst = float(np.max(list(errors.values())))  # unlike Python's max, NaN wins
    if all(error <= bounds[name] for name, error in errors.items()):
        return Errors(reference=worst)
    told = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    cause = f"{what} other {' or '.join(errors)} than the reference: relative error of {told}"
    if dtype == torch.float32:
        raise InvalidMeasurement(cause, REPORT)
    try:
        exact = reference(_in_fp32(model))
    except torch.OutOfMemoryError:
        raise InvalidMeasurement(
            cause, "free memory for the weights in fp32: they tell rounding from a fault"
        ) from None
    fp32 = {name: (_largest(found[name], exact[name]), _largest(plain[name], exact[name])) for name in found}
    if all(ours <= ROUNDING * theirs for ours, theirs in fp32.values()):
        return Errors(reference=worst, fp32=fp32)
    pairs = ", ".join(f"{name} {ours:.2g} (the reference {theirs:.2g})" for name, (ours, theirs) in fp32.items())
    raise InvalidMeasurement(f"{cause}; off fp32 {pairs}", REPORT)


def _in_fp32(model: HybridLM) -> HybridLM:
    """The same weights in fp32, through plain torch."""
    exact = build_model(model.architecture, 0, model.embed_tokens.weight.device, torch.float32)
    exact.load_state_dict(model.state_dict())
    return exact


def _largest(found: list[Tensor], expected: list[Tensor]) -> float:
    return float(np.max([_error(*pair) for pair in zip(found, expected, strict=True)]))


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
