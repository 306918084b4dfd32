"""The nearest-shape rule of tuned kernel configurations, and the file that holds them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")
import torch
import triton
from triton.runtime.autotuner import Autotuner

from archsearch.errors import ConfigError
from archsearch.model import tuned

SMALL, LARGE = triton.Config({"BK": 32}, num_warps=2), triton.Config({"BK": 64}, num_warps=8)


@pytest.fixture
def choices() -> tuned.Choices:
    return tuned.Choices({(4, 64, True, "torch.bfloat16"): SMALL, (16, 128, True, "torch.bfloat16"): LARGE})


def test_a_known_key_is_served_as_it_is(choices):
    assert (4, 64, True, "torch.bfloat16") in choices
    assert choices[4, 64, True, "torch.bfloat16"] is SMALL


@pytest.mark.parametrize(
    ("key", "config"),
    [((6, 64), SMALL), ((3, 96), SMALL), ((12, 128), LARGE), ((1000, 128), LARGE), ((8, 256), LARGE)],
)
def test_a_new_key_is_served_by_the_nearest(choices, key, config):
    key = (*key, True, "torch.bfloat16")
    assert key in choices
    assert choices[key] is config


@pytest.mark.parametrize("key", [(4, 64, False, "torch.bfloat16"), (4, 64, True, "torch.float16"), (4, 64, True)])
def test_what_differs_in_more_than_numbers_is_not_alike(choices, key):
    assert key not in choices


def test_while_tuning_only_what_is_there_is_there(choices, monkeypatch):
    monkeypatch.setattr(tuned.Choices, "exact", True)
    assert (6, 64, True, "torch.bfloat16") not in choices
    assert (4, 64, True, "torch.bfloat16") in choices


def test_an_autotuner_benchmarks_nothing_that_is_alike(choices):
    ran = []

    class Kernel:
        def run(self, *args, **kwargs):
            ran.append(kwargs["BK"])

    def kernel(x, H):
        raise AssertionError

    tuner = Autotuner(kernel, ["x", "H"], [SMALL, LARGE], ["H"], None, None)
    tuner.fn, tuner.cache = Kernel(), tuned.Choices({(4, "torch.float32"): SMALL, (64, "torch.float32"): LARGE})
    for heads in (5, 100):
        tuner.run(torch.zeros(1), H=heads, grid=(1,))
    assert ran == [32, 64]


def test_what_is_written_is_read_and_put_into_the_tuners(tmp_path, monkeypatch, choices):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuned.own_file()
    assert path == tmp_path / "archsearch/kernels/nvidia-test-gpu.json"
    entries = [{"key": list(key), "config": tuned._plain(config)} for key, config in choices.items()]
    unknown = {"key": [1, 1, True, "torch.bfloat16"], "config": {"kwargs": {"BQ": 1}, "num_warps": 2, "num_stages": 3}}
    tuned.write(path, {"kernel": [*entries, unknown]})
    assert json.loads(path.read_text())["device"] == "NVIDIA Test GPU"

    def kernel(x, H):
        raise AssertionError

    tuner = Autotuner(kernel, ["x", "H"], [SMALL, LARGE], ["H"], None, None)
    monkeypatch.setattr(tuned, "tuners", lambda: [tuner])
    monkeypatch.setattr(tuned, "known_files", lambda: [path])
    tuned._known.cache_clear()
    tuned.install()
    tuned._known.cache_clear()
    assert dict(tuner.cache) == dict(choices)
    assert all(config in tuner.configs for config in tuner.cache.values())


def test_a_broken_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "sm90.json"
    path.write_text("{}")
    monkeypatch.setattr(tuned, "known_files", lambda: [path])
    tuned._known.cache_clear()
    with pytest.raises(ConfigError, match="holds no kernel configurations"):
        tuned.install()
    tuned._known.cache_clear()
