"""Draws what ``operators.py`` measured: tokens a second of ours and of flash-linear-attention's layers.

python benchmarks/operators_picture.py operators.json operators.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    source, target = sys.argv[1:]
    record = json.loads(Path(source).read_text())
    tokens = record["batch"] * record["length"] / 1e3
    rows = [row for row in record["rows"] if row.get("ms")]
    widths = sorted({row["hidden"] for row in rows})
    figure, axes = plt.subplots(1, len(widths), figsize=(4 * len(widths), 3.2), layout="constrained")
    for axis, width in zip([axes] if len(widths) == 1 else axes, widths, strict=True):
        at = {row["kind"]: row for row in rows if row["hidden"] == width}
        kinds = list(at)
        for shift, name, label in ((-0.2, "graph_ms", "ours"), (0.2, "fla_graph_ms", "fla.layers")):
            heights = [tokens / at[kind][name] if at[kind].get(name) else 0.0 for kind in kinds]
            axis.bar([i + shift for i in range(len(kinds))], heights, 0.4, label=label)
        axis.set_xticks(range(len(kinds)), kinds)
        axis.set_title(f"width {width}")
    figure.supylabel("million tokens a second, forward and backward", fontsize="small")
    figure.suptitle(f"One operator as a CUDA graph, bf16, {record['device']}", fontsize="medium")
    figure.axes[0].legend(frameon=False)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
