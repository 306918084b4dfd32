from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from archsearch.architecture import make_architecture
from archsearch.config import ProxyConfig
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.operators import OPERATORS
from archsearch.proxy.trainer import train_proxy
from archsearch.proxy.weight_norm import WeightNormalization

OPTIONS: dict[str, dict[str, Any]] = {
    kind: {"head_dim": 12} if "head_dim" in config.model_fields else {} for kind, config in OPERATORS.items()
}
OPTIONS |= {"f": {"multiple_of": 20}, "m2": {"head_dim": 12, "state": 8}}


def model_of(operators: str, tied: bool = True, hidden: int = 48) -> HybridLM:
    options = {kind: OPTIONS[kind] for kind in operators.split()}
    return build_model(
        make_architecture(
            hidden_size=hidden,
            vocab_size=256,
            operators=operators,
            options=options,
            tie_embeddings=tied,
            meta_tokens=3,
        )
    )


@pytest.mark.parametrize("kind", OPERATORS)
def test_every_kind_says_what_reads_and_writes_the_stream(kind: str) -> None:
    """Fails for a new kind whose projections between inner features are not in ``Layer.internal``."""
    reading, writing = model_of(kind).layers[0].op.stream_matrices()
    assert reading
    assert {weight.shape[1] for weight in reading} == {48}
    assert [weight.shape[0] for weight in writing] == [48]


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_normalised_and_what_is_not(tied: bool) -> None:
    model = model_of("a f m2 d", tied)
    before = copy.deepcopy(model)
    WeightNormalization(model)()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    for name, weight in model.named_parameters():
        if weight.ndim != 2 or name == "meta_tokens":
            assert name not in changed
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight"))
            norms = weight.norm(dim=0 if writes else 1)
            torch.testing.assert_close(norms, torch.ones_like(norms))
    plain = model(torch.arange(20)[None])
    torch.testing.assert_close(plain / model.head_weight.norm(dim=1), plain)


def test_training_keeps_the_norms_and_learns() -> None:
    recipe = {"weight_normalization": True, "weight_decay": 0, "learning_rate": 0.01, "tokens": 20 * 512}
    config = ProxyConfig(batch=8, context=64, validation_tokens=2048, validations=2, **recipe)
    result = train_proxy(model_of("a f").architecture, config, seed=0, device="cpu")
    assert result.loss < result.curve[0][1] < 5.5
    norms = result.model.embed_tokens.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
