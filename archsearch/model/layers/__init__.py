"""The network of each operator kind, one file a kind, beside ``archsearch/operators`` by the same names.

``LAYERS`` is the registry; its keys are those of ``OPERATORS``.
"""

from __future__ import annotations

from archsearch.model.layers.attention import Attention, SlidingWindowAttention
from archsearch.model.layers.base import Layer, State
from archsearch.model.layers.delta_net import DeltaNet
from archsearch.model.layers.ffn import FFN
from archsearch.model.layers.gated_delta_net import GatedDeltaNet
from archsearch.model.layers.gla import GLA
from archsearch.model.layers.hgrn2 import HGRN2
from archsearch.model.layers.kda import KDA
from archsearch.model.layers.mamba import Mamba
from archsearch.model.layers.mamba2 import Mamba2
from archsearch.model.layers.rwkv7 import RWKV7

LAYERS: dict[str, type[Layer]] = {
    "a": Attention,
    "w": SlidingWindowAttention,
    "m": Mamba,
    "m2": Mamba2,
    "d": DeltaNet,
    "gd": GatedDeltaNet,
    "kda": KDA,
    "gl": GLA,
    "r7": RWKV7,
    "hg": HGRN2,
    "f": FFN,
}

__all__ = [
    "FFN",
    "GLA",
    "HGRN2",
    "KDA",
    "LAYERS",
    "RWKV7",
    "Attention",
    "DeltaNet",
    "GatedDeltaNet",
    "Layer",
    "Mamba",
    "Mamba2",
    "SlidingWindowAttention",
    "State",
]
