"""What the options of a command line mean: overrides of a config, or of one of its sections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from archsearch.config import load_config
from archsearch.errors import ConfigError, UsageError
from archsearch.files import Document, parse_yaml, validate
from archsearch.schema import Frozen

SectionT = TypeVar("SectionT", bound=Frozen)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """``{"search.seed": 1}`` as ``["search.seed=1"]``; values of None are left out. JSON is valid YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def load_section(name: str, model: type[SectionT], config: Path | None, overrides: Sequence[str]) -> SectionT:
    """One section of a config file, or of the defaults where there is no file, with ``overrides`` on top.

    Raises:
        ConfigError: an invalid file or value.
        UsageError: an override of another section.
    """
    for override in overrides:
        if not override.startswith(f"{name}."):
            raise UsageError(f"--set {override!r} does not belong here", f"set keys of {name}, as in {name}.key=value")
    if config is not None:
        section: SectionT = getattr(load_config(config, overrides), name)
        return section
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.removeprefix(f"{name}.").partition("=")
        if not equals:
            raise UsageError(f"--set {override!r} is not key.path=value", f"write for example {name}.tokens=1M")
        values[key] = parse_yaml(text, f"--set {override}").value
    try:
        return validate(model, Document(values, name, {}))
    except ConfigError as error:
        raise ConfigError(error.cause, "correct that value on the command line") from None
