"""Record and picture of what the GPU tests of the operators print: how far each kind is from its reference.

python -m pytest -m gpu -q -rP tests/gpu/test_operators_gpu.py tests/gpu/test_fla_models.py | tee agreement.txt
python benchmarks/operator_agreement.py agreement.txt results.json agreement.png
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TRAINING = re.compile(r"^(\S+) T=(\d+) (\S+=.*)$")
PREFILL = re.compile(r"^(\S+) prompt=(\d+) error=(\S+)$")
WEIGHTS = re.compile(r"^(\w+) (\{'ours': .*'between': .*\})$")
LENGTH = 300


def parse(lines: list[str]) -> dict[str, Any]:
    """The printed errors by test: training paths, prefill and the steps behind it, equal weights."""
    found: dict[str, Any] = {"training": [], "prefill_then_step": [], "equal_weights": {}}
    for line in lines:
        if match := TRAINING.match(line):
            pairs = (pair.rpartition("=") for pair in match[3].split())
            errors = {name: float(value) for name, _, value in pairs}
            found["training"].append({"case": match[1], "length": int(match[2]), "errors": errors})
        elif match := PREFILL.match(line):
            found["prefill_then_step"].append({"case": match[1], "prompt": int(match[2]), "error": float(match[3])})
        elif match := WEIGHTS.match(line):
            found["equal_weights"][match[1]] = ast.literal_eval(match[2])
    for name in ("training", "prefill_then_step"):
        found[name].sort(key=lambda row: (row["case"], row.get("length", row.get("prompt"))))
    return found


def write(path: Path, record: dict[str, Any]) -> None:
    """JSON with a row a line."""
    rows = {name: value for name, value in record.items() if isinstance(value, list)}
    lines = [f'"{name}": {json.dumps(value)}' for name, value in record.items() if name not in rows]
    lines += [f'"{name}": [\n ' + ",\n ".join(map(json.dumps, values)) + "\n]" for name, values in rows.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Errors of outputs and gradients at the longest length."""
    rows = [row for row in rows if row["length"] == LENGTH]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for at, row in enumerate(rows):
        gradients = [error for name, error in row["errors"].items() if name != "output"]
        axis.plot([at] * len(gradients), gradients, "o", color="0.5", markersize=4, label="" if at else "a gradient")
        axis.plot(at, row["errors"]["output"], "_", color="tab:red", markersize=14, mew=2, label="" if at else "output")
    axis.axhline(2e-2, color="tab:red", linestyle=":", linewidth=0.8)
    axis.axhline(5e-2, color="0.5", linestyle=":", linewidth=0.8)
    names = [row["case"].replace("head_dim", "") for row in rows]
    axis.set_xticks(range(len(rows)), names, rotation=60, ha="right", fontsize=7)
    axis.set_yscale("log")
    axis.set_ylabel("relative error (2-norm)")
    axis.set_title(f"bf16 training path against the fp32 reference, {LENGTH} tokens", fontsize="medium")
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    source, target, picture = map(Path, sys.argv[1:])
    record = parse(source.read_text().splitlines())
    write(target, record)
    draw(picture, record["training"])


if __name__ == "__main__":
    main()
