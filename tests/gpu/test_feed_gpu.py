"""Batches that a GPU gathers or is sent equal those of the host, and cost it no wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from archsearch.proxy import feed as feeding
from archsearch.proxy.feed import feed
from archsearch.proxy.windows import Windows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BATCH, CONTEXT, STEPS = 3, 17, range(5, 45)


def windows_of(dtype: str) -> Windows:
    limit = np.iinfo(dtype).max
    tokens = np.random.default_rng(0).integers(limit, size=1000, dtype=dtype)
    tokens[::7] = limit
    return Windows(tokens, CONTEXT, seed=1)


@pytest.fixture(params=["resident", "prefetched"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "prefetched":
        monkeypatch.setattr(feeding, "RESIDENT_BYTES", 0)
    feeding._RESIDENT.clear()
    yield request.param
    feeding._RESIDENT.clear()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_batches_equal_those_of_the_host(way: str, dtype: str) -> None:
    windows = windows_of(dtype)
    found = list(feed(windows, BATCH, STEPS, "cuda"))
    assert len(found) == len(STEPS)
    assert bool(feeding._RESIDENT) == (way == "resident")
    for step, batch in zip(STEPS, found, strict=True):
        assert batch.dtype == torch.int64
        assert batch.is_cuda
        assert np.array_equal(batch.cpu().numpy(), windows.batch(step * BATCH, BATCH))


def test_no_batch_waits_for_the_device(way: str) -> None:
    windows = windows_of("uint16")
    batches = feed(windows, BATCH, STEPS, "cuda")
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(1 for _ in batches) == len(STEPS) - 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_is_captured_between_batches(way: str) -> None:
    windows = windows_of("uint16")
    static = torch.zeros(BATCH, CONTEXT + 1, dtype=torch.int64, device="cuda")
    sums, graph = [], torch.cuda.CUDAGraph()
    for number, batch in enumerate(feed(windows, BATCH, STEPS, "cuda")):
        static.copy_(batch)
        if number == 0:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                total = static.sum()
        graph.replay()
        sums.append(total.clone())
    wanted = [int(windows.batch(step * BATCH, BATCH).sum()) for step in STEPS]
    assert torch.stack(sums).tolist() == wanted


def test_the_thread_ends_with_the_iterator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "RESIDENT_BYTES", 0)
    feeding._RESIDENT.clear()
    batches: Any = feed(windows_of("uint8"), BATCH, STEPS, "cuda")
    next(batches)
    assert any(thread.name == "archsearch-feed" for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name == "archsearch-feed" for thread in threading.enumerate())
