"""The picture and the tables of a record that ``benchmarks/decode.py`` left; what is missing there is left out.

python -m benchmarks.decode_picture experiments/decode-h100
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from archsearch.architecture import load_architecture

PAPER = {
    "nemotron-flash-1b": 14.45, "nemotron-flash-3b": 28.71, "qwen3-0.6b": 27.55, "qwen3-1.7b": 36.20,
    "qwen2.5-3b": 49.40,
}  # fmt: skip
"""Seconds for 8k tokens in Table 6 of the Nemotron-Flash paper (arXiv 2511.18890): an H100, TensorRT-LLM's kernels."""
PAIRS = [("qwen3-0.6b", "nemotron-flash-1b"), ("qwen2.5-3b", "nemotron-flash-3b"), ("qwen3-1.7b", "nemotron-flash-3b")]
PAPER_TOKENS = 8192
PAPER_BANDWIDTH = 3.15e12
"""Bytes a second that a kernel which only reads reaches on an H100 (``experiments/decode-h100``)."""
Rows = dict[str, Any]


def table(head: str, rows: Iterator[str]) -> list[str]:
    """Markdown; nothing where there are no rows."""
    body = [f"| {row} |" for row in rows]
    return [f"| {head} |", "|" + " --- |" * (head.count("|") + 1), *body, ""] if body else []


def gathered(folder: Path) -> Rows:
    """``decode.json``; the models that it lacks as ``exact`` found them, or else an earlier ``run<N>.json``."""
    record: Rows = json.loads((folder / "decode.json").read_text())
    models: Rows = {}
    for path in sorted(folder.glob("run*.json")):
        earlier = json.loads(path.read_text())
        models |= {name: {**row, "state": path.stem} for name, row in earlier["models"].items()}
    for name, row in record.get("exact", {}).items():
        models[name] = {**models.get(name, {}), **row["runs"][0], "state": "exact"}
    models |= {name: {**row, "state": "models"} for name, row in record.get("models", {}).items()}
    return {**record, "models": models}


def of_models(models: Rows) -> Iterator[str]:
    """Latency, floor, what a kernel costs beyond it, memory and energy; and where the row is from."""
    for name, m in models.items():
        above = 1e3 * (m["tpot_ms"] - m["floor_ms"]) / m["kernels_per_token"]
        sure = f" (± {(m['interval_ms'][1] - m['interval_ms'][0]) / 2:.4f})" if m.get("interval_ms") else ""
        energy = f"{m['energy']['joules_per_token']:.2f}" if m.get("energy") else "-"
        memory = f"{m['peak_bytes'] / 1e9:.2f} | {m['state_bytes'] / 1e6:.0f}" if m.get("peak_bytes") else "- | -"
        short = f"{m['short_ms']:.3f}" if m.get("short_ms") else "-"
        yield (
            f"{name} | {m['tpot_ms']:.3f}{sure} | {m['tpot_ms'] * PAPER_TOKENS / 1e3:.2f} | {m['floor_ms']:.3f} "
            f"| {m['floor_fraction']:.1%} | {m['kernels_per_token']} | {above:.2f} | {short} | {memory} | {energy} "
            f"| {m.get('state', '-')}"
        )


def swept(models: Rows) -> Rows:
    """The models that were timed at several contexts."""
    return {name: m for name, m in models.items() if len(m.get("contexts_ms", {})) > 1}


def of_contexts(models: Rows) -> Iterator[str]:
    """Step time at each context, and microseconds that a thousand tokens add on the way to the longest."""
    for name, m in swept(models).items():
        times = {int(context): ms for context, ms in m["contexts_ms"].items()}
        pairs = [(4096, 8192), (8192, 16384), (16384, 32768)]
        slopes = " / ".join(f"{1e6 * (times[b] - times[a]) / (b - a):.1f}" for a, b in pairs)
        yield f"{name} | {' | '.join(f'{ms:.3f}' for ms in times.values())} | {slopes}"


