"""The operator kit on a GPU: every kind's training path in bf16 against the fp32 reference.

Each kind at two head dims, always with four heads: kernels are tuned once for each number of heads and head dim,
which takes minutes where no tuned configuration is at hand (``TRITON_FIRST_CONFIG=1``, see ``conftest.py``, helps).
Errors are printed (``pytest -rP``). RWKV-7 with head dim 64 at one token is the case that rounding alone decides: see
``test_rwkv7_at_one_token_hangs_on_the_last_bit`` in tests/model/test_layers.py.
"""

from __future__ import annotations

import pytest
import torch

from archsearch.errors import EnvironmentUnfit
from tests.kits import operator_kit as kit
from tests.kits.operator_kit import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(900),
]
CASES = [
    Case("a", 256, {"head_dim": 64, "kv_heads": 2, "qk_norm": True}),
    Case("a", 512, {"head_dim": 128}),
    Case("w", 256, {"head_dim": 64, "kv_heads": 2, "window": 70}),
    Case("w", 512, {"head_dim": 128, "window": 64}),
    Case("m", 256, {}),
    Case("m2", 128, {"head_dim": 64, "state": 64, "groups": 2}),
    Case("m2", 128, {"head_dim": 64, "state": 128}),
    Case("d", 256, {"head_dim": 64}),
    Case("d", 512, {"head_dim": 128}),
    Case("gd", 256, {"head_dim": 64}),
    Case("gd", 512, {"head_dim": 128}),
    Case("kda", 256, {"head_dim": 64}),
    Case("kda", 512, {"head_dim": 128}),
    Case("r7", 256, {"head_dim": 64}),
    Case("r7", 512, {"head_dim": 128}),
    Case("gl", 256, {"head_dim": 64, "expand_k": 1.0}),
    Case("gl", 512, {"head_dim": 128, "expand_k": 1.0}),
    Case("f", 256, {}),
]
CASES = kit.every_kind(CASES, (256, 64), (512, 128))
BOUNDS = {"output": 2e-2, "input": 3e-2, "other": 5e-2}
"""Relative errors in the 2-norm. bf16 keeps 8 bits (4e-3 a rounding), and a layer rounds some ten times in a row."""

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    kit.poison_empty(monkeypatch)


def skip_without_libraries(case: Case) -> None:
    try:
        case.build(torch.float32).require()
    except EnvironmentUnfit as error:
        pytest.skip(error.cause)


@each_case
@pytest.mark.parametrize("length", kit.LENGTHS)
def test_training_path_agrees_with_the_reference(case, length):
    skip_without_libraries(case)
    kit.check_training_path(case, length, "cuda", BOUNDS)


@each_case
@pytest.mark.parametrize("prompt", [1, 65, 128])
def test_prefill_then_step_agrees_with_the_reference(case, prompt):
    skip_without_libraries(case)
    kit.check_prefill_on_training_path(case, prompt, 140, "cuda", 5e-2)


@each_case
def test_parameters_and_state_equal_the_stated_cost(case):
    kit.check_cost(case, "cuda")
