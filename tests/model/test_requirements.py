"""A run whose trainings would all be refused is refused before it starts, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from archsearch.api import create_run
from archsearch.config import RunConfig
from archsearch.environment import Gpu
from archsearch.errors import ArchsearchError, ConfigError, EnvironmentUnfit
from archsearch.model import requirements
from archsearch.model.requirements import prepare_kernels

SPACE: dict[str, Any] = {
    "name": "small",
    "hidden_size": 64,
    "vocab_size": 256,
    "stages": [{"name": "all", "mixers": ["d", "m"], "blocks": {"min": 1, "max": 2}}],
    "options": {"d": {"head_dim": 16}},
}


def config_of(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"space": SPACE, **sections})


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """A machine with a Hopper GPU and all libraries."""
    found = [Gpu(name="A GPU", uuid="GPU-1", memory=2**36, driver="600.1", capability=(9, 0))]
    monkeypatch.setattr(requirements, "find_gpus", lambda: found)
    monkeypatch.setattr(requirements, "package_version", lambda name: "2.11.0+cu130")
    monkeypatch.setattr(requirements, "installed", lambda name: True)
    monkeypatch.setattr(requirements, "require_libraries", lambda: None)
    return found


def test_a_fit_machine_is_fit() -> None:
    prepare_kernels(config_of())


def test_an_old_gpu(gpus: list[Gpu]) -> None:
    newer = gpus.pop()
    gpus.append(newer.model_copy(update={"name": "An old GPU", "capability": (7, 5)}))
    with pytest.raises(EnvironmentUnfit, match="An old GPU is older than Ampere"):
        prepare_kernels(config_of())
    prepare_kernels(config_of(proxy={"kernels": "torch"}))
    prepare_kernels(config_of(search={"objectives": ["parameters", "decode_latency"]}))
    gpus.append(newer)
    prepare_kernels(config_of())


def test_a_type_that_the_kernels_do_not_take() -> None:
    with pytest.raises(ConfigError, match=r"proxy.dtype: .* not float32"):
        prepare_kernels(config_of(proxy={"dtype": "float32"}))
    prepare_kernels(config_of(proxy={"dtype": "float32"}, execution={"device": "cpu"}))


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None if name == "fla" else object())
    with pytest.raises(EnvironmentUnfit, match="flash-linear-attention") as error:
        requirements.require_libraries()
    assert "archsearch[cuda]" in error.value.remedy


def test_mamba_without_its_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "installed", lambda name: name == "mamba_ssm")
    with pytest.raises(EnvironmentUnfit, match=r"operator m .* selective_scan_cuda") as error:
        prepare_kernels(config_of())
    assert "choose m2" in error.value.remedy


def test_workers_of_a_cluster_look_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_gpus", lambda: pytest.fail("looked at this machine"))
    prepare_kernels(config_of(execution={"address": "10.0.0.1:6379"}))


@pytest.mark.parametrize("here", [{"device": "cpu"}, {"device": "auto"}])
def test_nothing_is_left_of_a_run_that_cannot_train(gpus: list[Gpu], tmp_path: Path, here: dict[str, Any]) -> None:
    gpus.clear()
    with pytest.raises(ArchsearchError, match="do not run on a CPU") as error:
        create_run(config_of(proxy={"kernels": "fla"}, execution=here), tmp_path / "run")
    assert "proxy.kernels=auto" in error.value.remedy
    assert not (tmp_path / "run").exists()