def of_operators(operators: Rows) -> Iterator[str]:
    """Microseconds, floor fraction and kernels of each kind, both widths in a row."""
    for kind in dict.fromkeys(name.split()[0] for name in operators):
        rows = [operators.get(f"{kind} {width}") for width in (1024, 2048)]
        told = [f"{o['us']:.1f} | {o['floor_us']:.1f} | {o['floor_fraction']:.0%}" if o else "- | - | -" for o in rows]
        yield f"{kind} | {' | '.join(told)} | {next(o['kernels'] for o in rows if o)}"


def of_kinds(kinds: Rows) -> Iterator[str]:
    """Microseconds an operator of each kind at each context."""
    for kind, row in kinds.items():
        yield f"{kind} | {' | '.join(f'{us:.1f}' for us in row['us'].values())}"


def paper_floor_ms(m: Rows) -> float:
    """The floor on the paper's card. Rows that an early run only printed have no bandwidth and are of an H100."""
    return m["floor_ms"] * m.get("bandwidth", {"read": PAPER_BANDWIDTH})["read"] / PAPER_BANDWIDTH


def of_ratios(models: Rows) -> Iterator[str]:
    """Our ratios beside the paper's. Each is that of the bytes times that of the distances from the floor."""
    for other, hybrid in PAIRS:
        if not {other, hybrid} <= models.keys():
            continue
        a, b = models[other], models[hybrid]
        bytes_, ours, paper = a["floor_ms"] / b["floor_ms"], a["tpot_ms"] / b["tpot_ms"], PAPER[other] / PAPER[hybrid]
        theirs = [paper_floor_ms(m) * PAPER_TOKENS / 1e3 / PAPER[name] for name, m in ((other, a), (hybrid, b))]
        yield (
            f"{other} / {hybrid} | {paper:.2f} | {ours:.2f} | {bytes_:.2f} "
            f"| {a['kernels_per_token']} / {b['kernels_per_token']} | {ours / bytes_:.2f} "
            f"({a['floor_fraction']:.0%} / {b['floor_fraction']:.0%}) "
            f"| {paper / bytes_:.2f} ({theirs[0]:.0%} / {theirs[1]:.0%})"
        )


def of_blocks(models: Rows) -> Iterator[str]:
    """What is above the floor, for each mixer with its FFN, in the paper's runtime and in ours."""
    for name in (name for name in PAPER if name in models):
        m, blocks = models[name], len(load_architecture(name).operators) / 2
        paper = 1e3 * PAPER[name] / PAPER_TOKENS
        pairs = (paper_floor_ms(m), paper), (m["floor_ms"], m["tpot_ms"])
        rows = [f"{floor:.3f} | {ms:.3f} | {1e3 * (ms - floor) / blocks:.1f}" for floor, ms in pairs]
        yield f"{name} | {blocks:.0f} | {' | '.join(rows)}"


def of_exact(exact: Rows) -> Iterator[str]:
    """Full runs of the processes, their spread, and how far off the strata are."""
    for name, e in exact.items():
        runs = ", ".join(f"{run['full']['seconds']:.3f}" for run in e["runs"])
        yield f"{name} | {runs} | {e['spread']:.2%} | {e['strata_error']:.2%}"


def of_batches(throughput: Rows) -> Iterator[str]:
    """Tokens a second of each batch."""
    for name, t in throughput.items():
        for b in t["batches"]:
            rate, memory = f"{b['tokens_per_second']:,.0f}", b["state_bytes"] / 1e9
            yield f"{name} | {b['batch']} | {rate} | {b['step_ms']:.3f} | {b['floor_fraction']:.0%} | {memory:.2f}"


