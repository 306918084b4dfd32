"""Sizes at the ends of what a file may name: the kernels are sound there, or refuse them by name."""

from __future__ import annotations

import json

import pytest
import torch

from archsearch.errors import InvalidArchitecture
from archsearch.model import self_check, training_path
from archsearch.model.layers import LAYERS
from archsearch.operators import OPERATORS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(900),
]
CUDA = torch.device("cuda")
CASES = [
    ("a", 64, {"head_dim": 8}),
    ("a", 512, {"head_dim": 256}),
    ("w", 64, {"head_dim": 8, "window": 1}),
    ("w", 512, {"head_dim": 256}),
    ("m2", 64, {"head_dim": 8, "state": 8, "conv": 1}),
    ("m2", 128, {"head_dim": 256, "state": 256, "conv": 8}),
    ("d", 64, {"head_dim": 8, "conv": 1}),
    ("d", 512, {"head_dim": 256, "conv": 8}),
    ("gd", 64, {"head_dim": 8}),
    ("gd", 512, {"head_dim": 256, "expand_v": 4.0}),
    ("kda", 64, {"head_dim": 8, "gate_rank": 1}),
    ("kda", 512, {"head_dim": 256, "expand_v": 2.0}),
    ("gl", 64, {"head_dim": 8}),
    ("gl", 512, {"head_dim": 256, "expand_v": 4.0}),
    ("r7", 64, {"head_dim": 8, "decay_rank": 1, "rate_rank": 1, "gate_rank": 1}),
    ("r7", 256, {"head_dim": 128}),
    ("hg", 64, {"head_dim": 8}),
    ("hg", 512, {"head_dim": 256}),
]


@pytest.mark.parametrize(("kind", "hidden", "options"), CASES, ids=[f"{c[0]}-{json.dumps(c[2])}" for c in CASES])
def test_sizes_at_the_ends(kind, hidden, options):
    config = OPERATORS[kind].model_validate(options)
    refused = ""
    try:
        training_path.refuse_unsupported(LAYERS[kind](config, hidden).unsupported(), kind)
        print(kind, options, self_check.require_sound(config, hidden, CUDA).errors)
    except InvalidArchitecture as error:
        refused = error.cause
        print(kind, options, refused)
    assert not refused or f"operator {kind}" in refused
