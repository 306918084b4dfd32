"""What ``operators.py --startup`` counts as import."""

from __future__ import annotations

import builtins
import importlib
import sys
import time
from pathlib import Path

import pytest

from benchmarks.operator_startup import importing


def test_imports_within_imports_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outer_of_two.py").write_text("import time, inner_of_two\ntime.sleep(0.02)\n")
    (tmp_path / "inner_of_two.py").write_text("import time\ntime.sleep(0.02)\n")
    monkeypatch.syspath_prepend(tmp_path)
    plain = builtins.__import__, importlib.import_module
    start = time.perf_counter()
    with importing() as seconds:
        importlib.import_module("outer_of_two")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("none_of_two")
    assert 0.04 <= sum(seconds) <= time.perf_counter() - start
    assert (builtins.__import__, importlib.import_module) == plain
    for name in ("outer_of_two", "inner_of_two"):
        del sys.modules[name]
