"""What makes a latency count: the timed path computes the model, moves on, and the device was well."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from archsearch.errors import ArchsearchError
from archsearch.latency.runtime import Runtime
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.schema import Frozen

CHECKED_TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative error ‖step - forward‖ / ‖forward‖ of the logits; bf16 rounds each of dozens of layers."""
ROUNDING = 1.5
"""How far a prefill through kernels may be from fp32, where plain torch in the model's own type is 1 away: two
implementations round in different places."""


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


class PrefillErrors(Frozen):
    """What a prefill through kernels is off by: the largest relative error of the logits and of each state buffer.

    Attributes:
        reference: against the plain-torch reference in the model's own type.
        fp32: of the kernels and of the reference, each against the reference in fp32, logits and states apart; absent
            where the first comparison was enough.
    """

    reference: float
    fp32: dict[str, tuple[float, float]] | None = None


def check_prefill(model: HybridLM, path: str, length: int) -> PrefillErrors:
    """Compare a prompt through the implementation ``path`` with the plain-torch reference.

    Both round each layer, so in deep models they may differ by more than ``TOLERANCE`` though neither is wrong. The
    same weights in fp32 decide then: the kernels may be ``ROUNDING`` times as far from those as the reference is.

    Raises:
        InvalidMeasurement: the two do not agree, and rounding does not explain it.
    """
    weight = model.embed_tokens.weight
    tokens = torch.randint(len(weight), (1, length), generator=torch.Generator().manual_seed(0)).to(weight.device)
    reference, found = (_prefilled(model.use(one), tokens) for one in ("torch", path))
    errors, bound = _apart(found, reference), TOLERANCE[weight.dtype]
    checked = PrefillErrors(reference=float(np.max(list(errors.values()))))
    # a state holds what the layers before it rounded, and no final norm and head smooth it
    if errors["logits"] <= bound and errors["states"] <= 2 * bound:
        return checked
    cause = f"prefill ({path}) gives other logits or states than the reference: relative error {checked.reference:.2g}"
    cause += f", of the logits {errors['logits']:.2g}"
    if weight.dtype == torch.float32:
        raise InvalidMeasurement(cause, "report this with the architecture: one of the two is wrong")
    try:
        exact = _prefilled(_in_fp32(model), tokens)
    except torch.OutOfMemoryError:
        remedy = "free memory for the weights in fp32: they tell rounding from a fault"
        raise InvalidMeasurement(cause, remedy) from None
    ours, theirs = _apart(found, exact), _apart(reference, exact)
    if not all(ours[name] <= ROUNDING * theirs[name] for name in ours):
        cause += f"; against fp32 {ours['logits']:.2g} (the reference {theirs['logits']:.2g})"
        cause += f", states {ours['states']:.2g} ({theirs['states']:.2g})"
        raise InvalidMeasurement(cause, "report this with the architecture: one of the two is wrong")
    return checked.model_copy(update={"fp32": {name: (ours[name], theirs[name]) for name in ours}})


def _prefilled(model: HybridLM, tokens: Tensor) -> list[Tensor]:
    """Logits of a prompt, then all state buffers, flat."""
    state = model.allocate_state(1, tokens.shape[1])
    logits = model.prefill(tokens, state)
    return [logits, *(buffer.flatten() for layer in state.layers for buffer in layer.values())]


def _apart(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative error of the logits, and the largest of a state."""
    logits, *states = [_error(*pair) for pair in zip(found, expected, strict=True)]
    return {"logits": logits, "states": float(np.max(states))}  # unlike Python's max, NaN wins


def _in_fp32(model: HybridLM) -> HybridLM:
    """The same weights in fp32, through plain torch."""
    exact = build_model(model.architecture, 0, model.embed_tokens.weight.device, torch.float32)
    exact.load_state_dict(model.state_dict())
    return exact


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
