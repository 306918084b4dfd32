"""Training sequences: which tokens make batch n."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from archsearch.proxy.tokenizer import Tokens

ROUNDS = 6
"""Of the Feistel network; four already make a pseudorandom permutation (Luby and Rackoff 1988)."""
BLOCK = 2**10
"""Windows whose places are computed at once on the host."""
Ints = npt.NDArray[np.int64]


class Windows:
    """Training sequences in an order fixed by the seed, whatever the batch size and the number of workers.

    Each epoch cuts the tokens into windows of ``context + 1`` (inputs and, one later, targets) from
    another offset and permutes them. Window ``n`` depends on (tokens, context, seed, n) alone, and costs
    the same for any n: a training can stop and go on anywhere. Memory does not grow with the tokens,
    and one object serves several threads.

    Args:
        tokens: [n] of any unsigned type, memory-mapped or not; more than ``context`` of them.
        context: tokens a sequence.
        seed: of the order.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.an_epoch = max((len(tokens) - 1) // context - 1, 1)
        self._size = min(max(self.an_epoch, 16), BLOCK)
        self._last: tuple[int, Ints] = (-1, np.empty(0, np.int64))

    def batch(self, first: int, count: int) -> Ints:
        """Windows ``first`` to ``first + count - 1`` as an array [count, context + 1]."""
        rows = [self.tokens[start : start + self.context + 1] for start in self.starts(first, count).tolist()]
        return np.stack(rows).astype(np.int64)

    def starts(self, first: int, count: int) -> Ints:
        """Where each of these windows begins in ``tokens``: [count]."""
        size = self._size
        blocks = [self._block(index) for index in range(first // size, (first + count - 1) // size + 1)]
        return np.concatenate(blocks)[first % size :][:count]

    def _block(self, index: int) -> Ints:
        """The starts of a block of windows; the last block is remembered, as batches come in order."""
        known, starts = self._last
        if known != index:
            starts = self._place(np.arange(index * self._size, (index + 1) * self._size))
            self._last = index, starts
        return starts

    def _place(self, indices: Ints) -> Ints:
        epochs, places = np.divmod(indices, self.an_epoch)
        found = np.empty(len(indices), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            slack = len(self.tokens) - 1 - self.an_epoch * self.context
            offset = np.random.default_rng([self.seed, epoch]).integers(slack + 1)
            found[here] = permute(places[here], self.an_epoch, (self.seed, epoch)) * self.context + offset
        return found


def permute(indices: Ints, size: int, key: tuple[int, ...]) -> Ints:
    """A permutation of range(``size``) that ``key`` picks, at ``indices`` alone, in constant memory.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway 2002):
    one to four rounds of walking on average.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = np.random.default_rng([*key, 1]).integers(2**63, size=ROUNDS, dtype=np.uint64)
    found = indices.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        found[outside] = _feistel(found[outside], np.uint64(half), keys)
        outside = found >= size
    return found.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: np.uint64, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps, as a hash may
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    joined: npt.NDArray[np.uint64] = (left << half) | right
    return joined


def validation_windows(tokens: Tokens, context: int, wanted: int) -> Ints:
    """Non-overlapping windows [n, context + 1], about ``wanted`` tokens spread evenly over ``tokens``."""
    held = (len(tokens) - 1) // context
    count = min(max(wanted // context, 1), held)
    starts = np.arange(count) * held // count * context
    found: Ints = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return found
