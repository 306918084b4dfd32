"""The latency profile of a GPU: measured through captured graphs, and accepted by a run on the same GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from archsearch.config import RunConfig
from archsearch.latency.profile_check import prepare_profile
from archsearch.latency.profiling import measure_profile
from archsearch.worker import ProxyEvaluator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_profile_of_this_gpu(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    document = {
        "space": {
            "hidden_size": 512,
            "vocab_size": 256,
            "stages": [{"name": "only", "mixers": ["a", "d"], "ffns": 1, "blocks": {"min": 2, "max": 6}}],
            "options": {"a": {"head_dim": 64, "kv_heads": 2}},
        },
        "search": {"objectives": ["decode_latency", "parameters"]},
        "latency": {"tokens": 256, "strata": 2, "steps": 16, "repeats": 1, "others": "note"},
    }
    said: list[str] = []
    config = RunConfig.model_validate(document)
    device = torch.device("cuda", torch.cuda.current_device())
    profile = measure_profile(config, path, device, 3, said.append)
    assert len([line for line in said if line.endswith(": compiled")]) == 4
    assert (profile.fingerprint.kind, profile.fingerprint.dtype) == ("cuda", "bfloat16")
    assert all(entry.us > 0 for entry in profile.table[1:])
    assert profile.error is not None

    document["latency"]["profile"] = str(path)
    config = RunConfig.model_validate(document)
    prepare_profile(config)
    architecture = config.space.build({"only.mixers": "a", "only.blocks": 2})
    found = ProxyEvaluator(config)(architecture, seed=0)
    assert found.ok, found.error
    assert found.metrics["latency_profile"]["id"] == profile.id
    assert found.metrics["latency"]["seconds"] == found.objectives["decode_latency"]
