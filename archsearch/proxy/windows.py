"""Training sequences: which tokens make batch n, and how they reach the device before the step wants them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from archsearch.proxy.tokenizer import Tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROUNDS = 6
"""Of the Feistel network; four already make a pseudorandom permutation (Luby and Rackoff 1988)."""
AHEAD = 4
"""Batches that a thread keeps ready where the tokens do not live on the device, and as many under way to it."""
RESIDENT_BYTES = 2**31
"""Tokens up to this size are kept on a GPU, if they are at most ``RESIDENT_SHARE`` of its free memory."""
RESIDENT_SHARE = 0.125
STARTS = 2**16
"""Windows whose places are sent to the device at once."""
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


# On a device


def feed(windows: Windows, batch: int, steps: range, device: torch.device | str) -> Iterator[Tensor]:
    """The batches of ``steps`` on ``device``, int64 [batch, context + 1]: ``windows.batch(step * batch, batch)``.

    A loop over it never waits for the disk. On a GPU the tokens are uploaded once a process where they
    are small enough, and batches are gathered there: no copy, no host synchronisation, nothing but
    asynchronous kernels on the current stream. Larger corpora come through a thread that keeps ``AHEAD``
    batches in pinned memory; the host then runs at most that many steps ahead of the device. Each tensor is
    new, so it may be kept or changed; copy it into a static buffer for a captured graph, and capture between
    two batches. The thread ends with the iterator (``close`` it, or let it go).

    Args:
        windows: what to cut.
        batch: sequences a step.
        steps: consecutive step numbers, from any first one on.
        device: where the tensors lie.
    """
    import torch

    where = torch.device(device)
    if where.type != "cuda":
        return (torch.from_numpy(windows.batch(step * batch, batch)).to(where) for step in steps)
    if _fits(windows.tokens, where):
        return _gathered(windows, batch, steps, _resident(windows.tokens, where))
    return _prefetched(windows, batch, steps, where)


def _fits(tokens: Tokens, device: torch.device) -> bool:
    import torch

    if _home(tokens, device) in _RESIDENT:
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return tokens.nbytes <= min(RESIDENT_BYTES, RESIDENT_SHARE * free)


_RESIDENT: dict[tuple[Any, ...], tuple[Tokens, Tensor]] = {}


def _home(tokens: Tokens, device: torch.device) -> tuple[Any, ...]:
    return tokens.__array_interface__["data"][0], len(tokens), tokens.dtype.str, str(device)


def _resident(tokens: Tokens, device: torch.device) -> Tensor:
    """``tokens`` on ``device`` as signed integers of the same width; the last ones used stay for the next candidate."""
    import torch

    key = _home(tokens, device)
    if key not in _RESIDENT:
        _RESIDENT.clear()
        signed = tokens.view(f"i{tokens.itemsize}") if tokens.itemsize > 1 else tokens
        uploaded = torch.empty(len(tokens), dtype=torch.from_numpy(signed[:1].copy()).dtype, device=device)
        for start in range(0, len(tokens), STARTS * 256):
            block = torch.from_numpy(signed[start : start + STARTS * 256].copy())
            uploaded[start : start + len(block)] = block.to(device)
        _RESIDENT[key] = (tokens, uploaded)  # the array is kept, so that its address stays its own
    return _RESIDENT[key][1]


def _gathered(windows: Windows, batch: int, steps: range, tokens: Tensor) -> Iterator[Tensor]:
    import torch

    ahead = torch.arange(windows.context + 1, device=tokens.device)
    mask = 2 ** (8 * windows.tokens.itemsize) - 1
    chunk = max(1, STARTS // batch)
    for first in range(steps.start, steps.stop, chunk):
        count = min(chunk, steps.stop - first)
        starts = torch.from_numpy(windows.starts(first * batch, count * batch)).pin_memory()
        starts = starts.to(tokens.device, non_blocking=True).view(count, batch, 1)
        for here in starts:
            yield tokens[here + ahead].long() & mask


def _prefetched(windows: Windows, batch: int, steps: range, device: torch.device) -> Iterator[Tensor]:
    """A thread fills pinned buffers, the caller's sends them. The thread calls no CUDA, so graphs may be captured."""
    import torch

    shape = (batch, windows.context + 1)
    free: queue.Queue[Tensor | None] = queue.Queue()
    ready: queue.Queue[Tensor | BaseException] = queue.Queue()
    for _ in range(2 * AHEAD):
        free.put(torch.empty(shape, dtype=torch.int64, pin_memory=True))

    def work() -> None:
        try:
            for step in steps:
                if (buffer := free.get()) is None:
                    return
                buffer.numpy()[:] = windows.batch(step * batch, batch)
                ready.put(buffer)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="archsearch-feed", daemon=True)
    thread.start()
    sent: deque[tuple[torch.cuda.Event, Tensor]] = deque()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            arrived = item.to(device, non_blocking=True)
            sent.append((torch.cuda.current_stream(device).record_event(), item))
            if len(sent) > AHEAD:
                event, buffer = sent.popleft()
                event.synchronize()
                free.put(buffer)
            yield arrived
    finally:
        free.put(None)
        thread.join()
