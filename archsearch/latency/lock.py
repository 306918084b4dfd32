"""Who may use a device while it is timed: one measurement at a time, trainings side by side, never both.

Locks are files that the kernel unlocks when their holder dies; all users of the machine share them. A training
takes its turn through a second file, the gate, so that trainings that come and go cannot starve a measurement.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from archsearch.errors import EnvironmentUnfit

_present: dict[tuple[str, int], int] = {}
"""Handles of the marks that a process (a fork has the dictionary, but not the marks) holds until it ends."""


def _path(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"archsearch-{name}"


def device_key(device: torch.device) -> str:
    """The name of a device in lock files: one that all processes share, whatever CUDA_VISIBLE_DEVICES says."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"


@contextmanager
def exclusive(device: torch.device, on_wait: Callable[[], None] | None = None) -> Iterator[float]:
    """Hold the machine's one right to time on ``device``; gives the seconds waited for it.

    Args:
        device: what is timed.
        on_wait: called where it has to wait.
    """
    key = device_key(device)
    be_present(device)
    start = time.perf_counter()
    with _locked(_path(f"gate-{key}.lock"), on_wait), _locked(_path(f"timing-{key}.lock"), on_wait):
        yield time.perf_counter() - start


@contextmanager
def sharing(device: torch.device) -> Iterator[Callable[[], None]]:
    """Use a GPU without timing, beside others that do the same; gives a function that lets a measurement pass.

    Call it now and then, when the device has nothing to do: it returns when no measurement runs or waits. On a CPU
    nothing is held: a training there has a core of its own.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    key = device_key(device)
    be_present(device)
    gate, handle = (_open(_path(f"{name}-{key}.lock")) for name in ("gate", "timing"))

    def enter() -> None:
        fcntl.flock(gate, fcntl.LOCK_SH)
        fcntl.flock(handle, fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)

    def give_way() -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)
        enter()

    try:
        enter()
        yield give_way
    finally:
        os.close(handle)
        os.close(gate)


def be_present(device: torch.device) -> None:
    """Mark this process as one of ours on a GPU, so that measurements in others do not take it for a stranger."""
    key = device_key(device)
    mark = key, os.getpid()
    if key == "cpu" or mark in _present:
        return
    _present[mark] = _open(_path(f"user-{key}-{os.getpid()}.lock"))
    fcntl.flock(_present[mark], fcntl.LOCK_EX)


def count_present(device: torch.device) -> int:
    """How many processes of ours use a GPU; marks whose owners died are removed."""
    alive = 0
    for path in Path(tempfile.gettempdir()).glob(f"archsearch-user-{device_key(device)}-*.lock"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            alive += 1
        except PermissionError:
            pass  # another user's, and nobody holds it
        finally:
            os.close(handle)
    return alive


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None] | None) -> Iterator[None]:
    handle = _open(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    # Opening another user's file in a sticky folder with O_CREAT is refused, reading it is not.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    for extra in (0, os.O_CREAT):
        try:
            return os.open(path, flags | extra, 0o644)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise EnvironmentUnfit(f"cannot open {path}: {error.strerror}", "remove that file") from None
    raise EnvironmentUnfit(f"cannot create {path}", "check the folder for temporary files")
