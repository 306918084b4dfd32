"""The whole model: weights, meta tokens, decoding, causality, and Qwen3 as transformers runs it."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from archsearch.architecture import Architecture, load_architecture, make_architecture, reference_names
from archsearch.errors import UsageError
from archsearch.model.hybrid import HybridLM, build_model

SMALL = {
    "a": {"head_dim": 8, "kv_heads": 2},
    "w": {"head_dim": 8, "window": 6},
    "d": {"head_dim": 8},
    "gd": {"head_dim": 8},
    "gl": {"head_dim": 8},
    "m2": {"head_dim": 8, "state": 8},
    "f": {"multiple_of": 8},
}


def small(operators: str = "d f m2 f a f gd gl w f", **fields: object) -> Architecture:
    return make_architecture(**{"hidden_size": 32, "vocab_size": 40, "operators": operators, "options": SMALL} | fields)


def shrunk(architecture: Architecture) -> Architecture:
    """The same list of operators, tying and meta tokens at a width of 32."""
    fields = {"tie_embeddings": architecture.tie_embeddings, "meta_tokens": min(architecture.meta_tokens, 3)}
    return small(architecture.notation, **fields)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(length))


def count(model: HybridLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", reference_names())
def test_parameters_and_state_equal_the_stated_ones(name):
    architecture = load_architecture(name)
    with torch.device("meta"):
        model = HybridLM(architecture)
        state = model.allocate_state(2, 1000, dtype=torch.bfloat16)
    assert count(model) == architecture.parameters
    assert state.nbytes == architecture.state_bytes(1000, batch=2)
    assert model.paths() == dict.fromkeys(architecture.notation.split(), "torch")


@pytest.mark.parametrize("name", reference_names())
def test_shrunk_references_run(name):
    architecture = shrunk(load_architecture(name))
    model = build_model(architecture, seed=1)
    assert count(model) == architecture.parameters
    logits = model(tokens(2, 9))
    assert logits.shape == (2, 9, 40)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("tie", [True, False])
def test_tied_head_is_the_embedding(tie):
    model = build_model(small(tie_embeddings=tie))
    assert ("lm_head.weight" in model.state_dict()) is not tie
    head = model.embed_tokens if tie else model.lm_head
    x = tokens(2, 5)
    torch.testing.assert_close(model(x), model.hidden(x) @ head.weight.T)


def test_weights_depend_on_the_seed_alone():
    first, again, other = (build_model(small(meta_tokens=2), seed=seed).state_dict() for seed in (5, 5, 6))
    direct = HybridLM(small(meta_tokens=2))
    direct.init_weights(5)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, direct.state_dict()[name])
    assert not torch.equal(first["layers.0.op.q_proj.weight"], other["layers.0.op.q_proj.weight"])


def test_init_draws_every_weight_and_scales_the_residual_projections():
    model = build_model(small("a f " * 8, hidden_size=128, meta_tokens=64))
    std = {name: weight.std().item() for name, weight in model.state_dict().items() if weight.dim() == 2}
    for name, found in std.items():
        expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert found == pytest.approx(expected, rel=0.1), name
    assert torch.equal(model.norm.weight, torch.ones(128))


def test_meta_device_holds_no_memory_until_materialised():
    with torch.device("meta"):
        model = HybridLM(small())
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_built_in_the_asked_type(dtype):
    model = build_model(small(), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(tokens(1, 4)).dtype == dtype


@pytest.mark.parametrize("meta", [0, 3])
@pytest.mark.parametrize("prompt", [1, 5, 64, 80])
def test_prefill_and_steps_equal_forward(meta, prompt):
    model, x = build_model(small(meta_tokens=meta), dtype=torch.float64), tokens(2, 80)
    state = model.allocate_state(2, 80)
    logits = [model.prefill(x[:, :prompt], state)]
    logits += [model.step(x[:, t], state) for t in range(prompt, 80)]
    torch.testing.assert_close(torch.stack(logits, dim=1), model(x)[:, prompt - 1 :])
    assert state.position.item() == 80 + meta


@pytest.mark.parametrize("meta", [0, 3])
def test_begin_and_steps_equal_forward(meta):
    model, x = build_model(small(meta_tokens=meta), dtype=torch.float64), tokens(2, 20)
    state = model.allocate_state(2, 20)
    model.prefill(tokens(2, 19), state)
    model.begin(state)
    logits = torch.stack([model.step(x[:, t], state) for t in range(20)], dim=1)
    torch.testing.assert_close(logits, model(x))


def test_state_never_moves_in_memory():
    model = build_model(small(meta_tokens=3))
    state = model.allocate_state(2, 12)
    buffers = [state.position, *(buffer for layer in state.layers for buffer in layer.values())]
    addresses = [buffer.data_ptr() for buffer in buffers]
    model.prefill(tokens(2, 7), state)
    model.step(tokens(2, 1)[:, 0], state)
    model.begin(state)
    assert [buffer.data_ptr() for buffer in buffers] == addresses


def test_meta_tokens_change_and_learn():
    model, x = build_model(small(meta_tokens=3)), tokens(2, 6)
    model(x).logsumexp(-1).sum().backward()
    assert model.meta_tokens.grad.abs().min() > 0
    before = model(x)
    with torch.no_grad():
        model.meta_tokens.mul_(-3)
    assert not torch.allclose(before, model(x))


@pytest.mark.parametrize("kind", [*SMALL, "d f m2 f a f gd gl w f"])
def test_the_future_does_not_reach_the_past(kind):
    model, x = build_model(small(kind, meta_tokens=2), dtype=torch.float64), tokens(2, 130)
    changed = x.clone()
    changed[:, 70:] = (x[:, 70:] + 1) % 40
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :70], after[:, :70])
    assert not torch.allclose(before[:, 70:], after[:, 70:])


@pytest.mark.parametrize("length", [0, 9])
def test_prompt_that_does_not_fit_is_refused(length):
    model = build_model(small(meta_tokens=3))
    with pytest.raises(UsageError, match=f"prompt of {length} tokens in a state of 8") as caught:
        model.prefill(tokens(1, length), model.allocate_state(1, 8))
    assert caught.value.remedy == "give 1 to 8 tokens"


def test_steps_past_the_capacity_stay_inside_the_state():
    model = build_model(small())
    state = model.begin(model.allocate_state(1, 4))
    logits = [model.step(tokens(1, 1)[:, 0], state) for _ in range(9)]
    assert torch.isfinite(torch.stack(logits)).all()


def test_autocast_trains():
    model, x = build_model(small(meta_tokens=2)), tokens(2, 70)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    logits.float().logsumexp(-1).mean().backward()
    assert (logits - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("name", "hidden", "inner"), [("qwen3-0.6b", 1024, 3072), ("qwen3-1.7b", 2048, 6144)])
def test_qwen3_has_as_many_parameters_as_in_transformers(name, hidden, inner):
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        theirs = Qwen3ForCausalLM(config)
    assert theirs.num_parameters() == load_architecture(name).parameters


def test_qwen3_logits_equal_those_of_transformers():
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(config).eval()
    attention = {"head_dim": 16, "heads": 4, "kv_heads": 2, "qk_norm": True, "rope_theta": 1e6}
    ours = build_model(small("a f a f", tie_embeddings=False, options=SMALL | {"a": attention}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    names = {"model.embed_tokens": "embed_tokens", "model.norm": "norm", "lm_head": "lm_head"}
    for i in range(2):
        layer, mixer, ffn = f"model.layers.{i}", f"layers.{2 * i}", f"layers.{2 * i + 1}"
        names |= {f"{layer}.input_layernorm": f"{mixer}.norm", f"{layer}.self_attn": f"{mixer}.op"}
        names |= {f"{layer}.post_attention_layernorm": f"{ffn}.norm", f"{layer}.mlp": f"{ffn}.op"}
    weights = {}
    for name, weight in theirs.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix + "."))
        weights[names[prefix] + name.removeprefix(prefix)] = weight
    ours.load_state_dict(weights)
    x = tokens(2, 70)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)
