"""Search spaces: genomes to architectures and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from archsearch.architecture import SPACES, load_architecture
from archsearch.config import load_config
from archsearch.errors import ConfigError, InvalidArchitecture
from archsearch.space import SearchSpace, Stage

NAMES = ["tiny", "hybrid", "nemotron_flash"]


@pytest.fixture(scope="module")
def spaces() -> dict[str, SearchSpace]:
    return {name: load_config(SPACES / f"{name}.yaml").space for name in NAMES}


def space(**changes: Any) -> SearchSpace:
    fields: dict[str, Any] = {
        "hidden_size": 128,
        "vocab_size": 256,
        "stages": [{"name": "only", "mixers": ["a", "d+m2"], "blocks": [1, 2]}],
    }
    return SearchSpace.model_validate({**fields, **changes})


def stage(**fields: Any) -> Stage:
    return Stage.model_validate({"name": "s", "blocks": 1, **fields})


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({"mixers": "d", "ratio": "1:3", "layout": "grouped", "ffns1": 1}, "d f"),
        ({"mixers": "d+m2", "ratio": "1:2", "layout": "grouped", "ffns1": 1, "ffns2": 1}, "d f m2 f m2 f"),
        ({"mixers": "d+m2", "ratio": "0:1", "layout": "grouped", "ffns1": 1, "ffns2": 2}, "m2 f f"),
        ({"mixers": "d+m2", "ratio": "2:1", "layout": "spread", "ffns1": 0, "ffns2": 0}, "d m2 d"),
        ({"mixers": "d+m2+a", "ratio": "1:2", "layout": "spread", "ffns1": 1, "ffns2": 1, "ffns3": 1},
         "d f m2 f a f m2 f"),
        ({"mixers": "m2+a+d", "ratio": "1:2", "layout": "grouped", "ffns1": 1, "ffns2": 1, "ffns3": 0},
         "m2 f a f a f d"),
        ({"mixers": "m2+a+d", "ratio": "1:1", "layout": "grouped", "ffns1": 1, "ffns2": 1, "ffns3": 2},
         "m2 f a f d f f"),
    ],
)  # fmt: skip
def test_blocks(factors: dict[str, Any], expected: str) -> None:
    assert " ".join(stage(mixers=["d", "d+m2", "d+m2+a", "m2+a+d"]).block(factors)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "nemotron-flash-1b",
        "nemotron-flash-3b",
        "nemotron-flash-searched-latency",
        "nemotron-flash-searched-parameters",
    ],
)
def test_the_paper_space_holds_what_the_paper_found(spaces: dict[str, SearchSpace], name: str) -> None:
    wanted = load_architecture(name)
    found = spaces["nemotron_flash"].build(spaces["nemotron_flash"].genome_of(wanted))
    assert found.operators == wanted.operators
    assert found.hidden_size == wanted.hidden_size


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_genomes_build_mutate_and_come_back(spaces: dict[str, SearchSpace], name: str, seed: int) -> None:
    space, rng = spaces[name], np.random.default_rng(seed)
    genome = space.sample(rng)
    assert set(genome) == set(space.genes)
    child = space.mutate(genome, rng)
    assert sum(child[gene] != genome[gene] for gene in genome) == 1
    identity = space.identity(genome)
    if identity is None:
        with pytest.raises(InvalidArchitecture):
            space.build(genome)
    else:
        architecture = space.build(genome)
        assert architecture.id == identity
        assert space.build(space.genome_of(architecture)).id == identity


def test_seeds_of_the_shipped_spaces_are_in_them(spaces: dict[str, SearchSpace]) -> None:
    for name, count in (("tiny", 1), ("hybrid", 2), ("nemotron_flash", 0)):
        assert len(spaces[name].seed_genomes) == count
        assert all(spaces[name].identity(genome) for genome in spaces[name].seed_genomes)


def test_the_practical_space_has_26_genes(spaces: dict[str, SearchSpace]) -> None:
    assert len(spaces["hybrid"].genes) == 26


def test_constants_are_no_genes() -> None:
    assert set(space().genes) == {"only.mixers", "only.blocks"}
    assert space().size == 4


def test_over_the_operator_limit_the_last_stage_shrinks() -> None:
    stages = [
        {"name": "one", "pattern": "a f", "blocks": 2},
        {"name": "two", "pattern": "d f", "blocks": [1, 5]},
    ]
    limited = space(stages=stages, limits={"operators": {"max": 8}})
    assert limited.build({"two.blocks": 5}).notation == "a f a f d f d f"
    with pytest.raises(InvalidArchitecture, match="operators: 6 is above the limit 5"):
        space(stages=stages, limits={"operators": {"max": 5}}).build({"two.blocks": 5})


@pytest.mark.parametrize(
    ("limits", "cause"),
    [
        ({"parameters": {"max": "1K"}}, "parameters: .* above"),
        ({"parameters": {"min": "1B"}}, "parameters: .* below"),
        ({"full_attention": {"min": 5}}, "full-attention operators: 1 is below"),
        ({"state_bytes": {"max": "1KiB"}}, "state bytes: .* above"),
    ],
)
def test_limits(limits: dict[str, Any], cause: str) -> None:
    with pytest.raises(InvalidArchitecture, match=cause):
        space(limits=limits).build({"only.mixers": "a", "only.blocks": 1})


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"hidden_size": []}, "choices is empty"),
        ({"hidden_size": {"min": 64, "max": 32}}, "min 64 is above max 32"),
        ({"hidden_size": 0}, "at least 8"),
        ({"hidden_size": [64, 64]}, "repeated"),
        ({"stages": []}, "at least 1 item"),
        ({"stages": [{"name": "s", "mixers": "a", "blocks": -1}]}, "blocks must be"),
        ({"stages": [{"name": "s", "mixers": "q", "blocks": 1}]}, "unknown operator 'q'"),
        ({"stages": [{"name": "s", "mixers": "a+d+gl+gd", "blocks": 1}]}, "one to 3"),
        ({"stages": [{"name": "s", "mixers": "a+f", "blocks": 1}]}, "an FFN is no mixer"),
        ({"stages": [{"name": "s", "mixers": "a", "ratio": "1:0", "blocks": 1}]}, "not a ratio"),
        ({"stages": [{"name": "s", "blocks": 1}]}, "either mixers or pattern"),
        ({"stages": [{"name": "s", "mixrs": "a", "blocks": 1}]}, "did you mean 'mixers'"),
        ({"stages": [{"name": "../x", "mixers": "a", "blocks": 1}]}, "pattern"),
        ({"options": {"a": {"head_dim": 7}}}, "options.a.head_dim"),
        ({"options": {"a": {"heds": 7}}}, "did you mean 'heads'"),
        ({"limits": {"operators": {"min": 3, "max": 2}}}, "min 3 is above max 2"),
    ],
)
def test_invalid_spaces_are_refused_with_a_cause(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        space(**changes)


def test_a_space_without_feasible_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no feasible architecture: operator 0 .*head_dim must divide"):
        space(hidden_size=[96, 100]).check_feasible()


def test_foreign_genomes_and_architectures_are_refused() -> None:
    with pytest.raises(InvalidArchitecture, match="lacks the gene"):
        space().build({})
    with pytest.raises(InvalidArchitecture, match="the space has no"):
        space().build({"only.mixers": "a", "only.blocks": 9})
    with pytest.raises(ConfigError, match="does not hold this architecture"):
        space().genome_of(load_architecture("qwen3-0.6b"))


def test_fingerprint_follows_meaning_not_name() -> None:
    assert space(name="other").fingerprint == space().fingerprint
    assert space(vocab_size=512).fingerprint != space().fingerprint


def test_a_wrong_override_is_not_looked_for_in_the_file() -> None:
    tiny = SPACES / "tiny.yaml"
    with pytest.raises(ConfigError, match=r"^given proxy\.warmup: proxy\.warmup: .* \(found 7\)") as refused:
        load_config(tiny, ["proxy.tokens=1M", "proxy.warmup=7"])
    assert refused.value.remedy == "correct that value"
    with pytest.raises(ConfigError, match=r"tiny\.yaml:\d+ with the given proxy\.rungs: proxy: rungs must be two"):
        load_config(tiny, ["proxy.rungs=[2K, 1K]"])
    with pytest.raises(ConfigError, match=r"^given space\.limits\.operators: space\.limits\.operators: unknown key"):
        load_config(tiny, ["space.limits.operators={min: 3, mx: 6}"])


def test_overrides_and_resolved_copy(tmp_path: Path) -> None:
    config = load_config(SPACES / "tiny.yaml", ["proxy.tokens=1M", "space.stages.0.blocks=[1,3]", "search.seed=7"])
    assert config.proxy.tokens == 1_000_000
    assert config.space.stages[0].blocks == (1, 3)
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    for wrong in ("proxy.tokens", "=1", "proxy.toks=1", "space.stages.9.blocks=1", "search.evaluations=0"):
        with pytest.raises(ConfigError):
            load_config(SPACES / "tiny.yaml", [wrong])
