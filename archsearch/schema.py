"""The base of every model that is read from or written to disk, and the numbers that people write."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "B": 10**9,
    "G": 10**9,
    "T": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_QUANTITY = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'mixers'?``, or the list of what is known."""
    names = sorted(str(name) for name in known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def parse_quantity(value: Any) -> Any:
    """Turn ``"20M"``, ``"1.5B"`` or ``"64MiB"`` into an integer; leave every other value as it is."""
    if not isinstance(value, str):
        return value
    match = _QUANTITY.match(value)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{value!r} is not a number such as 4096, 20M, 1.5B or 64MiB")
    return math.floor(float(match[1]) * _UNITS[match[2]])


Quantity = Annotated[int, BeforeValidator(parse_quantity)]
"""An integer that may be written with a unit: K, M, B, T (powers of ten) or KiB, MiB, GiB, TiB."""


class Frozen(BaseModel):
    """Immutable, refuses unknown keys (with a hint) and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _hint_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}; {did_you_mean(str(key), cls.model_fields)}")
        return data
