"""Decode graphs on a GPU against the model's forward, and against what must not change them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from archsearch.architecture import make_architecture
from archsearch.errors import UsageError
from archsearch.model.decode import DecodeGraph, DecodePlan
from archsearch.model.hybrid import HybridLM, build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"head_dim": 128, "kv_heads": 2, "qk_norm": True},
    "w": {"head_dim": 64, "kv_heads": 4, "window": 20, "qkv_bias": True},
    "gd": {"head_dim": 96, "heads": 8},
    "m2": {"groups": 2},
}
KINDS = "a d gd kda gl r7 hg m m2 f w"
VOCABULARY, LENGTH, PROMPT = 5000, 90, 40


def model_of(kinds: str, **fields: Any) -> HybridLM:
    options = {kind: OPTIONS[kind] for kind in set(kinds.split()) & set(OPTIONS)}
    sizes = {"hidden_size": 1024, "vocab_size": VOCABULARY, "operators": kinds, "options": options, **fields}
    return build_model(make_architecture(**sizes), 0, "cuda", torch.bfloat16)


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float(((found.float() - want).norm(dim=-1) / want.norm(dim=-1)).max())


@pytest.mark.parametrize(
    ("kinds", "batch"),
    [*itertools.product([*KINDS.split(), KINDS], [1, 3]), (KINDS, 17), (KINDS, 40), (KINDS, 70)],
)
@torch.no_grad()
def test_graph_follows_the_model(kinds: str, batch: int) -> None:
    """From a prefill on, with the unused part of every cache poisoned, as near to fp32 as the bf16 forward is."""
    model = model_of(kinds, meta_tokens=5)
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, LENGTH), device="cuda", generator=generator)
    exact = copy.deepcopy(model).float()(tokens)
    allowed = max(2e-2, 2 * relative(model(tokens), exact))
    graph, state = DecodeGraph(model, batch, LENGTH), model.allocate_state(batch, LENGTH)
    model.prefill(tokens[:, :PROMPT], state)
    graph.plan.load(state, tokens[:, PROMPT])
    for chain in graph.plan.chains:
        for name in {"k", "v"} & set(chain.state):
            chain.state[name][:, :, int(graph.plan.position) :] = torch.nan
    for i in range(PROMPT, LENGTH):
        graph.feed(tokens[:, i])
        graph.step()
        assert relative(graph.logits, exact[:, i]) < allowed
        assert torch.equal(graph.token, graph.logits.argmax(-1))
    assert graph.position() == LENGTH


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_kernels_are_counted_as_they_run(batch: int) -> None:
    """What records print as kernels a token, against the profiler's count of a step."""
    plan = DecodePlan(model_of(KINDS), batch, LENGTH)
    plan.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        plan.step()
        torch.cuda.synchronize()
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # cuBLAS may add up parts of a product in a second kernel of its own
    ran = [name for name in ran if "splitKreduce" not in name]
    assert len(ran) == plan.kernels_per_token, ran


@torch.no_grad()
def test_steps_of_a_graph_equal_single_steps() -> None:
    model = model_of(KINDS)
    single, several = DecodeGraph(model, 1, 64), DecodeGraph(model, 1, 64, steps=4)
    for _ in range(16):
        single.step()
    for _ in range(4):
        several.step()
    assert several.position() == single.position() == 16
    assert torch.equal(several.token, single.token)
    torch.testing.assert_close(several.logits, single.logits)


@torch.no_grad()
def test_begin_forgets() -> None:
    graph = DecodeGraph(model_of(KINDS, meta_tokens=3), 2, 64)
    runs = []
    for _ in range(2):
        graph.begin()
        for _ in range(20):
            graph.step()
        runs.append(graph.logits.clone())
    torch.testing.assert_close(runs[0], runs[1])


@torch.no_grad()
def test_positions_past_the_end_are_noticed() -> None:
    graph = DecodeGraph(model_of("a f"), 1, 8)
    graph.seek(7)
    graph.step()
    graph.plan.check()
    graph.step()
    assert bool(torch.isfinite(graph.logits).all())
    with pytest.raises(UsageError):
        graph.plan.check()


@torch.no_grad()
def test_long_contexts_use_all_splits() -> None:
    """The combination of many splits against the twin's single softmax, over a cache of random numbers."""
    model = model_of("a", vocab_size=512)
    graph = DecodeGraph(model, 1, 4096)
    state = model.allocate_state(1, 4096)
    for position in (255, 1023, 3001, 4094):
        graph.begin()
        graph.seek(position)
        state.position.fill_(position)
        for name, buffer in state.layers[0].items():
            buffer.copy_(graph.plan.chains[0].state[name])
        graph.step()
        want = model.step(torch.zeros(1, dtype=torch.int64, device="cuda"), state).float()
        assert relative(graph.logits, want) < 2e-2
