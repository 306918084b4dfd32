"""Finished searches, a line of a file each: a comparison that was stopped goes on, and machines may share one."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archsearch.errors import ConfigError

DIGITS = 6


class Curves:
    """The searches in some files; new ones are appended to the first.

    A line holds ``key`` (what was searched, by what, from which seed), ``curve`` (hypervolumes, one an evaluation),
    ``evaluations`` (the budget), ``ask_ms`` (the median), ``python`` and ``numpy``. A line cut short is left out.

    Raises:
        ConfigError: a file holds something else.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._path = paths[0] if paths else None
        self._known: dict[str, dict[str, Any]] = {}
        for path in paths:
            for line in path.read_text().splitlines() if path.exists() else ():
                self._take(path, line)
        cut = self._path is not None and self._path.exists() and not self._path.read_text().endswith("\n")
        self._lead = "\n" if cut else ""

    def _take(self, path: Path, line: str) -> None:
        try:
            found = json.loads(line)
            key, known = json.dumps(found["key"]), found["evaluations"]
        except ValueError:
            return
        except (KeyError, TypeError):
            raise ConfigError(f"{path} holds no searches", "give files that --curves wrote") from None
        if key not in self._known or known > self._known[key]["evaluations"]:
            self._known[key] = found

    def get(self, key: Sequence[Any], evaluations: int) -> dict[str, Any] | None:
        """A search with at least this budget, cut to it; None where there is none."""
        found = self._known.get(json.dumps(list(key)))
        if found is None or found["evaluations"] < evaluations:
            return None
        return found | {"curve": found["curve"][:evaluations], "evaluations": evaluations}

    def add(self, key: Sequence[Any], evaluations: int, curve: Sequence[float], ask_ms: float) -> dict[str, Any]:
        """Keep one search."""
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        result = {"key": list(key), "evaluations": evaluations, "ask_ms": round(ask_ms, 2), **versions}
        result["curve"] = [round(value, DIGITS) for value in curve]
        self._known[json.dumps(list(key))] = result
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(self._lead + json.dumps(result) + "\n")
            self._lead = ""
        return result
