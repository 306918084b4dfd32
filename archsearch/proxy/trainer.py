"""The proxy: a short training whose validation loss ranks architectures.

The recipe is that of the search in Nemotron-Flash (arXiv 2511.18890, App. C): AdamW at 5e-4 with a cosine
schedule; warm-up, clipping and decay of matrices alone are the field's custom.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from archsearch.architecture import Architecture
from archsearch.config import ProxyConfig
from archsearch.errors import ArchsearchError
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.model.training_path import prepare
from archsearch.proxy.data import Windows, load_corpus, validation_windows
from archsearch.proxy.loss import token_loss

Curve = tuple[tuple[int, float], ...]
Progress = Callable[[int, float], None]

STEPS_A_CHECK = 50
"""On a GPU the loss is looked at this rarely, as each look waits for the device."""


class NonFiniteLoss(ArchsearchError):
    """The loss became NaN or infinite after ``tokens`` tokens; ``curve`` holds the validations before."""

    exit_code = 3

    def __init__(self, tokens: int, curve: Curve) -> None:
        super().__init__(f"the loss is not finite after {tokens} tokens", "lower proxy.learning_rate")
        self.tokens, self.curve = tokens, curve

    def __reduce__(self) -> tuple[type[NonFiniteLoss], tuple[int, Curve]]:  # type: ignore[override]
        return type(self), (self.tokens, self.curve)


@dataclass(frozen=True, slots=True)
class ProxyResult:
    """What a proxy training found.

    Attributes:
        loss: last validation loss, nats a token.
        curve: (tokens trained, validation loss) at each validation.
        tokens: tokens trained.
        seconds: of the phases data, build, train, validate.
        paths: implementation that each operator kind trained with.
        dtype: of the matrix products.
        model: the trained model, in fp32.
    """

    loss: float
    curve: Curve
    tokens: int
    seconds: dict[str, float]
    paths: dict[str, str]
    dtype: str
    model: HybridLM

    @property
    def tokens_per_second(self) -> float:
        """Training tokens a second, validations left out."""
        return self.tokens / self.seconds["train"]


def train_proxy(
    architecture: Architecture,
    config: ProxyConfig,
    *,
    seed: int,
    device: torch.device | str,
    on_progress: Progress | None = None,
) -> ProxyResult:
    """Train ``architecture`` from scratch for ``config.tokens`` tokens, rounded up to whole steps.

    The same seed gives the same loss to the last bit on a CPU with the same number of threads.

    Args:
        architecture: what to train.
        config: recipe, data and budget.
        seed: of the weights and of the order of the data.
        device: where to train.
        on_progress: called with (tokens trained, training loss), each step on a CPU, less often on a GPU.

    Raises:
        ConfigError: the data is missing or does not fit the vocabulary or the context.
        NonFiniteLoss: training diverged.
    """
    clock = _Clock()
    with clock("data"):
        corpus = load_corpus(config, architecture.vocab_size)
        held_out = validation_windows(corpus.validation, config.context, config.validation_tokens)
        windows = Windows(corpus.train, config.context, seed)
    with clock("build"):
        training = _Training(build_model(architecture, seed, device), config, torch.device(device))
    curve = training.run(windows, held_out, clock, on_progress or (lambda tokens, loss: None))
    dtype = str(training.dtype).removeprefix("torch.")
    tokens, loss = curve[-1]
    return ProxyResult(loss, curve, tokens, clock.seconds, training.model.paths(), dtype, training.model.eval())


@dataclass(slots=True)
class _Clock:
    """Adds up the wall-clock seconds of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class _Training:
    """A model, its optimizer and the steps that a token budget buys."""

    def __init__(self, model: HybridLM, config: ProxyConfig, device: torch.device) -> None:
        self.config, self.device, self.dtype = config, device, _dtype(config.dtype, device)
        self.model = prepare(model, config.kernels, device, self.dtype)
        self.steps = math.ceil(config.tokens / (config.batch * config.context))
        self.optimizer = make_optimizer(model, config)
        self.diverged = torch.zeros((), dtype=torch.bool, device=device)
        self.every = STEPS_A_CHECK if device.type == "cuda" else 1

    def run(self, windows: Windows, held_out: npt.NDArray[np.int64], clock: _Clock, on_progress: Progress) -> Curve:
        """All steps, with validations in between; gives the curve."""
        curve: list[tuple[int, float]] = []
        done = 0
        for stop in validation_steps(self.steps, self.config.validations):
            with clock("train"):
                for step in range(done, stop):
                    loss = self.step(step, windows.batch(step * self.config.batch, self.config.batch))
                    if (step + 1) % self.every == 0 or step + 1 == stop:
                        self.check(step + 1, curve)
                        on_progress(self.tokens(step + 1), loss.item())
            with clock("validate"):
                done, value = stop, self.validate(held_out)
            if not math.isfinite(value):
                raise NonFiniteLoss(self.tokens(stop), tuple(curve))
            curve.append((self.tokens(stop), value))
        return tuple(curve)

    def tokens(self, steps: int) -> int:
        """Tokens that ``steps`` steps train on."""
        return steps * self.config.batch * self.config.context

    def step(self, index: int, batch: npt.NDArray[np.int64]) -> Tensor:
        """One update; gives the training loss without waiting for the device."""
        rate = self.config.learning_rate * schedule(index, self.steps, self.config.warmup, self.config.final_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.diverged |= ~torch.isfinite(loss.detach())
        return loss.detach()

    def loss(self, batch: npt.NDArray[np.int64]) -> Tensor:
        """Mean loss of a batch [B, context + 1], nats a token."""
        windows = torch.from_numpy(batch)
        if self.device.type == "cuda":
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            return token_loss(self.model, self.model.hidden(windows[:, :-1]), windows[:, 1:])

    def check(self, steps: int, curve: Iterable[tuple[int, float]]) -> None:
        """Raise NonFiniteLoss if any loss so far was not finite."""
        if self.diverged.item():
            raise NonFiniteLoss(self.tokens(steps), tuple(curve))

    @torch.no_grad()
    def validate(self, held_out: npt.NDArray[np.int64]) -> float:
        """Mean loss over the held-out windows, nats a token."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in range(0, len(held_out), self.config.batch):
            batch = held_out[first : first + self.config.batch]
            total += self.loss(batch).double() * len(batch)
        return total.item() / len(held_out)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def make_optimizer(model: nn.Module, config: ProxyConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms, biases and other vectors alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def schedule(index: int, steps: int, warmup: float, final: float) -> float:
    """Share of the peak learning rate at step ``index`` from 0: linear warm-up, then a cosine to ``final``."""
    rising = math.ceil(warmup * steps)
    if index < rising:
        return (index + 1) / rising
    progress = (index - rising) / max(steps - 1 - rising, 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def validation_steps(steps: int, validations: int) -> list[int]:
    """Steps after which to validate: evenly spaced, the last one included, no more than there are steps."""
    return sorted({math.ceil(steps * (point + 1) / validations) for point in range(validations)})
