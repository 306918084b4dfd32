"""Architecture: one network as plain data, the only thing that travels between processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from archsearch.errors import ConfigError, InvalidArchitecture
from archsearch.files import Document, read_yaml, validate
from archsearch.operators import OPERATORS, OperatorConfig
from archsearch.schema import Frozen, Quantity, did_you_mean

_PACKAGE = Path(__file__).resolve().parent
SPACES = next(p for p in (_PACKAGE / "search_spaces", _PACKAGE.parent / "search_spaces") if p.is_dir())
"""The spaces that come with archsearch: inside an installed package, beside it in a checkout."""
REFERENCES = SPACES / "reference"
BF16 = 2


def parse_operator(data: Any) -> OperatorConfig:
    """An operator from ``"d"`` or ``{"kind": "d", "head_dim": 64}``. Raises ValueError with a hint."""
    if isinstance(data, OperatorConfig):
        return data
    if isinstance(data, str):
        data = {"kind": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise ValueError("an operator is a kind such as 'd' or a mapping with the key 'kind'")
    options = dict(data)
    kind = options.pop("kind")
    if kind not in OPERATORS:
        raise ValueError(f"unknown operator {kind!r}; {did_you_mean(kind, OPERATORS)}")
    try:
        return OPERATORS[kind].model_validate(options)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        option = "".join(f"{part}: " for part in problem["loc"])
        plain = problem["type"] != "value_error" and not isinstance(problem["input"], Mapping)
        found = f" (found {problem['input']!r})" if plain else ""
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"operator {kind}: {option}{message}{found}") from None


def dump_operator(operator: OperatorConfig) -> dict[str, Any]:
    """The inverse of ``parse_operator``; options at their default are left out, so that ids outlive new options."""
    return {"kind": operator.kind, **operator.model_dump(exclude_defaults=True)}


class Architecture(Frozen):
    """A decoder-only language model: embedding, a flat list of residual operators, final norm, head.

    In files ``operators`` may be the short notation ``"d f m2 f a f"``; ``options`` then gives the
    options of each kind, and is folded into the operators.
    """

    hidden_size: int = Field(ge=8, le=65536)
    vocab_size: Quantity = Field(ge=2, le=2**24)
    tie_embeddings: bool = True
    meta_tokens: int = Field(0, ge=0, le=4096)
    norm_eps: float = Field(1e-6, gt=0, lt=1)
    operators: tuple[OperatorConfig, ...] = Field(min_length=1, max_length=1024)

    @model_validator(mode="before")
    @classmethod
    def _fold_options(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        folded = dict(data)
        options = folded.pop("options", {})
        operators = folded.get("operators")
        if isinstance(operators, str):
            operators = operators.split()
        if not isinstance(options, Mapping) or not all(isinstance(o, Mapping) for o in options.values()):
            raise ValueError("options: expected a mapping of kind to options")
        for kind in options:
            if kind not in OPERATORS:
                raise ValueError(f"options: unknown operator {kind!r}; {did_you_mean(str(kind), OPERATORS)}")
        if isinstance(operators, list | tuple):
            operators = [{"kind": o, **options.get(o, {})} if isinstance(o, str) else o for o in operators]
            folded["operators"] = operators
        return folded

    @field_validator("operators", mode="before")
    @classmethod
    def _parse_operators(cls, data: Any) -> Any:
        if not isinstance(data, list | tuple):
            raise ValueError("expected a list of operators or the short notation 'd f m2 f'")
        return tuple(parse_operator(item) for item in data)

    @field_serializer("operators")
    def _dump_operators(self, operators: tuple[OperatorConfig, ...]) -> list[dict[str, Any]]:
        return [dump_operator(operator) for operator in operators]

    @model_validator(mode="after")
    def _check_operators(self) -> Architecture:
        for index, operator in enumerate(self.operators):
            try:
                operator.check(self.hidden_size)
            except ValueError as error:
                raise ValueError(f"operator {index} ({operator.kind}): {error}") from None
        # One spelling a network, or the same network would have several ids.
        self.__dict__["operators"] = tuple(operator.canonical(self.hidden_size) for operator in self.operators)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML; ``Architecture.model_validate`` reads it back."""
        return self.model_dump(mode="json")

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits that identify the network, whatever genome or file it came from."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def notation(self) -> str:
        """The short notation, such as ``"d f m2 f a f"``."""
        return " ".join(operator.kind for operator in self.operators)

    @cached_property
    def parameters(self) -> int:
        """Trainable numbers, all of them."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        layers = sum(operator.parameters(self.hidden_size) + self.hidden_size for operator in self.operators)
        return embeddings + layers + self.hidden_size + self.meta_tokens * self.hidden_size

    def train_flops(self, length: int) -> float:
        """FLOPs of forward and backward a token, in sequences of ``length`` tokens (backward costs twice forward)."""
        head = 2.0 * self.vocab_size * self.hidden_size
        layers = sum(
            2.0 * operator.matmul_parameters(self.hidden_size)
            + operator.mixing_flops(self.hidden_size, length + self.meta_tokens)
            for operator in self.operators
        )
        return 3.0 * (head + layers)

    def weight_bytes(self, width: int = BF16) -> int:
        """Weight bytes that one decode step must read: all but the rows of the embedding it does not look up."""
        unread = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        return (self.parameters - unread - self.meta_tokens * self.hidden_size) * width

    def state_bytes(self, length: int, *, batch: int = 1, width: int = BF16) -> int:
        """Memory of the decode state for ``batch`` sequences of ``length`` tokens (meta tokens come on top)."""
        stored = length + self.meta_tokens
        return batch * sum(operator.state_bytes(self.hidden_size, stored, width) for operator in self.operators)

    def step_bytes(self, length: int, *, batch: int = 1, width: int = BF16) -> int:
        """Bytes that one decode step must move at ``length`` stored tokens: weights once, state read and written."""
        stored = length + self.meta_tokens
        state = sum(operator.step_bytes(self.hidden_size, stored, width) for operator in self.operators)
        return self.weight_bytes(width) + batch * state


def reference_names() -> list[str]:
    """Names of the known architectures that come with archsearch."""
    return sorted(path.stem for path in REFERENCES.glob("*.yaml"))


def read_architecture(document: Document) -> Architecture:
    """The architecture in a parsed file: a bare one, or one under the key ``architecture`` (an evaluation)."""
    value = document.value
    nested = isinstance(value, dict) and "architecture" in value and "operators" not in value
    return validate(Architecture, document, ("architecture",) if nested else ())


def load_architecture(source: str | Path) -> Architecture:
    """Load an architecture from a YAML or JSON file, or a reference by its name.

    Raises:
        ConfigError: neither a readable file nor a known name, or an invalid architecture.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml", ".json") or path.exists():
        return read_architecture(read_yaml(path))
    reference = REFERENCES / f"{source}.yaml"
    if str(source) not in reference_names():
        hint = did_you_mean(str(source), reference_names())
        raise ConfigError(f"no architecture {str(source)!r}: {hint}", "give a YAML or JSON file or a reference name")
    return read_architecture(read_yaml(reference))


def make_architecture(**fields: Any) -> Architecture:
    """Build an architecture from plain fields.

    Raises:
        InvalidArchitecture: with the first problem as its cause.
    """
    try:
        return Architecture.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise InvalidArchitecture(f"{where + ': ' if where else ''}{message}", "change that option or size") from None
