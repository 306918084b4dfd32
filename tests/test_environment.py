"""What is recorded of a machine, and what never is."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from archsearch import environment
from archsearch.environment import Environment, Gpu, capture_environment, find_gpus, git_state, within


def test_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for name in ("RAY_AUTH_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cret-value")
    found = capture_environment()
    assert found.variables["OMP_NUM_THREADS"] == "3"
    assert "s3cret-value" not in found.model_dump_json()
    assert found.packages["torch"] >= "2.11"
    assert found.cores >= 1
    assert found.memory > 2**28
    assert Environment.model_validate_json(found.model_dump_json()) == found


def test_a_hanging_driver_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(environment, "NVML_SECONDS", 0.05)
    monkeypatch.setattr(environment, "_read_gpus", never.wait)
    assert find_gpus() == []
    never.set()


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="A GPU", uuid="GPU-1", memory=2**36, driver="600.1", capability=(9, 0))
    monkeypatch.setattr(environment, "_read_gpus", lambda: [gpu])
    assert capture_environment().gpus == (gpu,)


def test_within_passes_on_what_happened() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)


def test_git_state_outside_a_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "absent") is None
