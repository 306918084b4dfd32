"""Decode latency against the bandwidth floor, on one CUDA device. Each part can be run by itself; all go to one file.

    python -m benchmarks.decode --out experiments/decode-h100 --compile -- PARTS
    python -m benchmarks.decode --out experiments/decode-h100 PARTS

models: ``measure_decode`` of each reference architecture, step time at 128 to 32k tokens stored, energy.
operators: the cost of one more operator of each kind in a chain, from N and 2 N copies with weights of their own.
contexts: step time of a chain of one kind of operator at 128 to 32k tokens stored.
exact: all tokens in three fresh processes, against each other and against the strata.
throughput: batches doubled to the memory limit with 32k tokens stored in each sequence.
prefill: prompts of 512 to 32k tokens.
transformers: ``generate`` with a static cache and compilation, the same shapes, in the same process as ours.

A row is written as soon as it is there, and what the file holds already is not measured again: a run that was ended
goes on where it was. A file holds rows of one state of the kernels. With ``--compile`` nothing is timed: the kernels
of all rows are compiled side by side, which takes a fraction of what they take one after the other.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from archsearch.config import LatencyConfig
from archsearch.latency.device import describe
from archsearch.latency.lock import be_present
from archsearch.latency.protocol import VERSION, kernel_hash
from archsearch.latency.validity import Disturbed
from benchmarks.decode_parts import CUDA, PARTS
from benchmarks.decode_rehearsal import rehearse


class OutOfTime(BaseException):
    """A part used up its seconds. No ``Exception``: nothing on the way may take it for a failure of its own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` in the body after so many seconds."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Record:
    """The JSON file of one device and one state of the kernels: ``part -> name -> row``."""

    def __init__(self, path: Path) -> None:
        info = describe(CUDA)
        about = {"device": info.name, "kernel_hash": kernel_hash(), "protocol": VERSION}
        self.path, self.gpu = path, info.uuid_hash
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for name, value in about.items():
            if self.found.setdefault(name, value) != value:
                raise SystemExit(
                    f"{path} was taken with {name} {self.found[name]}, here is {value}: name another --out"
                )

    def holds(self, part: str, name: str) -> bool:
        """Whether this row was measured before."""
        return name in self.found.get(part, {})

    def add(self, part: str, name: str, row: dict[str, Any]) -> None:
        """Write a row; the card that it is of stands in it, as a file may be filled on several of a kind.

        Rows stand in the usual order, whichever was measured first.
        """
        rows = {**self.found.get(part, {}), name: {"gpu_hash": self.gpu, **row}}
        order = dict.fromkeys([*PARTS[part][1], *rows])
        self.found[part] = {one: rows[one] for one in order if one in rows}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1, allow_nan=False))
        new.replace(self.path)


def run(part: str, names: list[str], config: LatencyConfig, record: Record, seconds: float) -> None:
    """Measure the rows of a part that are not there yet; one that fails is told, and does not end the others.

    No row begins that would not be done after ``seconds``, if it took as long as the longest before it.
    """
    (measure, usual), end, longest = PARTS[part], time.perf_counter() + seconds, 0.0
    rows = [name for name in names or usual if not record.holds(part, name)]
    for name in rows:
        begun = time.perf_counter()
        if begun + longest > end:
            raise OutOfTime
        try:
            with torch.inference_mode(part != "transformers"):  # its compiler has trouble with that mode
                row, lines = measure(name, config)
        except Exception as error:
            if isinstance(error, Disturbed) and rows.count(name) == 1:
                rows.append(name)  # once more behind the others: what disturbed may be gone by then
            lines = [f"{name}: {type(error).__name__}: {error}"]
        else:
            record.add(part, name, row)
        took = time.perf_counter() - begun
        longest = max(longest, took)
        print(*lines, f"  {took:.1f} s", sep="\n", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", nargs="*", default=[], help="rows of the parts; all if absent")
    parser.add_argument("--seconds", type=float, default=3600.0, help="that each part may take")
    parser.add_argument("--others", default="refuse", help="refuse or note: other processes on the GPU")
    parser.add_argument("--compile", type=int, nargs="?", const=8, metavar="N", help="only compile, N at a time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    if options.compile:
        rehearse(options.parts, options.names, options.compile)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    be_present(CUDA)
    record, config = Record(options.out / "decode.json"), LatencyConfig(others=options.others, repeats=2)
    for part in options.parts:
        begun = time.perf_counter()
        try:
            with limited(options.seconds):
                run(part, options.names, config, record, options.seconds)
        except OutOfTime:
            print(f"{part}: its {options.seconds:g} s are over", flush=True)
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    rows = ((part, name) for part in options.parts for name in options.names or PARTS[part][1])
    if missing := [" ".join(row) for row in rows if not record.holds(*row)]:
        raise SystemExit(f"not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
