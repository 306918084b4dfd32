"""The latency profile of one device: a measured table of operators, the sum as predictor, and how far it is off.

A decode step runs one operator after the other, so its time is nearly a sum: embedding, norm and head at this width,
and a cost for each operator. ``archsearch profile`` measures the costs (``latency/profiling.py``); here they are read,
checked and added up, without torch, because the driver of a search does that too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from archsearch.architecture import Architecture, dump_operator, parse_operator
from archsearch.errors import ConfigError, EnvironmentUnfit
from archsearch.files import read_text, to_json, write_atomic
from archsearch.operators import OperatorConfig
from archsearch.schema import Frozen
from archsearch.space import SearchSpace

AGAIN = "measure one here with `archsearch profile --space FILE --out NEW.json`"


class ProfileUnfit(EnvironmentUnfit):
    """A latency profile does not speak of this device, these settings or this operator."""


class Fingerprint(Frozen):
    """What the numbers of a profile hold for.

    Attributes:
        threads: of the CPU; 0 on a GPU.
        versions: of driver, torch and Triton. Another one is warned of, and everything else is refused.
    """

    device: str
    kind: Literal["cpu", "cuda"]
    threads: int
    kernel_hash: str
    protocol: int
    dtype: str
    batch: int
    tokens: int
    strata: int
    vocab_size: int
    meta_tokens: int
    versions: dict[str, str] = {}


class Chain(Frozen):
    """A measured model of ``copies`` equal operators; ``ms`` a token."""

    hidden_size: int
    operator: dict[str, Any]
    copies: int
    ms: float = Field(gt=0)


class Checked(Frozen):
    """A whole architecture of a space, measured; ``fitted`` if the table was fitted to it, too; held out if not."""

    hidden_size: int
    operators: str
    options: dict[str, dict[str, Any]]
    measured_ms: float = Field(gt=0)
    predicted_ms: float | None = None
    fitted: bool = False


class Entry(Frozen):
    """What an operator adds to a step, microseconds a token; ``operator`` None: embedding, final norm and head."""

    hidden_size: int
    operator: dict[str, Any] | None
    us: float = Field(ge=0)


class ProfileError(Frozen):
    """How far predictions are off, relative to what was measured, over architectures that nothing was fitted to.

    Attributes:
        median, worst, spearman: of the held-out architectures; no rank correlation where there are fewer than three.
        chains_alone: their median error with a table from chains alone, as such tables usually are.
        chains: the worst error of that table on the chains that it comes from: how far they are no sum.
        architectures: how many were held out.
    """

    median: float
    worst: float
    spearman: float | None
    chains_alone: float
    chains: float
    architectures: int


class LatencyProfile(Frozen):
    """What ``archsearch profile`` wrote. ``error`` is None until all of it was measured."""

    schema_version: Literal[1] = 1
    fingerprint: Fingerprint
    error: ProfileError | None = None
    table: tuple[Entry, ...] = ()
    chains: tuple[Chain, ...] = ()
    checked: tuple[Checked, ...] = ()

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits over everything that a prediction depends on."""
        data = self.model_dump(mode="json", include={"fingerprint", "table"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """For people: whose it is and how far it is off."""
        about, error = f"latency profile {self.id} of {self.fingerprint.device}", self.error
        return about if error is None else f"{about}, off by {error.median:.2%}, at worst {error.worst:.2%}"

    @cached_property
    def _costs(self) -> dict[str, float]:
        return {key(entry.hidden_size, entry.operator): entry.us for entry in self.table}

    @cached_property
    def _found(self) -> dict[tuple[int, OperatorConfig | None], float]:
        """What was looked up: a search asks for the same few operators all the time."""
        return {}

    def seconds(self, architecture: Architecture) -> float:
        """Predicted decode latency: to decode the profile's tokens at its batch.

        Raises:
            ProfileUnfit: the table lacks an operator of it.
        """
        return self.ms(architecture) * self.fingerprint.tokens / 1e3

    def ms(self, architecture: Architecture) -> float:
        """Predicted milliseconds a token. Raises as ``seconds``."""
        return sum(self._cost(architecture.hidden_size, one) for one in (None, *architecture.operators)) / 1e3

    def _cost(self, hidden: int, operator: OperatorConfig | None) -> float:
        if (hidden, operator) not in self._found:
            plain = None if operator is None else dump_operator(operator)
            if (name := key(hidden, plain)) not in self._costs:
                raise ProfileUnfit(f"the latency profile lacks {named(hidden, plain)}", AGAIN)
            self._found[hidden, operator] = self._costs[name]
        return self._found[hidden, operator]

    def holds(self, hidden: int, operator: dict[str, Any] | None) -> bool:
        """Whether the table has an entry."""
        return key(hidden, operator) in self._costs

    def save(self, path: Path) -> None:
        """Write it, all or nothing. Raises StorageError."""
        write_atomic(path, to_json(self.model_dump(mode="json", exclude_none=False), indent=1))


def load_profile(path: str | Path, *, complete: bool = True) -> LatencyProfile:
    """Read a profile.

    Raises:
        ConfigError: no such file, or it is damaged.
        ProfileUnfit: ``complete``, and its measurement was not finished.
    """
    text = read_text(Path(path))
    try:
        profile = LatencyProfile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        cause = f"{path} is no latency profile: {where + ': ' if where else ''}{first['msg']}"
        raise ConfigError(cause, "restore the file, or remove it and run `archsearch profile` again") from None
    if complete and profile.error is None:
        raise ProfileUnfit(f"{path}: its measurement was not finished", "run the same `archsearch profile` again")
    return profile


def key(hidden: int, operator: dict[str, Any] | None) -> str:
    """What tells entries apart."""
    return f"{hidden} {json.dumps(operator, sort_keys=True)}"


def named(hidden: int, operator: dict[str, Any] | None) -> str:
    """An entry for people."""
    if operator is None:
        return f"the head at width {hidden}"
    options = ", ".join(f"{name} {value}" for name, value in operator.items() if name != "kind")
    return f"{operator['kind']}{f' ({options})' if options else ''} at width {hidden}"


def operators_of(space: SearchSpace, width: int) -> tuple[OperatorConfig, ...]:
    """Every different operator that ``space`` can choose at a width, in its canonical spelling."""
    return tuple(dict.fromkeys(_operators(space, width)))


def _operators(space: SearchSpace, width: int) -> Iterator[OperatorConfig]:
    for kind in sorted(set().union(*(stage.kinds() for stage in space.stages))):
        options = space.options.get(kind, {})
        for values in itertools.product(*options.values()):
            operator = parse_operator({"kind": kind, **dict(zip(options, values, strict=True))})
            try:
                operator.check(width)
            except ValueError:
                continue  # no architecture of this width can have it
            yield operator.canonical(width)
