"""The proxy: a short training whose validation loss ranks architectures.

The recipe is that of the search in Nemotron-Flash (arXiv 2511.18890, App. C): AdamW at 5e-4 with a cosine
schedule; warm-up, clipping and decay of matrices alone are the field's custom.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from archsearch.architecture import Architecture
from archsearch.config import ProxyConfig
from archsearch.errors import ArchsearchError
from archsearch.model import fla_ops
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.proxy.checkpoint import Curve, Progress, load_checkpoint, save_checkpoint
from archsearch.proxy.data import Windows, load_corpus, validation_windows
from archsearch.proxy.loss import token_loss
from archsearch.proxy.optimizer import make_optimizer, moments, set_step
from archsearch.proxy.schedule import learning_rate, validation_steps

OnProgress = Callable[[int, float], None]
KeepGoing = Callable[[int, float], bool]

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
        tokens: tokens trained, those before the checkpoint that it went on from included.
        seconds: of the phases data, build, train, validate, checkpoint, in this process.
        resumed: tokens of the checkpoint that it went on from; 0 from scratch.
        stopped: the rung at which ``keep_going`` ended it; None when it trained to its end.
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
    resumed: int = 0
    stopped: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Training tokens a second, validations left out; 0 where none were left to train."""
        seconds = self.seconds.get("train", 0.0)
        return (self.tokens - self.resumed) / seconds if seconds else 0.0


