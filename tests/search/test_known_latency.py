"""A search that knows decode latency beforehand: what the sampler does with it, and what is recorded."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from archsearch.api import create_run, open_run
from archsearch.architecture import dump_operator
from archsearch.cli import main
from archsearch.config import RunConfig, load_config
from archsearch.environment import cpu_name
from archsearch.errors import ConfigError
from archsearch.latency.protocol import VERSION, kernel_hash
from archsearch.latency_profile import (
    Checked,
    Entry,
    Fingerprint,
    LatencyProfile,
    ProfileError,
    ProfileUnfit,
    operators_of,
)
from archsearch.search.aging import AgingEvolutionSampler
from archsearch.search.executors import InlineExecutor
from archsearch.search.ledger import Ledger
from archsearch.search.loop import Search
from archsearch.search.samplers import make_sampler
from archsearch.worker import ProxyEvaluator
from tests.search.fakes import SPACE, FakeEvaluator, make_config

WORST = 0.1


def write_profile(path: Path, config: RunConfig, device: str = "") -> LatencyProfile:
    """A profile of this machine in which an operator costs what it has parameters, in 10 ns."""
    entries = [
        Entry(
            hidden_size=width,
            operator=operator and dump_operator(operator),
            us=operator.parameters(width) / 100 if operator else 50.0,
        )
        for width in config.space.hidden_size
        for operator in (None, *operators_of(config.space, width))
    ]
    latency = config.latency
    profile = LatencyProfile(
        fingerprint=Fingerprint(
            device=device or cpu_name(),
            kind="cpu",
            threads=1,
            kernel_hash=kernel_hash(),
            protocol=VERSION,
            dtype="float32",
            batch=latency.batch,
            tokens=latency.tokens,
            strata=latency.strata,
            vocab_size=config.space.vocab_size,
            meta_tokens=0,
        ),
        error=ProfileError(median=0.01, worst=WORST, spearman=1.0, chains_alone=0.02, chains=0.0, architectures=8),
        table=tuple(entries),
        checked=(Checked(hidden_size=64, operators="a", options={}, measured_ms=1.0, predicted_ms=1.0),),
    )
    profile.save(path)
    return profile


def with_profile(path: Path, config: RunConfig, **latency: Any) -> tuple[RunConfig, LatencyProfile]:
    profile = write_profile(path, config)
    settings = config.latency.model_copy(update={"profile": str(path), **latency})
    return config.model_copy(update={"latency": settings}), profile


def sampler_of(config: RunConfig) -> AgingEvolutionSampler:
    sampler = make_sampler(config)(0, False)
    assert isinstance(sampler, AgingEvolutionSampler)
    return sampler


def genomes(config: RunConfig) -> list[dict[str, Any]]:
    ledger = Ledger(config)
    Search(config, ledger, lambda: InlineExecutor(FakeEvaluator())).run()
    return [trial.params for trial in ledger.trials]


def test_latency_is_known_beforehand_with_a_profile_and_only_then(tmp_path: Path) -> None:
    plain = make_config(aging={"mode": "default", "population_size": 5}, evaluations=9)
    assert sampler_of(plain)._cheap is None
    config, profile = with_profile(tmp_path / "profile.json", plain)
    genome = {name: choices[0] for name, choices in config.space.genes.items()}
    cheap = sampler_of(config)._cheap
    assert cheap is not None
    assert cheap(genome) == {"decode_latency": profile.seconds(config.space.build(genome))}
    assert len(genomes(config)) == 9


@pytest.mark.parametrize(("source", "margin"), [("measurement", 1 + WORST), ("profile", 1.0)])
def test_what_must_break_the_latency_limit_is_not_proposed(source: str, margin: float, tmp_path: Path) -> None:
    plain = make_config({**SPACE, "limits": {"decode_latency": 15.0}}, aging={"mode": "default"}, evaluations=15)
    config, profile = with_profile(tmp_path / "profile.json", plain, source=source)
    free = [profile.seconds(config.space.build(genome)) for genome in genomes(plain)]
    known = [profile.seconds(config.space.build(genome)) for genome in genomes(config)]
    assert max(free) > 15 * margin
    assert max(known) <= 15 * margin


def test_the_papers_mode_fits_the_width_to_the_predicted_latency(tmp_path: Path) -> None:
    limits = {"limits": {"decode_latency": 20.0}}
    config, profile = with_profile(tmp_path / "profile.json", make_config({**SPACE, **limits}, evaluations=12))
    assert sampler_of(config)._settings.fit_width == "hidden_size"
    for genome in genomes(config):
        seconds = {
            w: profile.seconds(config.space.build({**genome, "hidden_size": w})) for w in config.space.hidden_size
        }
        assert genome["hidden_size"] == max((w for w, found in seconds.items() if found <= 20), default=64)


# A whole run on this machine


@pytest.fixture
def space(tmp_path: Path) -> Path:
    document = {
        "space": {
            "name": "two",
            "hidden_size": [32, 64],
            "vocab_size": 256,
            "stages": [{"name": "only", "pattern": ["a f"], "blocks": [1, 2]}],
            "options": {"a": {"head_dim": 16}, "f": {"multiple_of": 32}},
        },
        "search": {"evaluations": 2, "objectives": ["parameters", "decode_latency"]},
        "latency": {"tokens": 32, "strata": 2, "steps": 4, "repeats": 1, "profile": "profile.json"},
        "execution": {"executor": "inline", "device": "cpu"},
    }
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_run_measures_beside_the_prediction_and_tells_the_error(
    space: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(space.parent)
    profile = write_profile(space.parent / "profile.json", load_config(space))
    monkeypatch.chdir("/")  # the file is found from everywhere
    assert main(["run", "--space", str(space), "--set", f"latency.profile={space.parent}/profile.json",
                 "--out", str(space.parent / "run")]) == 0  # fmt: skip
    for candidate in open_run(space.parent / "run").candidates():
        assert candidate.evaluation is not None
        metrics = candidate.evaluation.metrics
        assert metrics["latency_profile"] == {"id": profile.id, "seconds": profile.seconds(candidate.architecture)}
        assert candidate.evaluation.objectives["decode_latency"] == metrics["latency"]["seconds"]
    assert f"latency profile {profile.id}: off by" in capsys.readouterr().out


def test_a_predicted_latency_is_never_taken_for_a_measured_one(
    space: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(space.parent)
    config = load_config(space, ["latency.source=profile", "space.limits.decode_latency=100"])
    profile = write_profile(space.parent / "profile.json", config)
    run = create_run(config, space.parent / "run")
    run.search()
    for candidate in run.candidates():
        evaluation = candidate.evaluation
        assert evaluation is not None
        assert evaluation.objectives["decode_latency"] == profile.seconds(evaluation.architecture)
        assert evaluation.paths["decode"] == f"not measured: {profile.name}"
        assert "off by 1.00%, at worst 10.00%" in evaluation.paths["decode"]
        assert "latency" not in evaluation.metrics
        assert "latency" not in evaluation.seconds
    assert main(["inspect", str(run.path)]) == 0
    assert "decode latency is predicted, not measured" in capsys.readouterr().out
    assert main(["inspect", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latency_profile"]["source"] == "profile"


def test_nothing_starts_with_a_profile_that_does_not_fit(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space.parent)
    config = load_config(space)
    with pytest.raises(ConfigError, match="cannot read"):
        create_run(config, space.parent / "run")
    write_profile(space.parent / "profile.json", config, device="another")
    with pytest.raises(ProfileUnfit, match="another"):
        create_run(config, space.parent / "run")
    small = load_config(space, ["space.hidden_size=[32]"])
    write_profile(space.parent / "profile.json", small)
    with pytest.raises(ProfileUnfit, match="lacks the head at width 64, a"):
        create_run(config, space.parent / "run")
    assert not (space.parent / "run").exists()


def test_a_worker_on_another_device_refuses(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space.parent)
    config = load_config(space)
    write_profile(space.parent / "profile.json", config, device="another")
    architecture = config.space.build({"hidden_size": 32, "only.blocks": 1})
    found = pickle.loads(pickle.dumps(ProxyEvaluator(config)))(architecture, seed=0)
    assert not found.ok
    assert "ProfileUnfit" in found.error
