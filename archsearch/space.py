"""SearchSpace: what may be searched. Turns flat genomes into architectures and back.

A space is a list of stages (stage.py), a width, options a kind, limits and seeds. A genome is a flat
dict of fixed length, gene to choice. A factor with one choice is no gene.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from archsearch.architecture import Architecture, load_architecture, make_architecture, parse_operator, reference_names
from archsearch.errors import ConfigError, InvalidArchitecture
from archsearch.operators import OPERATORS, OperatorConfig
from archsearch.schema import Frozen, Quantity
from archsearch.stage import Choice, Choices, Pattern, Stage, check_kinds

Genome = dict[str, Choice]

FEASIBILITY_TRIES = 2000


class Range(Frozen):
    """Bounds, both inclusive, both optional."""

    min: Quantity | None = Field(None, ge=0)
    max: Quantity | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def check(self, value: int, what: str) -> None:
        """Raise InvalidArchitecture when ``value`` lies outside."""
        if self.min is not None and value < self.min:
            raise InvalidArchitecture(f"{what} {value:,} is below the limit {self.min:,}", "widen space.limits")
        if self.max is not None and value > self.max:
            raise InvalidArchitecture(f"{what} {value:,} is above the limit {self.max:,}", "widen space.limits")


class Limits(Frozen):
    """What every architecture of the space must keep; all but latency and recall are known before anything runs."""

    operators: Range = Range()
    parameters: Range = Range()
    state_bytes: Range = Range()
    state_context: Quantity = Field(8192, ge=1, description="tokens at which state_bytes is taken")
    full_attention: Range = Range()
    decode_latency: float | None = Field(None, gt=0, description="seconds for latency.tokens tokens, at most")
    recall: float | None = Field(None, ge=0, le=1, description="recall error (1 - accuracy), at most")

    def check(self, architecture: Architecture) -> None:
        """Raise InvalidArchitecture at the first limit that ``architecture`` breaks; the measured ones come later."""
        full = sum(operator.full_attention for operator in architecture.operators)
        self.operators.check(len(architecture.operators), "operators:")
        self.full_attention.check(full, "full-attention operators:")
        self.parameters.check(architecture.parameters, "parameters:")
        self.state_bytes.check(architecture.state_bytes(self.state_context), "state bytes:")


class SearchSpace(Frozen):
    """A validated space: stages, width, options a kind, vocabulary, limits and seeds."""

    name: str = Field("space", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    hidden_size: Choices[Quantity]
    vocab_size: Quantity = Field(ge=2, le=2**24)
    tie_embeddings: bool = True
    meta_tokens: int = Field(0, ge=0, le=4096)
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=16)
    options: dict[str, dict[str, Choices[Choice]]] = {}
    limits: Limits = Limits()
    seeds: tuple[str | dict[str, Any], ...] = ()

    @field_validator("hidden_size")
    @classmethod
    def _check_hidden(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 8:
            raise ValueError("hidden_size must be at least 8")
        return sizes

    @model_validator(mode="after")
    def _check(self) -> SearchSpace:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: the name {next(n for n in names if names.count(n) > 1)!r} is repeated")
        for kind, options in self.options.items():
            check_kinds([kind])
            for name, values in options.items():
                for value in values:
                    _check_option(kind, name, value)
        return self

    # Genes

    @cached_property
    def factors(self) -> dict[str, tuple[Choice, ...]]:
        """Every factor, gene or constant, to its choices: width, ``<stage>.<factor>``, ``<kind>.<option>``."""
        used = set().union(*(stage.kinds() for stage in self.stages))
        found: dict[str, tuple[Choice, ...]] = {"hidden_size": self.hidden_size}
        for stage in self.stages:
            found |= {f"{stage.name}.{name}": values for name, values in stage.choices.items()}
        for kind in sorted(used & set(self.options)):
            found |= {f"{kind}.{name}": values for name, values in self.options[kind].items()}
        return found

    @cached_property
    def genes(self) -> dict[str, tuple[Choice, ...]]:
        """The factors that have a choice: what an Optuna trial's ``params`` hold."""
        return {name: values for name, values in self.factors.items() if len(values) > 1}

    @property
    def size(self) -> int:
        """Number of genomes (several may build the same architecture)."""
        return math.prod(len(values) for values in self.genes.values())

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over everything that decides what a genome means."""
        data = self.model_dump(mode="json", exclude={"name", "seeds"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    def sample(self, rng: np.random.Generator) -> Genome:
        """A genome, each gene uniform; it may be infeasible."""
        return {name: values[int(rng.integers(len(values)))] for name, values in self.genes.items()}

    def mutate(self, genome: Mapping[str, Choice], rng: np.random.Generator) -> Genome:
        """``genome`` with one gene changed to another choice."""
        name = list(self.genes)[int(rng.integers(len(self.genes)))]
        others = [value for value in self.genes[name] if value != genome[name]]
        return {**genome, name: others[int(rng.integers(len(others)))]}

    # Genome to architecture

    def build(self, genome: Mapping[str, Choice]) -> Architecture:
        """The architecture of a genome.

        Raises:
            InvalidArchitecture: it cannot exist (a head dim that does not divide the width) or breaks a limit.
        """
        chosen = self._complete(genome)
        kinds = self.kinds(chosen)
        if not kinds:
            raise InvalidArchitecture("the genome has no operators", "allow at least one block")
        options = {kind: {n: chosen[f"{kind}.{n}"] for n in self.options.get(kind, {})} for kind in set(kinds)}
        architecture = make_architecture(
            hidden_size=chosen["hidden_size"],
            vocab_size=self.vocab_size,
            tie_embeddings=self.tie_embeddings,
            meta_tokens=self.meta_tokens,
            operators=[{"kind": kind, **options[kind]} for kind in kinds],
        )
        self.limits.check(architecture)
        return architecture

    def identity(self, genome: Mapping[str, Choice]) -> str | None:
        """The id of the architecture that ``genome`` builds, or None where it is infeasible."""
        try:
            return self.build(genome).id
        except InvalidArchitecture:
            return None

    def _complete(self, genome: Mapping[str, Choice]) -> dict[str, Any]:
        if missing := [name for name in self.genes if name not in genome]:
            raise InvalidArchitecture(f"the genome lacks the gene {missing[0]!r}", "give every gene")
        for name, value in genome.items():
            if name not in self.genes or value not in self.genes[name]:
                raise InvalidArchitecture(f"the space has no {name} = {value!r}", "use a genome of this space")
        return {name: genome.get(name, values[0]) for name, values in self.factors.items()}

    def kinds(self, chosen: Mapping[str, Any]) -> list[str]:
        """The flat list of kinds; over the operator limit the last stage loses blocks (paper, App. C.1)."""
        parts = []
        for stage in self.stages:
            factors = {name: chosen[f"{stage.name}.{name}"] for name in stage.choices}
            parts.append((stage.block(factors), int(factors["blocks"])))
        block, repeats = parts[-1]
        total = sum(len(pattern) * count for pattern, count in parts)
        limit = self.limits.operators.max
        if limit is not None and total > limit:
            excess = math.ceil((total - limit) / len(block))
            repeats = max(repeats - excess, min(self.stages[-1].blocks), 0)
        parts[-1] = (block, repeats)
        return [kind for pattern, count in parts for kind in pattern * count]

    # Architecture to genome

    def genome_of(self, architecture: Architecture) -> Genome:
        """The genome that builds the operators of ``architecture`` at its width; its vocabulary is ignored.

        Raises:
            ConfigError: the space does not hold it.
        """
        if architecture.hidden_size not in self.hidden_size:
            raise self._outside(f"hidden_size {architecture.hidden_size} is no choice")
        chosen: dict[str, Any] = {"hidden_size": architecture.hidden_size}
        for kind in {operator.kind for operator in architecture.operators}:
            chosen |= self._options_of(kind, architecture)
        stages = self._match_stages(tuple(operator.kind for operator in architecture.operators))
        if stages is None:
            raise self._outside(f"no stages give {architecture.notation!r}")
        chosen |= stages
        genome = {name: chosen.get(name, values[0]) for name, values in self.genes.items()}
        self.build(genome)
        return genome

    def _outside(self, reason: str) -> ConfigError:
        return ConfigError(f"the space {self.name} does not hold this architecture: {reason}", "widen the space")

    def _options_of(self, kind: str, architecture: Architecture) -> dict[str, Choice]:
        wanted = {operator for operator in architecture.operators if operator.kind == kind}
        names = list(self.options.get(kind, {}))
        for values in itertools.product(*(self.options[kind][name] for name in names)):
            options = dict(zip(names, values, strict=True))
            if wanted == {parse_operator({"kind": kind, **options}).canonical(architecture.hidden_size)}:
                return {f"{kind}.{name}": value for name, value in options.items()}
        raise self._outside(f"no options of {kind!r} match")

    def _match_stages(self, kinds: Pattern) -> dict[str, Choice] | None:
        """Stage factors whose blocks, in order, spell ``kinds``; depth-first over the stages."""
        blocks = [stage.all_blocks() for stage in self.stages]
        dead: set[tuple[int, int]] = set()

        def match(index: int, start: int) -> dict[str, Choice] | None:
            if index == len(self.stages):
                return {} if start == len(kinds) else None
            if (index, start) in dead:
                return None
            stage = self.stages[index]
            for pattern, factors in blocks[index].items():
                for count, end in _repeats(pattern, kinds, start, stage.blocks):
                    rest = match(index + 1, end)
                    if rest is not None:
                        own = {f"{stage.name}.{name}": value for name, value in factors.items()}
                        return {**own, f"{stage.name}.blocks": count, **rest}
            dead.add((index, start))
            return None

        return match(0, 0)

    # Seeds and feasibility

    @cached_property
    def seed_genomes(self) -> tuple[Genome, ...]:
        """Genomes of the seeds. Raises ConfigError where a seed is unknown, invalid or outside the space."""
        return tuple(self.genome_of(self._seed_architecture(seed)) for seed in self.seeds)

    def with_seed_files_read(self) -> SearchSpace:
        """The space with what the files among its seeds hold in their place. Raises ConfigError as ``seed_genomes``."""
        known = reference_names()
        seeds = [
            load_architecture(seed).to_dict() if isinstance(seed, str) and seed not in known else seed
            for seed in self.seeds
        ]
        return self.model_copy(update={"seeds": tuple(seeds)})

    def _seed_architecture(self, seed: str | dict[str, Any]) -> Architecture:
        if isinstance(seed, str):
            return load_architecture(seed)
        return make_architecture(**{"vocab_size": self.vocab_size, **seed})

    def check_feasible(self) -> None:
        """Raise ConfigError when no feasible architecture is found (all of a small space, a sample of a large one)."""
        if self.seed_genomes:
            return
        reason = "none was tried"
        for genome in self._probe():
            try:
                self.build(genome)
                return
            except InvalidArchitecture as error:
                reason = error.cause
        raise ConfigError(f"the space {self.name} has no feasible architecture: {reason}", "widen it or its limits")

    def _probe(self) -> Iterator[Genome]:
        if self.size <= FEASIBILITY_TRIES:
            for values in itertools.product(*self.genes.values()):
                yield dict(zip(self.genes, values, strict=True))
            return
        rng = np.random.default_rng(0)
        for _ in range(FEASIBILITY_TRIES):
            yield self.sample(rng)


def _check_option(kind: str, name: str, value: Choice) -> OperatorConfig:
    try:
        return OPERATORS[kind].model_validate({name: value})
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"options.{kind}.{name}: {message} (found {value!r})") from None


def _repeats(pattern: Pattern, kinds: Pattern, start: int, counts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(count, end) for every allowed count of ``pattern`` that matches ``kinds`` from ``start``."""
    fitting = 0
    while kinds[start + fitting * len(pattern) : start + (fitting + 1) * len(pattern)] == pattern:
        fitting += 1
    for count in sorted(counts, reverse=True):
        if count <= fitting:
            yield count, start + count * len(pattern)
