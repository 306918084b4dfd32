"""Weight normalization against none: attention, DeltaNet and Mamba-2 models of 30 M parameters, several seeds.

Both sides train at the learning rate 1e-3, as in the paper's ablation: with AdamW and its weight decay, and with
Adam without decay and unit rows and columns after every step. Same data order and same first weights, but for
the projection, at equal seed. Rows that the JSON file holds already are not trained again.

    python benchmarks/weight_normalization.py --json results.json --seeds 0 1 2
    python benchmarks/weight_normalization.py --json results.json --join other.json --show --picture results.png

Parts that ran on several days or machines of one kind are joined; a row of the same model, recipe and seed counts once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from archsearch.architecture import Architecture, make_architecture
from archsearch.config import ProxyConfig
from archsearch.files import to_json, write_atomic

MODELS = {"attention": "a", "DeltaNet": "d", "Mamba-2": "m2"}
"""The mixers. Four of one kind, an FFN of ratio 3 behind each, at a width of 768 are 31 to 37 M parameters."""
RECIPES: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1},
    "weight normalization": {"weight_decay": 0.0, "weight_normalization": True},
}


def architecture(model: str, vocabulary: int, hidden: int, pairs: int) -> Architecture:
    """A pure model: one kind of mixer, ``pairs`` of it and an FFN."""
    kind = MODELS[model]
    options = {"a": {"head_dim": 64}, "d": {"head_dim": min(128, hidden)}, "m2": {"head_dim": 64, "state": 128}}
    return make_architecture(
        hidden_size=hidden,
        vocab_size=vocabulary,
        operators=" ".join([f"{kind} f"] * pairs),
        options={kind: options[kind], "f": {"ratio": 3}},
        tie_embeddings=False,
    )


def train(candidate: Architecture, model: str, recipe: str, seed: int, config: ProxyConfig) -> dict[str, Any]:
    """One training as a row."""
    import torch

    from archsearch.latency.lock import sharing
    from archsearch.proxy.data import load_corpus
    from archsearch.proxy.trainer import train_proxy

    config = config.model_copy(update=RECIPES[recipe])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    with sharing(torch.device(device)) as give_way:  # measurements of other processes pass
        found = train_proxy(candidate, config, seed=seed, device=device, on_progress=lambda *_: give_way())
    return {
        "model": model,
        "recipe": recipe,
        "seed": seed,
        "parameters": candidate.parameters,
        "loss": found.loss,
        "curve": found.curve,
        "tokens": found.tokens,
        "corpus_tokens": len(load_corpus(config, candidate.vocab_size).train),
        "tokens_per_second": found.tokens_per_second,
        "seconds": time.perf_counter() - begin,
        "phases": found.seconds,
        "paths": found.paths,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "architecture": candidate.to_dict(),
    }


def joined(paths: list[Path]) -> list[dict[str, Any]]:
    """The rows of those files that exist, each training once."""
    rows = [row for path in paths if path.exists() for row in json.loads(path.read_text())]
    return list({(row["model"], row["recipe"], row["seed"]): row for row in reversed(rows)}.values())[::-1]


def show(rows: list[dict[str, Any]]) -> None:
    """A line a model: mean losses, and the mean of the paired differences with its 95 % interval (Student's t)."""
    from scipy.stats import t

    for model in MODELS:
        losses = {(row["recipe"], row["seed"]): row["loss"] for row in rows if row["model"] == model}
        plain, normal = RECIPES
        seeds = sorted(seed for recipe, seed in losses if recipe == plain and (normal, seed) in losses)
        if not seeds:
            continue
        gains = [losses[plain, seed] - losses[normal, seed] for seed in seeds]
        means = [statistics.fmean(losses[recipe, seed] for seed in seeds) for recipe in RECIPES]
        mean, interval = statistics.fmean(gains), ""
        if len(gains) > 1:
            half = t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
            interval = f" (95 % from {mean - half:+.4f} to {mean + half:+.4f})"
        print(
            f"{model:10} {means[0]:.4f} ▶ {means[1]:.4f} nats, perplexity {math.exp(means[0]):.3f} ▶ "
            f"{math.exp(means[1]):.3f}, gain {mean:+.4f}{interval} nats over {len(gains)} seeds"
        )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The gain over the course of training, a panel a model that there is, a line a seed."""
    from matplotlib.figure import Figure

    curves = {(row["model"], row["recipe"], row["seed"]): row["curve"] for row in rows}
    models = [model for model in MODELS if any(key[0] == model for key in curves)]
    figure = Figure(figsize=(1.6 + 2.8 * len(models), 3.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        plain, normal = RECIPES
        for _, _, seed in sorted(key for key in curves if key[:2] == (model, normal)):
            pairs = zip(curves.get((model, plain, seed), []), curves[model, normal, seed], strict=False)
            gains = [(tokens / 1e6, loss - other) for (tokens, loss), (_, other) in pairs]
            panel.plot(*zip(*gains, strict=True), marker="o", markersize=3, label=f"seed {seed}")
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(title=model, xlabel="million tokens")
    panels[0].set_ylabel("gain of weight normalization [nats]")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--join", type=Path, nargs="+", default=[], help="files of rows to take in")
    parser.add_argument("--show", action="store_true", help="only show what there is")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--pairs", type=int, default=4, help="mixers, an FFN behind each")
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--data", default="builtin:python")
    parser.add_argument("--tokens", type=int, default=50_003_968)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--validation-tokens", type=int, default=300_000)
    args = parser.parse_args()
    rows = joined([args.json, *args.join])
    fields = {name: getattr(args, name) for name in ("data", "tokens", "batch", "context", "validation_tokens")}
    config = ProxyConfig(learning_rate=1e-3, validations=10, **fields)
    done = {(row["model"], row["recipe"], row["seed"]) for row in rows}
    wanted = [(model, recipe, seed) for seed in args.seeds for model in args.models for recipe in RECIPES]
    for key in [] if args.show else [key for key in wanted if key not in done]:
        candidate = architecture(key[0], args.vocabulary, args.hidden, args.pairs)
        rows.append(train(candidate, *key, config))
        row = rows[-1]
        print(*key, f"loss {row['loss']:.4f}, {row['seconds']:.1f} s", row["phases"], flush=True)
        write_atomic(args.json, to_json(rows, indent=None))
    if args.join:
        write_atomic(args.json, to_json(rows, indent=None))
    show(rows)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
