"""The commands and the Python of the README run, on budgets that a test can afford."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import archsearch
from archsearch.architecture import SPACES
from archsearch.cli import app, main
from archsearch.config import RunConfig, load_config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BUDGET = {
    "search.evaluations": 3,
    "search.aging.population_size": 2,
    "search.aging.tournament_size": 1,
    "proxy.tokens": 256,
    "proxy.batch": 2,
    "proxy.context": 32,
    "proxy.validation_tokens": 64,
    "proxy.validations": 1,
    "latency.tokens": 8,
    "latency.strata": 1,
    "latency.steps": 2,
    "latency.repeats": 1,
    "execution.executor": "inline",
}
SMALLER = {"16": "3", "800K": "512", "3": "1"}
"""What a number on a command line is here."""


def blocks(language: str) -> list[str]:
    """The fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's paths exist."""
    (tmp_path / "search_spaces").symlink_to(SPACES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = set()
    for line in "".join(blocks("bash")).splitlines():
        program, *words = shlex.split(line)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), line
            continue
        assert program == "archsearch", line
        if words[0] in ("run", "validate-proxy"):
            words += [word for key, value in BUDGET.items() for word in ("--set", f"{key}={value}")]
        words = [SMALLER.get(word, word) for word in words]
        assert main(words) == 0, capsys.readouterr().err
        ran.add(words[0])
    assert ran >= {"doctor", "run", "inspect", "export", "resume", "init", "validate", "validate-proxy"}
    assert (checkout / "experiments" / "mine" / "best" / "model.safetensors").exists()
    assert os.path.getsize(checkout / "experiments" / "mine" / "pareto.png") > 10_000


def test_python(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = archsearch.run

    def small(space: str, **options: Any) -> archsearch.Run:
        settings = {key.replace(".", "__"): value for key, value in BUDGET.items()}
        return original(space, out=options["out"], **settings)

    monkeypatch.setattr(archsearch, "run", small, raising=False)
    (code,) = blocks("python")
    exec(code, {})
    assert (checkout / "experiments" / "python" / "best" / "model.safetensors").exists()


def test_the_example_space(checkout: Path) -> None:
    code = next(block for block in blocks("yaml") if block.startswith("space:\n"))
    Path("example.yaml").write_text(code)
    assert isinstance(load_config("example.yaml"), RunConfig)


def test_every_piece_of_a_config_fits_into_the_example(checkout: Path) -> None:
    example, *pieces = sorted(blocks("yaml"), key=lambda block: not block.startswith("space:\n"))
    for piece in pieces:
        whole = yaml.safe_load(example)
        whole["proxy"].pop("tokens")
        for section, values in yaml.safe_load(piece).items():
            whole[section] = {**whole[section], **values}
        Path("piece.yaml").write_text(yaml.safe_dump(whole))
        assert isinstance(load_config("piece.yaml"), RunConfig)


def test_what_it_names_exists() -> None:
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`(search_spaces/[^`]+)`", TEXT):
        assert (ROOT / name).exists(), name
    named = set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| `.*?\|", TEXT.split("## Commands")[1], re.M))))
    assert named == {command.name or command.callback.__name__ for command in app.registered_commands}


def test_every_operator_is_listed() -> None:
    from archsearch.operators import OPERATORS

    table = TEXT.split("## Operators")[1].split("##")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(OPERATORS)
