"""Batches on the device before the step wants them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from archsearch.proxy.tokenizer import Tokens
from archsearch.proxy.windows import Windows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AHEAD = 4
"""Batches that a thread keeps ready where the tokens do not live on the device, and as many under way to it."""
RESIDENT_BYTES = 2**31
"""Tokens up to this size are kept on a GPU, if they are at most ``RESIDENT_SHARE`` of its free memory."""
RESIDENT_SHARE = 0.125
STARTS = 2**16
"""Windows whose places are sent to the device at once."""


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
