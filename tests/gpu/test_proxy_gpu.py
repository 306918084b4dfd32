"""The captured training step on a GPU against the eager one, and against the plain-torch reference in fp32."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from archsearch.architecture import make_architecture
from archsearch.config import ProxyConfig
from archsearch.model.hybrid import build_model
from archsearch.proxy.recall import measure_recall
from archsearch.proxy.result import ProxyResult
from archsearch.proxy.step import TrainingStep
from archsearch.proxy.trainer import train_proxy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
KINDS = ("a", "d", "m2")
STEPS = 12


def train(kind: str, **changes: Any) -> ProxyResult:
    architecture = make_architecture(
        hidden_size=512, vocab_size=8192, operators=f"{kind} f", options={"a": {"head_dim": 64}} if kind == "a" else {}
    )
    arguments = {key: changes.pop(key) for key in ("rungs", "keep_going", "checkpoint") if key in changes}
    recipe = {"batch": 16, "tokens": STEPS * 16 * 1024, "validations": 3, "validation_tokens": 65536, **changes}
    result = train_proxy(architecture, ProxyConfig(**recipe), seed=0, device="cuda", **arguments)
    print(kind, changes, result.paths, [round(loss, 4) for _, loss in result.curve], result.seconds)
    return result


def gap(one: ProxyResult, other: ProxyResult) -> float:
    return max(abs(a - b) for (_, a), (_, b) in zip(one.curve, other.curve, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_graph_eager_and_reference_agree(kind: str) -> None:
    graph = train(kind)
    assert (graph.paths["step"], graph.paths["loss"], graph.dtype) == ("cuda graph", "fused", "bfloat16")
    assert graph.seconds["train"] > 0
    assert gap(graph, train(kind, cuda_graph=False)) < 0.02
    reference = train(kind, kernels="torch", dtype="float32")
    assert (reference.paths["loss"], reference.dtype) == ("torch", "float32")
    assert gap(graph, reference) < 0.05
    assert reference.curve[0][1] > reference.loss + 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_goes_on(kind: str, tmp_path: Path) -> None:
    rung, path = 5 * 16 * 1024, tmp_path / "candidate.safetensors"
    whole = train(kind, rungs=(rung,))
    assert train(kind, rungs=(rung,), keep_going=lambda *point: False, checkpoint=path).stopped == rung
    rest = train(kind, rungs=(rung,), checkpoint=path)
    assert rest.resumed == rung
    assert gap(whole, rest) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_weight_normalization_in_the_graph(kind: str) -> None:
    recipe = {"weight_normalization": True, "weight_decay": 0, "learning_rate": 1e-3}
    found = train(kind, **recipe)
    for layer in found.model.layers:
        reading, writing = layer.op.stream_matrices()
        for weights, dim in ((reading, 1), (writing, 0)):
            for weight in weights:
                torch.testing.assert_close(weight.norm(dim=dim), torch.ones_like(weight.norm(dim=dim)))
    assert gap(found, train(kind, cuda_graph=False, **recipe)) < 0.02


def test_divergence_is_caught_in_the_graph() -> None:
    model = build_model(make_architecture(hidden_size=128, vocab_size=256, operators="a f"), 0, "cuda")
    step = TrainingStep(model, ProxyConfig(batch=4, context=64), torch.bfloat16, torch.device("cuda"))
    batch = torch.arange(4 * 65).view(4, 65) % 256
    for _ in range(6):
        step(batch, 1e-3)
    assert step.settled
    assert not step.diverged
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    step(batch, 1e-3)
    assert step.diverged


def test_recall_is_captured_too() -> None:
    task = {"context": 64, "pairs": [2, 4], "vocab_size": 32, "tokens": "1M", "batch": 64, "learning_rate": 3e-3}
    architecture = make_architecture(
        hidden_size=64, vocab_size=256, operators="d f a f", options={"a": {"head_dim": 16}, "d": {"head_dim": 16}}
    )
    errors = {}
    for captured in (True, False):
        config = ProxyConfig.model_validate({"recall": task, "cuda_graph": captured})
        begin = time.perf_counter()
        errors[captured] = measure_recall(architecture, config, seed=0, device="cuda").error
        print(f"recall, captured {captured}: error {errors[captured]:.4f} in {time.perf_counter() - begin:.1f} s")
    assert errors[True] == pytest.approx(errors[False], abs=0.1)