def train_proxy(
    architecture: Architecture,
    config: ProxyConfig,
    *,
    seed: int,
    device: torch.device | str,
    on_progress: OnProgress | None = None,
    rungs: Sequence[int] = (),
    keep_going: KeepGoing | None = None,
    checkpoint: Path | None = None,
) -> ProxyResult:
    """Train ``architecture`` from scratch for ``config.tokens`` tokens, rounded up to whole steps.

    The same seed gives the same loss to the last bit on a CPU with the same number of threads, also when the
    training was stopped at a rung, or killed, and goes on from its checkpoint.

    Args:
        architecture: what to train.
        config: recipe, data and budget.
        seed: of the weights and of the order of the data.
        device: where to train.
        on_progress: called with (tokens trained, training loss), each step on a CPU, less often on a GPU.
        rungs: token budgets below ``config.tokens``, rounded up to whole steps, at which a validation takes
            place anyway; others are passed over, as the end is no rung. The learning rate follows the schedule
            of the whole budget, so losses at a rung compare models that are equally far (``schedule.py``).
        keep_going: asked at each rung with (the rung as given, validation loss); False ends the training. A
            training that goes on from a checkpoint is asked at that rung again.
        checkpoint: file that is written at each rung, before the question. If it exists, the training goes
            on from there.

    Raises:
        ConfigError: the data is missing or does not fit the vocabulary or the context.
        NonFiniteLoss: training diverged.
        UnfitCheckpoint: the checkpoint is damaged or another training's.
        StorageError: the checkpoint cannot be written.
    """
    clock = _Clock()
    training = _Training(architecture, config, seed, torch.device(device), clock)
    resumed = training.restore(checkpoint) if checkpoint is not None else 0
    ladder = {steps: rung for rung in rungs if (steps := training.steps_for(rung)) < training.steps}
    stopped = training.run(ladder, keep_going, checkpoint, on_progress)
    return ProxyResult(
        loss=training.curve[-1][1],
        curve=tuple(training.curve),
        tokens=training.curve[-1][0],
        seconds=clock.seconds,
        paths=training.model.paths(),
        dtype=str(training.dtype).removeprefix("torch."),
        model=training.model.eval(),
        resumed=resumed,
        stopped=stopped,
    )


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
    """A training under way: model, optimizer, data, and how far it is."""

    def __init__(
        self, architecture: Architecture, config: ProxyConfig, seed: int, device: torch.device, clock: _Clock
    ) -> None:
        self.config, self.device, self.clock = config, device, clock
        with clock("data"):
            corpus = load_corpus(config, architecture.vocab_size)
            self.held_out = validation_windows(corpus.validation, config.context, config.validation_tokens)
            self.windows = Windows(corpus.train, config.context, seed)
        with clock("build"):
            self.model = build_model(architecture, seed, device).use(_kernels(config.kernels, device))
            self.optimizer = make_optimizer(self.model, config)
            self.diverged = torch.zeros((), dtype=torch.bool, device=device)
        self.dtype = _dtype(config.dtype, device)
        self.steps = self.steps_for(config.tokens)
        self.every = STEPS_A_CHECK if device.type == "cuda" else 1
        self.identity = {
            "architecture": architecture.to_dict(),
            "proxy": config.model_dump(mode="json"),
            "seed": seed,
            "paths": {"device": device.type, "dtype": str(self.dtype), **self.model.paths()},
        }
        self.done = 0
        self.curve: list[tuple[int, float]] = []

    def steps_for(self, tokens: int) -> int:
        """Steps that train on ``tokens`` tokens, or a part of a step more."""
        return math.ceil(tokens / (self.config.batch * self.config.context))

    def tokens(self, steps: int) -> int:
        """Tokens that ``steps`` steps train on."""
        return steps * self.config.batch * self.config.context

    def run(
        self,
        ladder: dict[int, int],
        keep_going: KeepGoing | None,
        checkpoint: Path | None,
        on_progress: OnProgress | None,
    ) -> int | None:
        """Train to the end, or to the rung where ``keep_going`` says so: that rung, or None.

        ``ladder`` holds the rung that is reached after so many steps.
        """
        for stop in validation_steps(self.steps, self.config.validations, ladder):
            if stop < self.done:
                continue
            if stop > self.done:
                self.train(stop, on_progress)
                self.validate()
                if stop in ladder and checkpoint is not None:
                    self.save(checkpoint)
            if stop in ladder and keep_going is not None and not keep_going(ladder[stop], self.curve[-1][1]):
                return ladder[stop]
        return None

    def train(self, stop: int, on_progress: OnProgress | None) -> None:
        """All steps up to number ``stop``."""
        with self.clock("train"):
            for index in range(self.done, stop):
                loss = self.step(index, self.windows.batch(index * self.config.batch, self.config.batch))
                if (index + 1) % self.every == 0 or index + 1 == stop:
                    self.check(index + 1)
                    if on_progress is not None:
                        on_progress(self.tokens(index + 1), loss.item())
        self.done = stop

    def step(self, index: int, batch: npt.NDArray[np.int64]) -> Tensor:
        """One update; gives the training loss without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(learning_rate(self.config, index, self.steps))
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
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

    def check(self, steps: int) -> None:
        """Raise NonFiniteLoss if any loss so far was not finite."""
        if self.diverged.item():
            raise NonFiniteLoss(self.tokens(steps), tuple(self.curve))

    def validate(self) -> None:
        """Add the loss over the held-out windows to the curve; raises NonFiniteLoss where it is not finite."""
        with self.clock("validate"):
            value = self.validation_loss()
        if not math.isfinite(value):
            raise NonFiniteLoss(self.tokens(self.done), tuple(self.curve))
        self.curve.append((self.tokens(self.done), value))

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the held-out windows, nats a token."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in range(0, len(self.held_out), self.config.batch):
            batch = self.held_out[first : first + self.config.batch]
            total += self.loss(batch).double() * len(batch)
        return total.item() / len(self.held_out)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: weights and moments, themselves, not copies."""
        weights = {f"weight.{name}": parameter for name, parameter in self.model.named_parameters()}
        return weights | dict(moments(self.model, self.optimizer))

    def save(self, path: Path) -> None:
        """Write the checkpoint from which this training can go on."""
        with self.clock("checkpoint"):
            save_checkpoint(path, self.tensors(), self.identity, Progress(self.done, tuple(self.curve)))

    def restore(self, path: Path) -> int:
        """Go on from a checkpoint: the tokens that it had trained, 0 where there is none."""
        with self.clock("checkpoint"):
            progress = load_checkpoint(path, self.tensors(), self.identity)
        if progress is None:
            return 0
        self.done, self.curve = progress.steps, list(progress.curve)
        set_step(self.optimizer, self.done)
        return self.tokens(self.done)


def _kernels(name: str, device: torch.device) -> str:
    """The implementation to train with; raises EnvironmentUnfit where it cannot run, rather than fall back."""
    if name == "auto":
        name = "fla" if device.type == "cuda" else "torch"
    if name == "fla":
        fla_ops.require(device)
    return name


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32
