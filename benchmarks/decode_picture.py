"""The picture and the ratios of a record that ``benchmarks/decode.py`` left.

python -m benchmarks.decode_picture experiments/decode-h100
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

PAIRS = {
    ("nemotron-flash-1b", "qwen3-0.6b"): 27.55 / 14.45,
    ("nemotron-flash-3b", "qwen2.5-3b"): 49.40 / 28.71,
    ("nemotron-flash-3b", "qwen3-1.7b"): 36.20 / 28.71,
}
"""Seconds of the second over the first in Table 6 of the Nemotron-Flash paper: an H100, TensorRT-LLM's kernels."""


def ratios(models: dict[str, Any]) -> list[str]:
    """Our ratios beside the paper's, and what they are made of: bytes, kernels, distance from the floor."""
    lines = [
        "| pair | paper | ours | bytes (floor) | kernels | floor fraction |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (hybrid, transformer), paper in PAIRS.items():
        if not {hybrid, transformer} <= models.keys():
            continue
        ours, theirs = models[hybrid], models[transformer]
        lines.append(
            f"| {transformer} / {hybrid} | {paper:.2f} | {theirs['tpot_ms'] / ours['tpot_ms']:.2f} "
            f"| {theirs['floor_ms'] / ours['floor_ms']:.2f} "
            f"| {theirs['kernels_per_token']} / {ours['kernels_per_token']} "
            f"| {theirs['floor_fraction']:.0%} / {ours['floor_fraction']:.0%} |"
        )
    return lines


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Floor fractions, step time against context, operators against their floor; later records count."""
    _, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 4.5), constrained_layout=True)
    models: dict[str, Any] = {}
    operators: dict[str, Any] = {}
    swept: dict[str, Any] = {}
    for record in records:
        models |= record.get("models", {})
        operators |= record.get("operators", {})
        swept |= {name: m["contexts_ms"] for name, m in record.get("models", {}).items() if len(m["contexts_ms"]) > 1}
    left.barh(list(models), [m["floor_fraction"] for m in models.values()])
    left.set(xlim=(0, 1), xlabel="floor / measured", title="decode of 8192 tokens, batch 1")
    for name, contexts in swept.items():
        middle.plot([int(context) for context in contexts], list(contexts.values()), marker=".", label=name)
    middle.set(xlabel="tokens stored", ylabel="ms a token", ylim=(0, None), title="step time")
    middle.legend(fontsize=8)
    right.barh(list(operators), [o["us"] for o in operators.values()], label="measured")
    right.barh(list(operators), [o["floor_us"] for o in operators.values()], label="floor")
    right.set(xlabel="µs an operator", title="one operator (kind, width), 4096 tokens stored")
    right.legend()
    pyplot.savefig(path, dpi=80)


def main() -> None:
    picture, *files = (Path(argument) for argument in sys.argv[1:])
    records = [json.loads(file.read_text()) for file in files]
    draw(records, picture)
    for file, record in zip(files, records, strict=True):
        if len(table := ratios(record.get("models", {}))) > 2:
            print(file, *table, sep="\n")


if __name__ == "__main__":
    main()
