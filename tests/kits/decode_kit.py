"""Models and decode plans to compare: each step of a plan must give what the model's forward gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archsearch.architecture import make_architecture
from archsearch.model.decode import DecodePlan
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.operators import OPERATORS

VOCABULARY = 77
OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"head_dim": 32, "heads": 3, "kv_heads": 1, "qk_norm": True},
    "w": {"head_dim": 24, "heads": 4, "kv_heads": 2, "window": 5, "qkv_bias": True},
    "d": {"head_dim": 32},
    "gd": {"head_dim": 24, "heads": 2},
    "kda": {"head_dim": 24, "heads": 2, "expand_v": 1.5, "gate_rank": 20},
    "gl": {"head_dim": 24},
    "hg": {"head_dim": 48},
    "r7": {"head_dim": 24, "decay_rank": 8, "rate_rank": 40},
    "m": {"state": 12, "dt_rank": 40},
    "m2": {"head_dim": 32, "state": 16, "groups": 2},
    "f": {"ratio": 2, "multiple_of": 32},
}
KINDS = [*OPTIONS, *(kind for kind in OPERATORS if kind not in OPTIONS)]


def model_of(kinds: str, **fields: Any) -> HybridLM:
    options = {kind: OPTIONS.get(kind, {"head_dim": 32}) for kind in set(kinds.split())}
    sizes = {"hidden_size": 96, "vocab_size": VOCABULARY, "operators": kinds, "options": options, **fields}
    model = build_model(make_architecture(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def follow(model: HybridLM, plan: DecodePlan, tokens: Tensor, start: int) -> None:
    """Feed ``tokens`` from ``start`` on and compare each step's logits with the model's forward."""
    want = model(tokens)
    for i in range(start, tokens.shape[1]):
        plan.feed(tokens[:, i])
        plan.step()
        torch.testing.assert_close(plan.logits, want[:, i], rtol=1e-3, atol=1e-3)
        assert torch.equal(plan.token, plan.logits.argmax(-1))


def poison(plan: DecodePlan) -> None:
    for chain in plan.chains:
        for name in {"k", "v"} & set(chain.state):
            chain.state[name][:, :, int(plan.position) :] = torch.nan
