from __future__ import annotations

import torch

from archsearch.architecture import make_architecture
from archsearch.config import ProxyConfig
from archsearch.model.hybrid import build_model
from archsearch.proxy.optimizer import make_optimizer, moments, set_step

TINY = make_architecture(
    hidden_size=32, vocab_size=256, operators="a f", options={"a": {"head_dim": 16}, "f": {"multiple_of": 32}}
)


def test_only_matrices_decay() -> None:
    model = build_model(TINY)
    optimizer = make_optimizer(model, ProxyConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if parameter.ndim < 2 else 0.3), name
    assert decay[id(model.norm.weight)] == 0.0
    assert decay[id(model.embed_tokens.weight)] == 0.3


def test_state_given_beforehand_changes_no_update() -> None:
    config = ProxyConfig(learning_rate=0.01)
    prepared, plain = build_model(TINY), build_model(TINY)
    ours = make_optimizer(prepared, config)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for group in ours.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(3):
        for model, optimizer in ((prepared, ours), (plain, theirs)):
            model(torch.arange(16)[None]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(list(prepared.parameters()), list(plain.parameters()))


def test_moments_are_those_of_the_optimizer() -> None:
    model = build_model(TINY)
    optimizer = make_optimizer(model, ProxyConfig())
    set_step(optimizer, 7)
    assert {float(state["step"]) for state in optimizer.state.values()} == {7.0}
    found = dict(moments(model, optimizer))
    assert len(found) == 2 * len(list(model.parameters()))
    found["exp_avg.norm.weight"].fill_(3)
    assert float(optimizer.state[model.norm.weight]["exp_avg"].min()) == 3
