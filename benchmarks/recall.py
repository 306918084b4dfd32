"""Associative recall of attention, linear mixers and hybrids: who finds what as the pairs grow.

    python benchmarks/recall.py [--operators "d a" "d d" ...] [--width 32] [--head 8] [--plain] [--jobs 1]
        [--device auto] [--set KEY=VALUE ...] [--json PATH] [--png PATH]

Trains each list of operators on the generated task of ``archsearch/proxy/recall.py`` (Arora et al. 2023, Zoology)
and prints the accuracy at each number of pairs. ``--set`` takes keys of ``proxy.recall``, lists with commas.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from archsearch.architecture import make_architecture
from archsearch.config import ProxyConfig
from archsearch.files import Document, parse_yaml, to_json, validate, write_atomic

HYBRIDS = ["d a", "m2 a", "d d", "m2 m2"]


def options(head: int, qk_norm: bool) -> dict[str, dict[str, Any]]:
    """Linear mixers with heads of ``head`` and states of that size: their memory ends within the numbers of pairs."""
    return {
        "a": {"head_dim": 16, "qk_norm": qk_norm},
        "w": {"head_dim": 16, "qk_norm": qk_norm, "window": 16},
        "d": {"head_dim": head},
        "gd": {"head_dim": head},
        "gl": {"head_dim": head},
        "m2": {"head_dim": 16, "state": head},
        "f": {"ratio": 2, "multiple_of": 32},
    }


def proxy_settings(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of ``proxy.recall``; ``kernels``, ``warmup`` and ``cuda_graph`` are the proxy's own."""
    values: dict[str, Any] = {"warmup": 0.1, "recall": {}}
    for pair in pairs:
        key, _, text = pair.partition("=")
        value = parse_yaml(f"[{text}]" if key == "pairs" else text, pair).value
        (values if key in ("kernels", "warmup", "cuda_graph") else values["recall"])[key] = value
    return validate(ProxyConfig, Document(values, "--set", {})).model_dump(mode="json")


def train(
    operators: str, width: int, head: int, qk_norm: bool, proxy: dict[str, Any], device: str, seed: int
) -> dict[str, Any]:
    import torch

    from archsearch.latency.device import device_name, resolve_device
    from archsearch.proxy.recall import measure_recall

    torch.set_num_threads(1)
    chosen = {kind: values for kind, values in options(head, qk_norm).items() if kind in operators.split()}
    architecture = make_architecture(hidden_size=width, vocab_size=256, operators=operators, options=chosen)
    where = resolve_device(device)
    start = time.perf_counter()
    found = measure_recall(architecture, ProxyConfig.model_validate(proxy), seed=seed, device=where)
    state = architecture.state_bytes(proxy["recall"]["context"])
    return {
        "operators": operators,
        "width": width,
        "state_bytes": state,
        **found.summary(),
        "seconds": time.perf_counter() - start,
        "device": device_name(where),
    }


def print_row(row: dict[str, Any]) -> None:
    cells = "  ".join(f"{pairs}: {value:6.1%}" for pairs, value in row["accuracy"].items())
    print(f"{row['operators']:<12} {row['state_bytes'] / 1024:7.1f} KiB  {cells}  {row['seconds']:.0f} s", flush=True)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from archsearch.report.picture import FRONT, GRID, SEED, STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.0), dpi=120, facecolor="white")
        axes = figure.add_axes((0.09, 0.13, 0.68, 0.74))
        marks = iter("osD^vP*X<>hp" * 4)
        for row in rows:
            kinds = row["operators"].split()
            full = "a" in kinds
            pairs = [int(name) for name in row["accuracy"]]
            style = "-" if full else "--"
            color = FRONT if full else SEED
            axes.plot(
                pairs, list(row["accuracy"].values()), style, marker=next(marks), color=color, label=row["operators"]
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(pairs, [str(n) for n in pairs])
        axes.set_xlabel("pairs of key and value in the context")
        axes.set_ylabel("accuracy")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(True, color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.text(0.09, 0.94, title, fontsize=13, fontweight="bold", va="center")
        figure.savefig(path, format="png", metadata={"Software": "archsearch"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", nargs="+", default=HYBRIDS)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--head", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="attention without QK norm")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    given = parser.parse_args()
    proxy = proxy_settings(given.set)
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=context) as pool:
        jobs = [
            pool.submit(train, name, given.width, given.head, not given.plain, proxy, given.device, given.seed)
            for name in given.operators
        ]
        for job in as_completed(jobs):
            rows.append(job.result())
            print_row(rows[-1])
            if given.json:
                write_atomic(
                    given.json,
                    to_json({"proxy": proxy, "width": given.width, "qk_norm": not given.plain, "rows": rows}),
                )
    rows.sort(key=lambda row: row["error"])
    if given.png:
        draw(rows, given.png, f"Associative recall at width {given.width}: {rows[0]['device']}")


if __name__ == "__main__":
    main()
