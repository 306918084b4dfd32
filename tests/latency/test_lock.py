"""One measurement at a time on a device; trainings beside each other, never beside a measurement."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archsearch.errors import EnvironmentUnfit
from archsearch.latency import lock
from archsearch.latency.lock import be_present, count_present, exclusive, sharing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock files of this test alone, and a GPU that needs to exist by name only."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(lock, "device_key", lambda device: device.type)
    monkeypatch.setattr(lock, "_present", {})


def hold(use: Callable, device: torch.device, held: object, release: object) -> None:
    with use(device):
        held.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def holder(use: Callable = exclusive, device: torch.device = CPU) -> tuple[multiprocessing.Process, object]:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(use, device, held, release))
    process.start()
    assert held.wait(30)
    return process, release


def test_two_processes_never_time_at_once() -> None:
    process, release = holder()
    threading.Timer(0.3, release.set).start()  # type: ignore[attr-defined]
    with exclusive(CPU) as waited:
        assert waited > 0.2
    process.join(30)
    with exclusive(CPU) as waited:
        assert waited < 0.2


def test_lock_of_a_killed_process_is_free() -> None:
    process, _ = holder()
    process.kill()
    process.join(30)
    start = time.monotonic()
    with exclusive(CPU):
        assert time.monotonic() - start < 10


def test_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "archsearch-gate-cpu.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentUnfit, match="cannot open"), exclusive(CPU):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_waiting_is_told() -> None:
    process, release = holder()
    told: list[str] = []
    threading.Timer(0.2, release.set).start()  # type: ignore[attr-defined]
    with exclusive(CPU, lambda: told.append("waiting")):
        assert told
    process.join(30)


def test_measurement_waits_for_a_training_to_give_way() -> None:
    order: list[str] = []
    with sharing(GPU) as give_way:
        thread = threading.Thread(target=lambda: measure_once(order))
        thread.start()
        time.sleep(0.2)
        order.append("trained")
        give_way()
        order.append("trained on")
    thread.join(30)
    assert order == ["trained", "measured", "trained on"]


def measure_once(order: list[str]) -> None:
    with exclusive(GPU):
        time.sleep(0.1)
        order.append("measured")


def test_trainings_run_side_by_side_and_not_beside_a_measurement() -> None:
    process, release = holder(sharing, GPU)
    with sharing(GPU) as give_way:
        give_way()
    release.set()  # type: ignore[attr-defined]
    process.join(30)
    process, release = holder(exclusive, GPU)
    threading.Timer(0.3, release.set).start()  # type: ignore[attr-defined]
    start = time.monotonic()
    with sharing(GPU):
        assert time.monotonic() - start > 0.2
    process.join(30)


def test_processes_of_ours_are_counted_while_they_live() -> None:
    be_present(GPU)
    be_present(GPU)
    assert count_present(GPU) == 1
    process, _ = holder(exclusive, GPU)
    assert count_present(GPU) == 2
    process.kill()
    process.join(30)
    assert count_present(GPU) == 1


def test_training_on_a_cpu_holds_nothing() -> None:
    with sharing(CPU) as give_way, exclusive(CPU):
        give_way()
