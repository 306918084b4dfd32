"""Windows: the order of training sequences, and how they are fed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archsearch.proxy.feed import feed
from archsearch.proxy.windows import Windows, permute, validation_windows


@settings(deadline=None, max_examples=40)
@given(length=st.integers(20, 400), context=st.integers(2, 9), seed=st.integers(0, 5), batch=st.integers(1, 7))
def test_window_order_does_not_depend_on_the_batch_size(length: int, context: int, seed: int, batch: int) -> None:
    tokens = np.arange(length).astype(np.uint8)
    one_by_one = np.concatenate([Windows(tokens, context, seed).batch(index, 1) for index in range(21)])
    windows = Windows(tokens, context, seed)
    batches = np.concatenate([windows.batch(first, batch) for first in range(0, 21, batch)])
    assert np.array_equal(batches[:21], one_by_one)


def test_an_epoch_visits_every_window_once() -> None:
    tokens = np.arange(250).astype(np.uint8)
    windows = Windows(tokens, 10, seed=3)
    epoch = windows.batch(0, windows.an_epoch)
    starts = np.sort(epoch[:, 0])
    assert np.array_equal(np.diff(starts), np.full(windows.an_epoch - 1, 10))
    assert np.array_equal(epoch[:, 1:], epoch[:, :-1] + 1)
    assert not np.array_equal(epoch, windows.batch(windows.an_epoch, windows.an_epoch))
    assert not np.array_equal(epoch, Windows(tokens, 10, seed=4).batch(0, windows.an_epoch))


def test_shortest_text_gives_one_window() -> None:
    tokens = np.arange(11).astype(np.uint8)
    assert np.array_equal(Windows(tokens, 10, seed=0).batch(5, 1)[0], tokens)


@pytest.mark.parametrize("wanted", [1, 40, 80, 10_000])
def test_validation_windows_are_spread_and_disjoint(wanted: int) -> None:
    tokens = (np.arange(201) % 256).astype(np.uint8)
    windows = validation_windows(tokens, 10, wanted)
    assert len(windows) == min(max(wanted // 10, 1), 20)
    starts = windows[:, 0]
    assert np.all(np.diff(starts) >= 10)
    assert np.all(starts % 10 == 0)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 3000), seed=st.integers(0, 99))
def test_permutation_visits_everything_once(size: int, seed: int) -> None:
    found = permute(np.arange(size), size, (seed, 0))
    assert np.array_equal(np.sort(found), np.arange(size))
    assert np.array_equal(permute(np.arange(size)[::-1], size, (seed, 0))[::-1], found)


def test_permutation_looks_random() -> None:
    size = 10_000
    places = np.arange(size)
    tables = [permute(places, size, (seed, epoch)) for seed in range(3) for epoch in range(3)]
    for number, table in enumerate(tables):
        assert abs(np.corrcoef(places, table)[0, 1]) < 0.04
        assert abs(np.corrcoef(table[:-1], table[1:])[0, 1]) < 0.04
        # neighbours stay neighbours about twice in a random order
        assert np.count_nonzero(np.abs(np.diff(table)) == 1) < 15
        assert all(np.count_nonzero(table == other) < 15 for other in tables[:number])


def test_far_windows_of_a_huge_corpus_cost_no_memory() -> None:
    tokens = np.broadcast_to(np.uint16(7), 10**12)
    windows = Windows(tokens, 1024, seed=0)
    starts = windows.starts(windows.an_epoch * 3 - 5, 10)
    assert len(np.unique(starts)) == 10
    assert starts.min() >= 0
    assert starts.max() + 1025 <= len(tokens)
    assert windows.batch(10**9, 2).shape == (2, 1025)


def test_one_object_serves_many_threads() -> None:
    windows = Windows(np.arange(50_000, dtype=np.uint16), 10, seed=0)
    wanted = {first: Windows(windows.tokens, 10, seed=0).batch(first, 8) for first in range(0, 9000, 900)}
    wrong: list[int] = []

    def look() -> None:
        for first, batch in list(wanted.items()) * 20:
            if not np.array_equal(windows.batch(first, 8), batch):
                wrong.append(first)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_feed_goes_on_mid_way() -> None:
    windows = Windows(np.arange(5000, dtype=np.uint16), 10, seed=0)
    whole = torch.stack(list(feed(windows, 4, range(9), "cpu")))
    rest = torch.stack(list(feed(windows, 4, range(5, 9), "cpu")))
    assert whole.dtype == torch.int64
    assert whole.shape == (9, 4, 11)
    assert torch.equal(whole[5:], rest)
    assert np.array_equal(whole[2].numpy(), windows.batch(8, 4))