def of_prompts(prefill: Rows) -> Iterator[str]:
    """Milliseconds to the first token, and the errors that the kernels were accepted with."""
    for name, p in prefill.items():
        times = {one["length"]: f"{one['ms']:.2f}" for one in p["measured"]}
        errors = p["errors"] or {"reference": None, "fp32": None}
        reference = "-" if errors["reference"] is None else f"{errors['reference']:.3f}"
        fp32 = [f"{part} {ours:.3f} ({plain:.3f})" for part, (ours, plain) in (errors["fp32"] or {}).items()]
        told = f"{reference} | {', '.join(fp32) or '-'}"
        yield f"{name} | {' | '.join(times.get(length, '-') for length in (512, 2048, 8192, 32768))} | {told}"


def of_transformers(compared: Rows) -> Iterator[str]:
    """Transformers' compiled ``generate`` and ours."""
    for name, c in compared.items():
        yield f"{name} | {c['steady_ms']:.3f} | {c['whole_ms']:.3f} | {c['ours_ms']:.3f} | {c['ratio']:.2f}"


def tables(record: Rows) -> Iterator[str]:
    """All tables, in Markdown."""
    models, contexts = record.get("models", {}), "128 | 256 | 512 | 1k | 2k | 4k | 8k | 16k | 32k"
    whole = "ms a token | 8192 tokens [s] | floor [ms] | floor / measured | kernels | µs above it a kernel"
    short = "first 128 [ms] | peak [GB] | state [MB] | J a token | from"
    yield from table(f"model | {whole} | {short}", of_models(models))
    yield from table(f"tokens stored | {contexts} | µs a thousand, 4k to 8k / to 16k / to 32k", of_contexts(models))
    width = "µs | floor | share"
    yield from table(f"kind | d 1024: {width} | d 2048: {width} | kernels", of_operators(record.get("operators", {})))
    yield from table(f"µs, d 1024, tokens stored | {contexts}", of_kinds(record.get("contexts", {})))
    split = "paper | ours | bytes | kernels | ours over bytes (shares of the floor) | paper over bytes (shares)"
    yield from table(f"pair | {split}", of_ratios(models))
    above = "µs above the floor a block"
    blocks = f"floor, H100 | paper [ms] | {above} | floor, here | ours [ms] | {above}"
    yield from table(f"model | blocks | {blocks}", of_blocks(models))
    yield from table("model | three processes [s] | spread | strata off by", of_exact(record.get("exact", {})))
    batch = "batch | tokens/s | ms a step | floor / measured | states [GB]"
    yield from table(f"model, 32k stored | {batch}", of_batches(record.get("throughput", {})))
    errors = "off the reference | off fp32 (the reference itself)"
    yield from table(f"prompt [ms] | 512 | 2k | 8k | 32k | {errors}", of_prompts(record.get("prefill", {})))
    both = "transformers [ms a token] | with its start | ours | ratio"
    yield from table(f"shape | {both}", of_transformers(record.get("transformers", {})))


def draw(record: Rows, path: Path) -> None:
    """Floor fractions, step time against context, operators against their floor."""
    _, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 4.5), constrained_layout=True)
    models, operators = record.get("models", {}), record.get("operators", {})
    left.barh(list(models), [m["floor_fraction"] for m in models.values()])
    left.set(xlim=(0, 1), xlabel="floor / measured", title="decode of 8192 tokens, batch 1")
    for name, m in swept(models).items():
        contexts = m["contexts_ms"]
        middle.plot([int(context) for context in contexts], list(contexts.values()), marker=".", label=name)
    middle.set(xlabel="tokens stored", ylabel="ms a token", ylim=(0, None), title="step time")
    middle.legend(fontsize=8)
    right.barh(list(operators), [o["us"] for o in operators.values()], label="measured")
    right.barh(list(operators), [o["floor_us"] for o in operators.values()], label="floor")
    right.set(xlabel="µs an operator", title="one operator (kind, width), 4096 tokens stored")
    right.legend()
    pyplot.savefig(path, dpi=80)


def main() -> None:
    folder = Path(sys.argv[1])
    record = gathered(folder)
    draw(record, folder / "decode.png")
    print(*tables(record), sep="\n")


if __name__ == "__main__":
    main()
