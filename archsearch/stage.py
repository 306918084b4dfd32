"""Stage: a part of a search space. A block of operators, chosen by factors, that repeats.

A block is a combination of one to three mixer kinds in a ratio, each mixer followed by FFNs. That is
the template of Nemotron-Flash (arXiv 2511.18890, App. C.1), widened by a third kind, a layout and a
free FFN count a kind, without which the template cannot hold the paper's own two results.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from archsearch.operators import OPERATORS
from archsearch.schema import Frozen, did_you_mean

Choice = bool | int | float | str | None
Pattern = tuple[str, ...]
T = TypeVar("T")

MAX_KINDS = 3


def _as_choices(value: Any) -> Any:
    """One value, a list of values, or ``{min, max, step}`` of integers, as a tuple of choices."""
    if isinstance(value, Mapping):
        if unknown := set(value) - {"min", "max", "step"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}; a range has min, max and step")
        if not {"min", "max"} <= set(value) or not all(type(v) is int for v in value.values()):
            raise ValueError("a range needs whole numbers min and max")
        if value["min"] > value["max"] or value.get("step", 1) < 1:
            raise ValueError(f"min {value['min']} is above max {value['max']}, or step is below 1")
        value = list(range(value["min"], value["max"] + 1, value.get("step", 1)))
    choices = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not choices:
        raise ValueError("the list of choices is empty")
    for index, choice in enumerate(choices):
        if any(choice == other and type(choice) is type(other) for other in choices[:index]):
            raise ValueError(f"the choice {choice!r} is repeated")
    return choices


Choices = Annotated[tuple[T, ...], BeforeValidator(_as_choices)]


class Stage(Frozen):
    """A block repeated ``blocks`` times. Every field takes one value, a list, or (integers) a range.

    ``mixers`` are kinds joined by ``+``, three at most. ``ratio`` ``a:b`` puts the first kind ``a``
    times and the second ``b`` times in a block, a third kind once; ``0:1`` leaves the first out.
    ``layout`` keeps equal kinds together (grouped) or deals the second kind out behind the others
    (spread). ``ffns`` FFNs follow each mixer, chosen a kind. ``pattern`` replaces all four by
    literal blocks such as ``"d f m2 f"``.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    blocks: Choices[int]
    mixers: Choices[str] | None = None
    ratio: Choices[str] = ("1:1",)
    layout: Choices[Literal["grouped", "spread"]] = ("grouped",)
    ffns: Choices[int] = (1,)
    pattern: Choices[str] | None = None

    @field_validator("blocks")
    @classmethod
    def _check_blocks(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if min(blocks) < 0 or max(blocks) > 512:
            raise ValueError("blocks must be from 0 to 512")
        return blocks

    @field_validator("ffns")
    @classmethod
    def _check_ffns(cls, ffns: tuple[int, ...]) -> tuple[int, ...]:
        if min(ffns) < 0 or max(ffns) > 4:
            raise ValueError("ffns must be from 0 to 4")
        return ffns

    @field_validator("ratio")
    @classmethod
    def _check_ratio(cls, ratios: tuple[str, ...]) -> tuple[str, ...]:
        for ratio in ratios:
            parts = ratio.split(":")
            if len(parts) != 2 or not all(p.isdigit() and int(p) <= 16 for p in parts) or int(parts[1]) == 0:
                raise ValueError(f"{ratio!r} is not a ratio such as '1:2' (the second part at least 1)")
        return ratios

    @model_validator(mode="after")
    def _check_kinds(self) -> Stage:
        if bool(self.mixers) == bool(self.pattern):
            raise ValueError("give either mixers or pattern")
        for combination in self.mixers or ():
            kinds = combination.split("+")
            if len(kinds) > MAX_KINDS or len(set(kinds)) != len(kinds):
                raise ValueError(f"{combination!r} must join one to {MAX_KINDS} different kinds with '+'")
            check_kinds(kinds)
            if not all(OPERATORS[kind].is_mixer for kind in kinds):
                raise ValueError(f"{combination!r}: an FFN is no mixer; use ffns")
        for pattern in self.pattern or ():
            if not pattern.split():
                raise ValueError("pattern is empty")
            check_kinds(pattern.split())
        return self

    @cached_property
    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """Factor to choices, in a fixed order; ``ffns1`` belongs to the first kind of the combination."""
        if self.pattern:
            return {"pattern": self.pattern, "blocks": self.blocks}
        mixers = self.mixers or ()
        kinds = max(combination.count("+") + 1 for combination in mixers)
        ffns = {f"ffns{index + 1}": self.ffns for index in range(kinds)}
        return {"mixers": mixers, "ratio": self.ratio, "layout": self.layout, **ffns, "blocks": self.blocks}

    def block(self, factors: Mapping[str, Any]) -> Pattern:
        """The kinds of one block for chosen factors."""
        if self.pattern:
            return tuple(str(factors["pattern"]).split())
        kinds = str(factors["mixers"]).split("+")
        tails = {kind: (kind, *("f",) * factors[f"ffns{index + 1}"]) for index, kind in enumerate(kinds)}
        order = _mixer_order(kinds, str(factors["ratio"]), str(factors["layout"]))
        return tuple(itertools.chain.from_iterable(tails[kind] for kind in order))

    def all_blocks(self) -> dict[Pattern, dict[str, Choice]]:
        """Every different block of the stage, with the first factors that give it (without ``blocks``)."""
        names = [name for name in self.choices if name != "blocks"]
        found: dict[Pattern, dict[str, Choice]] = {}
        for values in itertools.product(*(self.choices[name] for name in names)):
            factors = dict(zip(names, values, strict=True))
            found.setdefault(self.block(factors), factors)
        return found

    def kinds(self) -> set[str]:
        """The kinds that the stage can hold."""
        return set(itertools.chain.from_iterable(self.all_blocks()))


def check_kinds(kinds: list[str]) -> None:
    """Raise ValueError with a hint at the first kind that does not exist."""
    for kind in kinds:
        if kind not in OPERATORS:
            raise ValueError(f"unknown operator {kind!r}; {did_you_mean(kind, OPERATORS)}")


def _mixer_order(kinds: list[str], ratio: str, layout: str) -> list[str]:
    if len(kinds) == 1:
        return kinds
    first, second = (int(part) for part in ratio.split(":"))
    before, after = [kinds[0]] * first, kinds[2:]
    if layout == "grouped":
        return [*before, *[kinds[1]] * second, *after]
    others = [*before, *after]
    order: list[str] = [] if others else [kinds[1]] * second
    for index, kind in enumerate(others):
        dealt = second // len(others) + (index < second % len(others))
        order += [kind, *[kinds[1]] * dealt]
    return order
