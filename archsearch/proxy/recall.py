"""Multi-query associative recall (MQAR): can a network find in its context what it read there?

The task of Arora et al. 2023 (Zoology, arXiv 2312.04927). A sequence lists D pairs of a key and its value,
then asks for every key once more; at a query the network must name the value. A fixed state of linear mixers
runs out as D grows, attention does not: what a short training on text hides, this shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from archsearch.architecture import Architecture
from archsearch.config import ProxyConfig, RecallConfig
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.model.training_path import prepare
from archsearch.proxy.result import NonFiniteLoss
from archsearch.proxy.schedule import learning_rate
from archsearch.proxy.step import TrainingStep, training_dtype

FILLER = 0
IGNORED = -100
"""Target of every position that asks for nothing."""
SOON = 0.1
"""Exponent a of Zoology's query gaps, P(gap) ~ a gap^(a-1): most keys are asked for soon, some late."""
CHECKS = 10
SOLVED = 0.005
"""Mean error at which a training ends: what is left of its budget would tell nothing."""
TEST_STREAM = 1

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RecallResult:
    """What a network recalls.

    Attributes:
        error: 1 - accuracy, the mean over the numbers of pairs and the seeds.
        accuracy: of each number of pairs, the mean over the seeds.
        curve: (tokens, error) at each check of the first seed.
        errors: of each seed.
        tokens: trained, over all seeds; fewer than the budget where all was recalled before its end.
    """

    error: float
    accuracy: dict[int, float]
    curve: tuple[tuple[int, float], ...]
    errors: tuple[float, ...]
    tokens: int

    def summary(self) -> dict[str, Any]:
        """Plain data for the metrics of an evaluation."""
        return {
            "error": self.error,
            "accuracy": {str(pairs): value for pairs, value in self.accuracy.items()},
            "curve": [list(point) for point in self.curve],
            "errors": list(self.errors),
            "tokens": self.tokens,
        }


def measure_recall(
    architecture: Architecture, config: ProxyConfig, *, seed: int, device: torch.device | str
) -> RecallResult:
    """Train the operators of ``architecture`` on the task alone, from scratch, and test what they recall.

    Width, operators and meta tokens are the candidate's; the vocabulary is the task's. Test sequences are the
    same for every architecture and seed.

    Args:
        architecture: what to train.
        config: ``config.recall`` has the task and its budget; betas, decay, clip, dtype and kernels are the proxy's.
        seed: of weights and sequences of the first training; the others count up from it.
        device: where to train.

    Raises:
        NonFiniteLoss: a training diverged.
    """
    trained = [_train(architecture, config, seed + index, torch.device(device)) for index in range(config.recall.seeds)]
    accuracies = [accuracy for _, accuracy in trained]
    mean = {pairs: float(np.mean([accuracy[pairs] for accuracy in accuracies])) for pairs in config.recall.pairs}
    errors = tuple(_error(accuracy) for accuracy in accuracies)
    tokens = sum(curve[-1][0] for curve, _ in trained)
    return RecallResult(float(np.mean(errors)), mean, tuple(trained[0][0]), errors, tokens)


