"""Training throughput of whole models on a GPU: ours and flash-linear-attention's equivalent, in one run.

Hybrids of DeltaNet, attention and FFN: 12 operators at d 512 (29 M parameters), also at a batch that launches
dominate, and two of 340 M, 40 operators at d 1024 and 24 at d 1280. A step is forward, backward, clipping and
fused AdamW on random tokens, in bf16 with fp32 weights.
flash-linear-attention's models are trained in a plain eager loop, as its users do, with its fused norm, SwiGLU
and cross-entropy; flash-attn is not needed, its attention runs through torch's. Kernels that both use have the same
configurations, those of ``archsearch doctor --tune``; the rest of theirs are tuned at their first step, which takes
minutes: ``--warm`` before does it, and keeps what was found for later processes.

    python benchmarks/proxy.py --json throughput.json
    python benchmarks/proxy.py --warm        # only compile and tune, for a timing that follows
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from archsearch.architecture import Architecture, make_architecture
from archsearch.config import ProxyConfig
from archsearch.model import tuned
from archsearch.model.hybrid import build_model
from archsearch.proxy.step import TrainingStep

CONTEXT = 1024
PEAK_BF16 = 989e12  # dense, H100 SXM and H200 data sheets
Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A hybrid whose mixers are DeltaNet but for attention at some places, an FFN of ratio 3 behind each."""

    name: str
    hidden: int
    vocabulary: int
    mixers: str
    batch: int

    @property
    def architecture(self) -> Architecture:
        """As ours."""
        return make_architecture(
            hidden_size=self.hidden,
            vocab_size=self.vocabulary,
            operators=" f ".join(self.mixers.split()) + " f",
            options={"a": {"head_dim": 64, "kv_heads": self.hidden // 64}, "f": {"ratio": 3}},
            tie_embeddings=False,
        )

    def theirs(self, **fused: bool) -> torch.nn.Module:
        """As flash-linear-attention's."""
        from fla.layers import attn
        from fla.models import DeltaNetConfig, DeltaNetForCausalLM

        attn.flash_attn_func = torch_attention
        tuned.install()
        mixers = self.mixers.split()
        places = [place for place, kind in enumerate(mixers) if kind == "a"]
        config = DeltaNetConfig(
            hidden_size=self.hidden,
            num_heads=self.hidden // 128,
            num_hidden_layers=len(mixers),
            intermediate_size=3 * self.hidden,
            vocab_size=self.vocabulary,
            max_position_embeddings=CONTEXT,
            attn={"layers": places, "num_heads": self.hidden // 64, "num_kv_heads": self.hidden // 64},
            use_cache=False,
            **fused,
        )
        return DeltaNetForCausalLM(config).cuda()


CASES = (
    Case("12 operators, d 512", 512, 8192, "d d a d d d", 64),
    Case("40 operators, d 1024", 1024, 32768, " ".join(["d d d a"] * 5), 32),
    Case("24 operators, d 1280", 1280, 32768, " ".join(["d d d a"] * 3), 48),
    Case("12 operators, d 512, batch 4", 512, 8192, "d d a d d d", 4),
)


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, **_: Any) -> torch.Tensor:
    """In flash-attn's layout [B, T, heads, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def windows(case: Case) -> torch.Tensor:
    """Random token windows [B, context + 1]."""
    return torch.randint(case.vocabulary, (case.batch, CONTEXT + 1), generator=torch.Generator().manual_seed(0))


def ours(case: Case, **recipe: Any) -> tuple[Step, int]:
    """A step of ours with the batch's upload, and the number of parameters."""
    config = ProxyConfig(batch=case.batch, context=CONTEXT, **recipe)
    model = build_model(case.architecture, 0, "cuda").use(config.kernels)
    step = TrainingStep(model, config, torch.bfloat16, torch.device("cuda"))
    batch = windows(case).pin_memory()
    return lambda: step(batch, 1e-4), case.architecture.parameters


def theirs(case: Case, **fused: bool) -> tuple[Step, int]:
    """A step of flash-linear-attention's model, and the number of parameters."""
    model = case.theirs(**fused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = windows(case).cuda()

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=batch[:, :-1].contiguous(), labels=batch[:, :-1].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in model.parameters())


def variants(case: Case) -> dict[str, Callable[[], tuple[Step, int]]]:
    """What is compared, by name."""
    normal = {"weight_normalization": True, "weight_decay": 0, "learning_rate": 1e-3}
    return {
        "archsearch": lambda: ours(case, kernels="fla"),
        "archsearch, eager": lambda: ours(case, kernels="fla", cuda_graph=False),
        "archsearch, weight normalization": lambda: ours(case, kernels="fla", **normal),
        "fla": lambda: theirs(case),
        "fla, fused linear cross-entropy": lambda: theirs(
            case, fuse_cross_entropy=False, fuse_linear_cross_entropy=True
        ),
    }


def timed(step: Step, seconds: float) -> list[float]:
    """Seconds of each of some steps that together take about ``seconds``, by device events."""
    begin = time.perf_counter()
    for _ in range(6):
        step()
        torch.cuda.synchronize()
        took, begin = time.perf_counter() - begin, time.perf_counter()
    count = max(10, min(200, int(seconds / took)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def measure(case: Case, name: str, seconds: float) -> dict[str, Any]:
    """One row of the table; a failure is a row too."""
    row: dict[str, Any] = {"model": case.name, "implementation": name}
    try:
        begin = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        step, parameters = variants(case)[name]()
        step()
        torch.cuda.synchronize()
        row |= {"parameters": parameters, "first_step_s": time.perf_counter() - begin}
        times = timed(step, seconds)
    except Exception as problem:
        return {**row, "failed": f"{type(problem).__name__}: {problem}"}
    tokens = case.batch * CONTEXT
    median, deciles = statistics.median(times), statistics.quantiles(times, n=10)
    return row | {
        "ms": 1e3 * median,
        "ms_deciles": [1e3 * deciles[0], 1e3 * deciles[-1]],
        "steps": len(times),
        "tokens_per_s": tokens / median,
        "peak_share": 6 * parameters * tokens / median / PEAK_BF16,
        "peak_share_counted": case.architecture.train_flops(CONTEXT) * tokens / median / PEAK_BF16,
        "memory_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


def profile(case: Case, name: str) -> None:
    """Print which kernels a step spends its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    step, _ = variants(case)[name]()
    for _ in range(6):
        step()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels) / 5e3
    print(f"{case.name}, {name}: {total:.2f} ms of kernels a step, {sum(k.count for k in kernels) // 5} of them")
    for kernel in kernels[:60]:
        print(f"{kernel.self_device_time_total / 5e3:8.3f} ms {kernel.count // 5:5} x {kernel.key[:100]}", flush=True)


def losses(case: Case) -> list[dict[str, Any]]:
    """Head and cross-entropy alone, forward and backward: ms and MiB of ours, of its torch twin, and of fla's."""
    from fla.modules import FusedLinearCrossEntropyLoss

    from archsearch.proxy import loss

    model = build_model(case.architecture, 0, "cuda")
    x = torch.randn(case.batch, CONTEXT, case.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = windows(case).cuda()[:, 1:].contiguous()
    theirs = FusedLinearCrossEntropyLoss(accumulate_grad_in_fp32=False)
    runs = {
        "ours, fused": lambda: loss.token_loss(model, x, targets),
        "ours, checkpointed": lambda: loss.checkpointed_loss(model, x.flatten(0, 1), targets.flatten()),
        "fla, fused": lambda: theirs(x, targets, model.head_weight.to(torch.bfloat16)),
    }
    rows = []
    for name, run in runs.items():

        def step(run: Step = run) -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                value = run()
            value.backward()
            x.grad = model.head_weight.grad = None

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        milliseconds = 1e3 * statistics.median(timed(step, 0.5))
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows.append({"model": case.name, "implementation": name, "ms": milliseconds, "memory_mib": memory})
        print(f"{case.name:22} {name:34} {milliseconds:8.2f} ms {memory:8.0f} MiB", flush=True)
    return rows


def record(path: Path | None, table: str, row: dict[str, Any]) -> None:
    """Add a row to the JSON file, in place of an older one of the same model and implementation."""
    if path is None:
        return
    versions = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    versions |= {name: __import__(name).__version__ for name in ("triton", "fla")}
    found = json.loads(path.read_text()) if path.exists() else {}
    same = row["model"], row["implementation"]
    kept = [old for old in found.get(table, []) if (old["model"], old["implementation"]) != same]
    path.write_text(json.dumps({**found, "versions": versions, table: [*kept, row]}, indent=2) + "\n")


def draw(path: Path, picture: Path) -> None:
    """Tokens a second of every implementation, a panel a model."""
    from matplotlib.figure import Figure

    found = json.loads(path.read_text())
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    figure = Figure(figsize=(8, 0.4 + 2 * len(models)), dpi=120, layout="constrained")
    for panel, model in zip(figure.subplots(len(models), 1, squeeze=False)[:, 0], models, strict=True):
        rows = [row for row in found["rows"] if row["model"] == model and "failed" not in row][::-1]
        names = [row["implementation"] for row in rows]
        bars = panel.barh(names, [row["tokens_per_s"] / 1e6 for row in rows])
        panel.bar_label(bars, [f" {row['tokens_per_s'] / 1e6:.3f}" for row in rows])
        for bar, name in zip(bars, names, strict=True):
            bar.set_color("#0b6e99" if name.startswith("archsearch") else "#b0b0b0")
        panel.set(title=f"{model}, {rows[0]['parameters'] / 1e6:.0f} M parameters", xlabel="million tokens a second")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.15)
    figure.suptitle(found["versions"]["device"])
    figure.savefig(picture)


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    head = f"{row['model']:22} {row['implementation']:34}"
    if "failed" in row:
        print(f"{head} FAILED {row['failed'][:300]}", flush=True)
        return
    print(
        f"{head} {row['ms']:8.2f} ms {row['tokens_per_s'] / 1e6:6.3f} Mtok/s "
        f"peak {row['peak_share']:5.1%}, counted {row['peak_share_counted']:5.1%} "
        f"{row['memory_mib']:7.0f} MiB first {row['first_step_s']:6.1f} s, {row['parameters'] / 1e6:.1f} M",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--only", nargs="+", help="names of implementations")
    parser.add_argument("--batch", type=int, help="sequences a step, instead of the case's")
    parser.add_argument("--seconds", type=float, default=1.5, help="timed seconds a row")
    parser.add_argument("--warm", action="store_true", help="one step of everything, nothing timed")
    parser.add_argument("--heads", action="store_true", help="also time head and cross-entropy alone")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes, nothing else")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="draw what the JSON file holds, time nothing")
    args = parser.parse_args()
    if args.picture:
        draw(args.json, args.picture)
        return
    for case in (CASES[place] for place in args.cases):
        case = case if args.batch is None else replace(case, batch=args.batch)
        for name in args.only or variants(case):
            gc.collect()
            torch.cuda.empty_cache()
            if args.profile:
                profile(case, name)
            elif args.warm:
                begin = time.perf_counter()
                variants(case)[name]()[0]()
                torch.cuda.synchronize()
                tuned.remember()
                print(f"{case.name:22} {name:34} first step {time.perf_counter() - begin:.1f} s", flush=True)
            else:
                row = measure(case, name, args.seconds)
                show(row)
                record(args.json, "rows", row)
        if args.heads:
            for row in losses(case):
                record(args.json, "heads", row)


if __name__ == "__main__":
    main()
