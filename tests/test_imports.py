"""Imports run one way, and the command line starts light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import archsearch

PACKAGE = Path(archsearch.__file__).parent
TOP = {"api", "cli", "commands", "worker"}
ROOT = {
    "architecture",
    "config",
    "environment",
    "errors",
    "evaluation",
    "files",
    "latency_profile",
    "operators",
    "schema",
    "space",
    "stage",
    "stopping",
}
ALLOWED = {
    "root": ROOT,
    "search": ROOT | {"search"},
    "report": ROOT | {"search", "report"},
    "model": ROOT | {"model"},
    "proxy": ROOT | {"model", "proxy"},
    "latency": ROOT | {"model", "latency"},
    "scaling": ROOT | {"search", "report", "scaling"},
    "validity": ROOT | {"search", "report", "validity"},
    "export": ROOT | {"model", "proxy", "latency", "export"},
    "record": ROOT | {"model", "proxy", "latency"},
    "worker": ROOT | {"record", "model", "proxy", "latency"},
}
"""What each room may import of ours; rooms that are missing here may import everything."""
ONLY = {
    "torch": {"model", "proxy", "latency", "export", "record", "worker", "commands"},
    "triton": {"model", "proxy", "latency", "commands"},
    "transformers": {"export"},
    "tokenizers": {"proxy", "export"},
    "datasets": {"proxy"},
    "pyarrow": {"proxy"},
    "optuna": {"search"},
    "ray": {"search"},
    "pandas": {"search", "report", "api"},
    "matplotlib": {"report"},
}
"""Which rooms may import a package."""
HEAVY = ("torch", "pandas", "ray", "matplotlib", "transformers", "tokenizers", "datasets", "optuna", "sklearn")


def room_of(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "root" if name in ROOT else name


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports out in full"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_rule() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= ALLOWED.keys() | TOP


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "archsearch" and room in ALLOWED:
            assert rest[0] in ALLOWED[room], f"{room} must not import {name}"
        if package in ONLY and room != "__init__":
            assert room in ONLY[package], f"{room} must not import {name}"


def loaded_by(code: str) -> set[str]:
    """The top-level packages loaded after ``code``, in a process of its own."""
    script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "from archsearch.cli import main; assert main(['--help']) == 0",
        "from archsearch.cli import main; assert main(['run', '--help']) == 0",
        "import archsearch; archsearch.load_config, archsearch.SearchSpace",
    ],
)
def test_light_start(code: str) -> None:
    assert not loaded_by(code) & set(HEAVY)


def test_the_driver_loads_no_torch() -> None:
    code = "from archsearch.search import loop; import archsearch.api, archsearch.report, archsearch.worker"
    assert not loaded_by(code) & {"torch", "transformers"}
