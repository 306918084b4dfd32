"""Decode plans on the kernels' plain-torch twins, against the model's forward."""

from __future__ import annotations

import pytest
import torch

from archsearch.errors import EnvironmentUnfit, UsageError
from archsearch.model import layers
from archsearch.model.decode import DecodeGraph, DecodePlan
from archsearch.model.kernels import TORCH, TRITON
from archsearch.model.kernels.chains import CHAINS
from tests.kits.decode_kit import KINDS, OPTIONS, VOCABULARY, follow, model_of, poison


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kinds", [*KINDS, "a f d m2 f w gd kda gl r7 m f"])
@pytest.mark.parametrize("batch", [1, 3])
def test_plan_follows_the_model(kinds: str, batch: int) -> None:
    model = model_of(kinds, meta_tokens=3 * (batch == 1), tie_embeddings=batch == 1)
    plan = DecodePlan(model, batch, 20, TORCH)
    poison(plan)
    with torch.no_grad():
        follow(model, plan, torch.randint(VOCABULARY, (batch, 12)), 0)
        plan.begin()
        follow(model, plan, torch.randint(VOCABULARY, (batch, 12)), 0)
    assert int(plan.position) == 12 + plan.meta


@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_plan_goes_on_from_a_prefill(prompt: int) -> None:
    model = model_of("a d w m2 m gl r7 gd kda hg f", meta_tokens=2)
    plan, tokens = DecodePlan(model, 2, 20, TORCH), torch.randint(VOCABULARY, (2, 14))
    state = model.allocate_state(2, 20)
    with torch.no_grad():
        model.prefill(tokens[:, :prompt], state)
        plan.load(state, tokens[:, prompt])
        poison(plan)
        follow(model, plan, tokens, prompt)


def test_plan_feeds_its_own_tokens_back() -> None:
    model = model_of("d a f")
    plan = DecodePlan(model, 1, 10, TORCH)
    tokens = [0]
    with torch.no_grad():
        for _ in range(5):
            plan.step()
            tokens.append(int(plan.token))
        assert model(torch.tensor([tokens[:-1]])).argmax(-1)[0].tolist() == tokens[1:]


def test_equal_fusion() -> None:
    plan = DecodePlan(model_of(" ".join(OPTIONS)), 1, 8, TORCH)
    mixers = dict.fromkeys(OPTIONS, 3)
    assert plan.kernels == {**mixers, "m": 4, "f": 2, "head": 2}
    assert plan.kernels_per_token == (len(OPTIONS) - 1) * 3 + 1 + 2 + 2
    assert not plan.plain


def test_kind_without_kernels_runs_its_own_step(monkeypatch) -> None:
    monkeypatch.delitem(CHAINS, layers.GatedDeltaNet)
    model = model_of("gd f", meta_tokens=2)
    plan, tokens = DecodePlan(model, 2, 20, TORCH), torch.randint(VOCABULARY, (2, 14))
    assert plan.plain == {"gd"}
    state = model.allocate_state(2, 20)
    with torch.no_grad():
        follow(model, plan, tokens, 0)
        model.prefill(tokens[:, :5], state)
        plan.load(state, tokens[:, 5])
        follow(model, plan, tokens, 5)


def test_plan_refuses_what_it_cannot_do() -> None:
    model = model_of("a f", meta_tokens=2)
    for batch, length in ((0, 8), (1, 0)):
        with pytest.raises(UsageError):
            DecodePlan(model, batch, length, TORCH)
    plan = DecodePlan(model, 1, 8, TORCH)
    for tokens in (-1, 8):
        with pytest.raises(UsageError):
            plan.seek(tokens)
    with pytest.raises(UsageError, match="2 x 10"):
        plan.load(model.allocate_state(2, 8), torch.zeros(2, dtype=torch.int64))
    plan.seek(7)
    plan.step()
    plan.check()
    plan.step()
    with pytest.raises(UsageError, match="11 tokens decoded into 10"):
        plan.check()
    with pytest.raises(UsageError, match="float64"):
        DecodePlan(model.double(), 1, 8, TORCH)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_graph_needs_a_gpu() -> None:
    with pytest.raises(EnvironmentUnfit):
        DecodeGraph(model_of("f"), 1, 8)


def test_kernels_of_larger_batches_are_counted() -> None:
    plan = DecodePlan(model_of("a d f"), 2, 8, TRITON)
    assert plan.kernels == {"a": 4, "d": 5, "f": 4, "head": 4}
    assert plan.kernels_per_token == 4 + 5 + 4 + 4
