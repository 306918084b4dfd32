"""The proxy: a short training whose validation loss ranks architectures.

The recipe is that of the search in Nemotron-Flash (arXiv 2511.18890, App. C): AdamW at 5e-4 with a cosine
schedule; warm-up, clipping and decay of matrices alone are the field's custom.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from archsearch.architecture import Architecture
from archsearch.config import ProxyConfig
from archsearch.model.hybrid import build_model
from archsearch.model.training_path import prepare
from archsearch.proxy.checkpoint import Progress, load_checkpoint, save_checkpoint
from archsearch.proxy.data import Windows, feed, load_corpus, validation_windows
from archsearch.proxy.loss import loss_path
from archsearch.proxy.optimizer import moments, set_step
from archsearch.proxy.result import NonFiniteLoss, ProxyResult
from archsearch.proxy.schedule import learning_rate, validation_steps
from archsearch.proxy.step import TrainingStep, mean_loss, training_dtype

OnProgress = Callable[[int, float], None]
KeepGoing = Callable[[int, float], bool]

STEPS_A_CHECK = 50
"""On a GPU the loss is looked at this rarely, as each look waits for the device."""


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
    seconds: dict[str, float] | None = None,
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
        seconds: where to add the seconds of each phase as they pass, so that they outlive a failure.

    Raises:
        ConfigError: the data is missing or does not fit the vocabulary or the context.
        NonFiniteLoss: training diverged.
        UnfitCheckpoint: the checkpoint is damaged or another training's.
        StorageError: the checkpoint cannot be written.
    """
    clock = _Clock({} if seconds is None else seconds)
    training = _Training(architecture, config, seed, torch.device(device), clock)
    resumed = training.restore(checkpoint) if checkpoint is not None else 0
    ladder = {steps: rung for rung in rungs if (steps := training.steps_for(rung)) < training.steps}
    stopped = training.run(ladder, keep_going, checkpoint, on_progress)
    training.step.release()
    return ProxyResult(
        loss=training.curve[-1][1],
        curve=tuple(training.curve),
        tokens=training.curve[-1][0],
        tokens_per_second=training.timed_tokens / clock.seconds.get("train", math.inf),
        seconds=clock.seconds,
        paths=training.paths,
        dtype=str(training.dtype).removeprefix("torch."),
        model=training.model.eval(),
        resumed=resumed,
        stopped=stopped,
    )


@dataclass(slots=True)
class _Clock:
    """Adds up the wall-clock seconds of each phase."""

    seconds: dict[str, float]

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
            # whole batches: another batch size would compile and tune every kernel again
            wanted = self.tokens(self.steps_for(config.validation_tokens))
            held_out = validation_windows(corpus.validation, config.context, wanted)
            self.held_out = torch.from_numpy(held_out).to(device)
            self.windows = Windows(corpus.train, config.context, seed)
        with clock("build"):
            self.dtype = training_dtype(config.dtype, device)
            self.model = build_model(architecture, seed, device)
        with clock("kernels"):
            prepare(self.model, config.kernels, device, self.dtype)
        with clock("build"):
            self.step = TrainingStep(self.model, config, self.dtype, device)
        self.steps = self.steps_for(config.tokens)
        self.every = STEPS_A_CHECK if device.type == "cuda" else 1
        self.paths = {"step": self.step.path, "loss": loss_path(device, self.dtype), **self.model.paths()}
        self.identity = {
            "architecture": architecture.to_dict(),
            "proxy": config.model_dump(mode="json"),
            "seed": seed,
            "corpus": corpus.digest,
            "numerics": {"device": device.type, "dtype": str(self.dtype), **self.paths},
        }
        self.done = self.timed_tokens = 0
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
        """All steps up to number ``stop``; the first ones, which compile and capture, have their own clock."""
        batches = feed(self.windows, self.config.batch, range(self.done, stop), self.device)
        for index in range(self.done, stop):
            phase = "train" if self.step.settled else "compile"
            with self.clock(phase):
                loss = self.step(next(batches), learning_rate(self.config, index, self.steps))
                if (index + 1) % self.every == 0 or index + 1 == stop or phase == "compile":
                    self.check(index + 1)
            self.timed_tokens += self.tokens(1) if phase == "train" else 0
            if on_progress is not None and ((index + 1) % self.every == 0 or index + 1 == stop):
                on_progress(self.tokens(index + 1), loss.item())
        self.done = stop

    def check(self, steps: int) -> None:
        """Raise NonFiniteLoss if any loss so far was not finite."""
        if self.step.diverged.item():
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
        for windows in self.held_out.split(self.config.batch):
            total += mean_loss(self.model, windows, self.dtype).double() * len(windows)
        return total.item() / len(self.held_out)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: weights and moments, themselves, not copies."""
        weights = {f"weight.{name}": parameter for name, parameter in self.model.named_parameters()}
        return weights | dict(moments(self.model, self.step.optimizer))

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
        set_step(self.step.optimizer, self.done)
        return self.tokens(self.done)
