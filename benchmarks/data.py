"""What data costs: tokenisation in MB/s, and batches a second on the host and on a GPU where there is one.

    python benchmarks/data.py [--vocab 32768] [--batch 32] [--context 1024]

Prints one JSON object. Each figure stands beside that of a naive loop over the same data in the same run, as
the ratio of their speeds: for tokens one ``encode`` a document, for batches a stack of slices that is
copied to the device while the host waits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from archsearch.config import ProxyConfig
from archsearch.proxy import feed as feeding
from archsearch.proxy.corpus import write_corpus
from archsearch.proxy.data import Corpus, Windows, feed, load_corpus
from archsearch.proxy.sources import open_source
from archsearch.proxy.tokenizer import ByteTokenizer, SubwordTokenizer

STEPS = 200


def main() -> None:
    """Measure all and print."""
    parser = argparse.ArgumentParser(description="what data costs")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ARCHSEARCH_CACHE"] = folder
        start = time.perf_counter()
        corpus = load_corpus(ProxyConfig(tokenizer="bpe"), options.vocab)
        first = time.perf_counter() - start
        result = {
            "cores": len(os.sched_getaffinity(0)),
            "bpe": {"vocab_size": corpus.vocab_size, "seconds_with_training": round(first, 2)},
            "tokenise": tokenise(corpus, Path(folder)),
            "host": host(corpus, options.batch, options.context),
        }
        if torch.cuda.is_available():
            result["device"] = torch.cuda.get_device_name()
            result["gpu"] = gpu(corpus, options.batch, options.context)
    print(json.dumps(result, indent=2))


def tokenise(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """MB of text a second into a cache folder, with bytes, with the BPE, and with the BPE in a naive loop."""
    source = open_source(ProxyConfig())
    texts = [b"".join(document.pieces) for document in source.documents()]  # type: ignore[arg-type]
    megabytes = sum(map(len, texts)) / 1e6
    bpe = corpus.tokenizer
    assert isinstance(bpe, SubwordTokenizer)

    def written(name: str, tokenizer: ByteTokenizer | SubwordTokenizer) -> float:
        (folder / name).mkdir()
        start = time.perf_counter()
        write_corpus(folder / name, source, tokenizer, limit=10**12)
        return megabytes / (time.perf_counter() - start)

    start = time.perf_counter()
    np.concatenate([np.array(bpe.tokenizer.encode(text.decode("utf-8", "replace")).ids, np.uint16) for text in texts])
    naive = megabytes / (time.perf_counter() - start)
    found = {"bytes": written("bytes", ByteTokenizer()), "bpe": written("bpe", bpe), "naive_bpe": naive}
    return {name: round(speed, 2) for name, speed in found.items()} | {"ratio": round(found["bpe"] / naive, 2)}


def host(corpus: Corpus, batch: int, context: int) -> dict[str, float]:
    """Batches a second from a memory-mapped array."""
    windows = Windows(corpus.train, context, 0)

    def ours() -> None:
        for step in range(STEPS):
            windows.batch(step * batch, batch)

    order = np.random.default_rng(0).permutation(windows.an_epoch) * context
    starts = np.resize(order, (STEPS, batch)).tolist()

    def naive() -> None:
        for row in starts:
            np.stack([corpus.train[start : start + context + 1].astype(np.int64) for start in row])

    return _compared(best(ours), best(naive))


def gpu(corpus: Corpus, batch: int, context: int) -> dict[str, Any]:
    """Batches a second that arrive on the GPU, and microseconds of the host's time each one takes."""
    windows = Windows(corpus.train, context, 0)

    def resident() -> None:
        for _ in feed(windows, batch, range(STEPS), "cuda"):
            pass
        torch.cuda.synchronize()

    def prefetched() -> None:
        for _ in feeding._prefetched(windows, batch, range(STEPS), torch.device("cuda")):
            pass
        torch.cuda.synchronize()

    def naive() -> None:
        for step in range(STEPS):
            torch.from_numpy(windows.batch(step * batch, batch)).to("cuda")
        torch.cuda.synchronize()

    slow = best(naive)
    found: dict[str, Any] = {name: _compared(best(way), slow) for name, way in
                             (("resident", resident), ("prefetched", prefetched))}  # fmt: skip
    start = time.perf_counter()
    for _ in islice(feed(windows, batch, range(STEPS), "cuda"), STEPS):
        pass
    found["host_us_a_batch"] = round((time.perf_counter() - start) / STEPS * 1e6, 1)
    torch.cuda.synchronize()
    return found


def best(work: Callable[[], object], repeats: int = 3) -> float:
    """The shortest time of a few, in seconds, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _compared(ours: float, naive: float) -> dict[str, float]:
    return {"batches_a_second": round(STEPS / ours), "naive": round(STEPS / naive), "ratio": round(naive / ours, 2)}


if __name__ == "__main__":
    main()
