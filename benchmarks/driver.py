"""The driver's own cost an evaluation: ask, submit, wait, commit, with an evaluator that takes no time.

    python benchmarks/driver.py [--trials 2000] [--sampler aging] [--mode paper] [--space search_spaces/hybrid.yaml]

``--mode default`` adds what the surrogates of ageing evolution cost.

Prints one JSON object. ``ms`` is the mean over all trials, ``last_ms`` that over the last tenth,
``cpu_ms`` the processor's share, for a study in memory and for one on the disk of ``--folder``;
``ask_ms`` tells how long the proposals of the last tenth took alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from archsearch.config import RunConfig, load_config
from archsearch.search.database import journal_mode
from archsearch.search.executors import InlineExecutor
from archsearch.search.folder import RunFolder
from archsearch.search.loop import Search
from archsearch.search.progress import Progress
from benchmarks.asks import TimedLedger, spread
from tests.search.fakes import FakeEvaluator


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description="the driver's own cost an evaluation")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--sampler", default="aging")
    parser.add_argument("--mode", default="paper", help="of the sampler aging")
    parser.add_argument("--space", default="search_spaces/hybrid.yaml")
    parser.add_argument("--folder", default=None, help="where the durable study goes; a temporary folder if absent")
    parser.add_argument("--only", choices=["memory", "durable"], default=None)
    options = parser.parse_args()
    chosen = {"evaluations": options.trials, "sampler": options.sampler, "aging.mode": options.mode}
    overrides = [f"search.{key}={value}" for key, value in chosen.items()]
    config = load_config(options.space, [*overrides, "execution.executor=inline"])
    result = {"genes": len(config.space.genes), **chosen}
    if options.only != "durable":
        result["memory"] = measure(config, TimedLedger(config))
    if options.only != "memory":
        with tempfile.TemporaryDirectory(dir=options.folder) as path:
            folder = RunFolder.create(Path(path) / "run", config)
            result["durable"] = measure(config, TimedLedger(config, folder)) | {
                "journal": journal_mode(folder.study_path)
            }
    print(json.dumps(result, indent=2))


def measure(config: RunConfig, ledger: TimedLedger) -> dict[str, Any]:
    """Milliseconds an evaluation: on the clock, of the last tenth, and of this process's CPU."""
    times: list[float] = []
    begin = time.process_time()

    def note(progress: Progress) -> None:
        times.append(time.perf_counter())

    Search(config, ledger, lambda: InlineExecutor(FakeEvaluator()), on_progress=note).run()
    ledger.close()
    tenth = max(len(times) // 10, 1)
    last = (times[-1] - times[-1 - tenth]) / tenth
    mean, cpu = (times[-1] - times[0]) / (len(times) - 1), (time.process_time() - begin) / (len(times) - 1)
    found = {name: round(1e3 * value, 2) for name, value in {"ms": mean, "last_ms": last, "cpu_ms": cpu}.items()}
    return found | {"ask_ms": spread(ledger.seconds[-tenth:])}


if __name__ == "__main__":
    main()
