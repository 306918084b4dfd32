"""The nearest-shape rule of tuned kernel configurations, and the file that holds them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import torch
import triton
from triton.runtime.autotuner import Autotuner

from archsearch.errors import ConfigError
from archsearch.model import tuned

SMALL, LARGE = triton.Config({"BK": 32}, num_warps=2), triton.Config({"BK": 64}, num_warps=8)
ENTRIES = [
    {"key": [4, 64, True, "torch.float32"], "config": tuned._plain(SMALL)},
    {"key": [16, 128, True, "torch.float32"], "config": tuned._plain(LARGE)},
]


class Kernel:
    """Stands in for a compiled kernel: remembers what it was launched with."""

    def __init__(self) -> None:
        self.launched: list[int] = []

    def run(self, *args, warmup=False, **kwargs):
        if not warmup:
            self.launched.append(kwargs["BK"])
        return SimpleNamespace(metadata=SimpleNamespace(shared=1000 * kwargs["BK"]))


def make_tuner(prune=None) -> Autotuner:
    def kernel(x, H, K, GATED):
        raise AssertionError

    names = ["x", "H", "K", "GATED"]
    pruning = None if prune is None else {"early_config_prune": prune}
    tuner = Autotuner(kernel, names, [SMALL, LARGE], names[1:], None, None, prune_configs_by=pruning)
    tuner.fn = Kernel()
    return tuner


@pytest.fixture(autouse=True)
def _memory(monkeypatch):
    monkeypatch.setattr(tuned, "_shared_memory", lambda: 100_000)


@pytest.fixture
def tuner(monkeypatch) -> Autotuner:
    return installed(make_tuner(), monkeypatch)


def installed(tuner: Autotuner, monkeypatch) -> Autotuner:
    monkeypatch.setattr(tuned, "tuners", lambda: [tuner])
    monkeypatch.setattr(tuned, "_known", lambda: {"kernel": ENTRIES})
    tuned.install()
    return tuner


def launch(tuner: Autotuner, heads: int, dim: int, *, gated: bool = True) -> list[int]:
    """Block sizes of all launches that one call of the kernel makes."""
    tuner.fn.launched.clear()
    tuner.run(torch.zeros(1), H=heads, K=dim, GATED=gated, grid=(1,))
    return tuner.fn.launched


@pytest.mark.parametrize(
    ("heads", "dim", "block"), [(4, 64, 32), (6, 64, 32), (3, 96, 32), (12, 128, 64), (1000, 128, 64), (8, 256, 64)]
)
def test_the_nearest_known_key_decides_and_nothing_is_benchmarked(tuner, heads, dim, block):
    assert launch(tuner, heads, dim) == [block]
    assert launch(tuner, heads, dim) == [block]


def test_the_librarys_pruning_comes_first(monkeypatch):
    tuner = make_tuner(lambda configs, nargs, **kwargs: [c for c in configs if c.kwargs["BK"] < kwargs["K"]])
    installed(tuner, monkeypatch)
    assert launch(tuner, 16, 64) == [32]
    assert launch(tuner, 16, 128) == [64]


def test_what_asks_for_more_memory_than_there_is_is_passed_over(tuner, monkeypatch):
    monkeypatch.setattr(tuned, "_shared_memory", lambda: 40_000)
    assert launch(tuner, 16, 128) == [32]


def test_a_key_that_is_not_alike_is_tuned_once_kept_and_serves_its_likes(tuner, monkeypatch, tmp_path):
    def benchmark(call, quantiles, **limits):
        call()
        return [1.0] * len(quantiles)

    active = type("Driver", (), {"get_benchmarker": lambda self: benchmark})()
    monkeypatch.setattr(tuned.driver, "_active", active, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert launch(tuner, 4, 64, gated=False) == [32, 64, 32]
    assert launch(tuner, 5, 64, gated=False) == [32]
    tuned.remember()
    assert not tuned.Choice.missed
    kept = json.loads(tuned.own_file().read_text())["kernels"]["kernel"]
    assert [4, 64, False, "torch.float32"] in [entry["key"] for entry in kept]
    assert launch(tuner, 6, 64, gated=False) == [32]
    tuned.own_file().unlink()
    tuned.remember()
    assert not tuned.own_file().exists(), "nothing new was tuned"


def test_what_is_written_is_read_and_given_to_the_tuners(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuned.own_file()
    assert path == tmp_path / "archsearch/kernels/nvidia-test-gpu.json"
    other = {"key": [4, 64, True, "torch.float32"], "config": {"kwargs": {"BQ": 1}, "num_warps": 2, "num_stages": 3}}
    tuned.write(path, {"kernel": [other, *ENTRIES], "another": ENTRIES})
    assert json.loads(path.read_text())["device"] == "NVIDIA Test GPU"
    monkeypatch.setattr(tuned, "known_files", lambda: [path])
    tuner = make_tuner()
    monkeypatch.setattr(tuned, "tuners", lambda: [tuner])
    tuned._known.cache_clear()
    tuned.install()
    tuned._known.cache_clear()
    assert launch(tuner, 4, 64) == [32]
    assert launch(tuner, 16, 128) == [64]


def test_a_broken_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "sm90.json"
    path.write_text("{}")
    monkeypatch.setattr(tuned, "known_files", lambda: [path])
    tuned._known.cache_clear()
    with pytest.raises(ConfigError, match="holds no kernel configurations"):
        tuned.install()
    tuned._known.cache_clear()
