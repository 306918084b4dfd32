"""The operator kinds: options and costs, one file a kind, as plain data.

``OPERATORS`` is the registry. The network of each kind is in the file of the same name
under ``archsearch/model/layers``.
"""

from __future__ import annotations

from archsearch.operators.attention import Attention, SlidingWindowAttention
from archsearch.operators.base import OperatorConfig
from archsearch.operators.delta_net import DeltaNet
from archsearch.operators.ffn import FFN
from archsearch.operators.gated_delta_net import GatedDeltaNet
from archsearch.operators.gla import GLA
from archsearch.operators.hgrn2 import HGRN2
from archsearch.operators.kda import KDA
from archsearch.operators.mamba import Mamba
from archsearch.operators.mamba2 import Mamba2
from archsearch.operators.rwkv7 import RWKV7

OPERATORS: dict[str, type[OperatorConfig]] = {
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
    "OPERATORS",
    "RWKV7",
    "Attention",
    "DeltaNet",
    "GatedDeltaNet",
    "Mamba",
    "Mamba2",
    "OperatorConfig",
    "SlidingWindowAttention",
]