def sequences(
    rng: np.random.Generator, count: int, pairs: int, *, context: int, vocab_size: int
) -> tuple[Tokens, Tokens]:
    """Sequences of the task.

    Args:
        rng: draws them.
        count: how many.
        pairs: keys with values in each, at most a quarter of the context and below half the vocabulary.
        context: tokens a sequence.
        vocab_size: 0 fills; the lower half are keys, the upper half values.

    Returns:
        tokens and targets, [count, context] each; targets are ``IGNORED`` except at queries.
    """
    half = vocab_size // 2
    keys = 1 + rng.random((count, half - 1)).argsort(axis=1)[:, :pairs]
    values = half + rng.random((count, half)).argsort(axis=1)[:, :pairs]
    tokens = np.full((count, context), FILLER, dtype=np.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    # Gumbel noise on log-probabilities, sorted, is a draw without replacement.
    gaps = np.arange(1, (context - 2 * pairs) // 2 + 1)
    scores = (SOON - 1) * np.log(gaps) + rng.gumbel(size=(count, len(gaps)))
    places = 2 * pairs + 2 * rng.permuted((-scores).argsort(axis=1)[:, :pairs], axis=1)
    targets = np.full((count, context), IGNORED, dtype=np.int64)
    np.put_along_axis(tokens, places, keys, axis=1)
    np.put_along_axis(targets, places, values, axis=1)
    return tokens, targets


def _train(
    architecture: Architecture, config: ProxyConfig, seed: int, device: torch.device
) -> tuple[list[tuple[int, float]], dict[int, float]]:
    """(curve of the error, accuracy of each number of pairs at its end)."""
    recall = config.recall
    config = config.model_copy(update={"learning_rate": recall.learning_rate, "weight_normalization": False})
    model = build_model(architecture.model_copy(update={"vocab_size": recall.vocab_size}), seed, device)
    dtype = training_dtype(config.dtype, device)
    prepare(model, config.kernels, device, dtype)
    update = TrainingStep(model, config, dtype, device, _loss, (2, recall.batch, recall.context))
    steps = math.ceil(recall.tokens / (recall.batch * recall.context))
    checks = {math.ceil(steps * (point + 1) / CHECKS) for point in range(CHECKS)}
    curve: list[tuple[int, float]] = []
    accuracy: dict[int, float] = {}
    for step, batch in enumerate(_batches(recall, seed, steps)):
        update(batch, learning_rate(config, step, steps))
        if step + 1 in checks:
            done = (step + 1) * recall.batch * recall.context
            if update.diverged.item():
                raise NonFiniteLoss(done, tuple(curve))
            accuracy = _test(model, recall, device, dtype)
            curve.append((done, _error(accuracy)))
            if curve[-1][1] <= SOLVED:
                break
    update.release()
    return curve, accuracy


def _error(accuracy: dict[int, float]) -> float:
    return 1.0 - float(np.mean(list(accuracy.values())))


def _batches(recall: RecallConfig, seed: int, steps: int) -> Iterator[Tensor]:
    """Training batches, tokens and targets [2, batch, context]; every number of pairs has its share of each."""
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        sizes = np.bincount((np.arange(recall.batch) + step) % len(recall.pairs), minlength=len(recall.pairs))
        parts = [
            sequences(rng, int(size), pairs, context=recall.context, vocab_size=recall.vocab_size)
            for pairs, size in zip(recall.pairs, sizes, strict=True)
        ]
        yield torch.from_numpy(np.stack([np.concatenate(side) for side in zip(*parts, strict=True)]))


def _loss(model: HybridLM, batch: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean over the positions that ask. All have logits, as a captured step has no room for a count that varies."""
    tokens, targets = batch
    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        logits = model.logits(model.hidden(tokens))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def _test(model: HybridLM, recall: RecallConfig, device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """Share of the queries that are answered, of each number of pairs."""
    accuracy = {}
    for pairs in recall.pairs:
        rng = np.random.default_rng([TEST_STREAM, pairs, recall.context])
        found, asked = torch.zeros((), dtype=torch.int64, device=device), 0
        for first in range(0, recall.test_sequences, recall.batch):
            count = min(recall.batch, recall.test_sequences - first)
            tokens, targets = sequences(rng, count, pairs, context=recall.context, vocab_size=recall.vocab_size)
            wanted = torch.from_numpy(targets).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                answers = model.logits(model.hidden(torch.from_numpy(tokens).to(device))).argmax(dim=-1)
            found += ((answers == wanted) & (wanted != IGNORED)).sum()
            asked += int((targets != IGNORED).sum())
        accuracy[pairs] = found.item() / asked
    return accuracy
