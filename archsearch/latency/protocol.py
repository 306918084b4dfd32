"""Which rules a number was measured by, and with which kernels."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from archsearch import model

VERSION = 2
"""Of the protocol. Numbers of different versions are not compared.

1: strata, warm-up, logits against the forward pass. 2: also a lock for trainings, the canary, other processes refused,
a stop rule, the measured floor.
"""


@functools.cache
def kernel_hash() -> str:
    """Twelve hexadecimal digits of the source of the decode path: kernels, their configurations, and the plan."""
    root = Path(model.__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted((root / "kernels").glob("*.py")), root / "decode.py"]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
