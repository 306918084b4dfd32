"""Equal weights, equal logits: our model against flash-linear-attention's own model classes on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from archsearch.architecture import make_architecture
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.model.layers import LAYERS as OUR_LAYERS
from archsearch.operators import OPERATORS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(900),
]
HIDDEN, HEADS, BLOCKS, VOCABULARY, LENGTH = 512, 4, 2, 1000, 300
SHARED: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "vocab_size": VOCABULARY,
    "intermediate_size": 1024,
    "num_heads": HEADS,
    "fuse_cross_entropy": False,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gd": ("GatedDeltaNet", {"head_dim": 128, "expand_v": 1.0}, {}),
    "d": ("DeltaNet", {}, {}),
    "kda": ("KDA", {"head_dim": 128}, {}),
    "gl": ("GLA", {"expand_k": 1.0}, {"expand_k": 1.0}),
}
"""Kind: the name of their class, their options beyond ``SHARED``, ours."""


LAYERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "r7": ("RWKV7Attention", {"head_dim": 128, "layer_idx": 0, "num_hidden_layers": 2}, {"head_dim": 128}),
    "hg": ("HGRN2Attention", {"expand_ratio": 128}, {}),
}
"""Kinds whose models have what ours leave out, a residual of values and bounds of gates: their first layer alone."""


def theirs(name: str, options: dict[str, Any]) -> torch.nn.Module:
    """A model of flash-linear-attention in fp32, its weights drawn large enough that mixers matter."""
    from fla import models

    torch.manual_seed(0)
    model = getattr(models, f"{name}ForCausalLM")(getattr(models, f"{name}Config")(**SHARED, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def our_name(name: str) -> str:
    """Our name of a parameter of theirs: one block of theirs is a mixer and an FFN of ours."""
    parts = name.removeprefix("model.").split(".")
    if parts[0] == "embeddings":
        return "embed_tokens.weight"
    if parts[0] != "layers":
        return ".".join(parts)
    part, rest = parts[2].split("_")[0], parts[3:]
    layer = 2 * int(parts[1]) + (part == "mlp")
    return ".".join(["layers", str(layer), "norm" if parts[2].endswith("_norm") else "op", *rest])


def ours(kind: str, options: dict[str, Any], weights: dict[str, Tensor]) -> HybridLM:
    """Our model with their weights, in fp32: every weight of theirs finds its place, and none of ours is left."""
    operators = [{"kind": kind, **options}, {"kind": "f", "ratio": 2}] * BLOCKS
    model = build_model(
        make_architecture(
            hidden_size=HIDDEN, vocab_size=VOCABULARY, tie_embeddings=False, norm_eps=1e-6, operators=operators
        )
    )
    model.load_state_dict({our_name(name): weight for name, weight in weights.items()}, strict=True)
    return model


def distance(found: Tensor, want: Tensor) -> float:
    return float((found.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_same_logits(kind: str) -> None:
    name, their_options, our_options = MODELS[kind]
    their_model = theirs(name, their_options)
    exact = ours(kind, our_options, their_model.state_dict()).cuda()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator).cuda()
    truth = exact(tokens)
    half = copy.deepcopy(exact).bfloat16().use("fla")
    assert half.paths()[kind].startswith(("fla", "Triton and fla"))
    found = half(tokens)
    want = their_model.bfloat16().cuda().eval()(tokens).logits
    errors = {"ours": distance(found, truth), "theirs": distance(want, truth), "between": distance(found, want)}
    print(kind, errors)
    for layer in exact.layers[::2]:
        layer.op.o_proj.weight.zero_()
    assert distance(exact(tokens), truth) > 0.3, "the mixers do not matter"
    # two models that round independently are further from each other than either is from the truth
    assert errors["between"] < 5e-2
    assert errors["ours"] < 1.5 * errors["theirs"]


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_same_output_of_a_layer(kind: str) -> None:
    from fla import layers as their_layers

    name, their_options, our_options = LAYERS[kind]
    torch.manual_seed(0)
    their_layer = getattr(their_layers, name)(hidden_size=HIDDEN, norm_eps=1e-5, **their_options)
    for parameter in their_layer.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    exact = OUR_LAYERS[kind](OPERATORS[kind].model_validate(our_options), HIDDEN, 1e-5)
    shapes = {name: parameter.shape for name, parameter in exact.named_parameters()}
    exact.load_state_dict({name: weight.reshape(shapes[name]) for name, weight in their_layer.state_dict().items()})
    exact = exact.cuda()
    x = torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1)).cuda()
    truth, half = exact(x), copy.deepcopy(exact).bfloat16()
    half.path = "fla"
    found, want = half(x.bfloat16()), their_layer.bfloat16().cuda().eval()(x.bfloat16())[0]
    errors = {"ours": distance(found, truth), "theirs": distance(want, truth), "between": distance(found, want)}
    print(kind, errors)
    assert errors["between"] < 5e-2
    assert errors["ours"] < 1.5 * errors["theirs"]
