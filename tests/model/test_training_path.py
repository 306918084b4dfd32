"""What is refused before training starts: libraries, devices, types, options, and kernels that fail their check."""

from __future__ import annotations

import math
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from archsearch.architecture import make_architecture
from archsearch.errors import ConfigError, EnvironmentUnfit, InvalidArchitecture
from archsearch.evaluation import Outcome
from archsearch.model import fla_library, self_check, training_path, tuned
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.model.self_check import Agreement, WrongKernels
from archsearch.operators import OPERATORS
from archsearch.record import classify

CUDA = torch.device("cuda")


def model_of(**options: int) -> HybridLM:
    operators = [{"kind": "a", **options}, {"kind": "d", "head_dim": 16}, {"kind": "f", "ratio": 2}]
    return build_model(make_architecture(hidden_size=64, vocab_size=32, operators=operators))


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine that looks fit: what is missing is taken away by the tests."""
    monkeypatch.setattr(fla_library, "miscompiles", lambda device: False)
    monkeypatch.setattr(training_path, "_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test GPU")
    monkeypatch.setattr(training_path, "compile_ahead", lambda operators: None)
    monkeypatch.setattr(self_check, "agreement", lambda *args, **draw: Agreement({"output": 0.01}))


def prepared(model: HybridLM, dtype: torch.dtype = torch.bfloat16) -> HybridLM:
    return training_path.prepare(model, "auto", CUDA, dtype)


def test_a_fit_machine_trains_every_kind_through_its_kernels(hopper):
    model = prepared(model_of(head_dim=16))
    assert model.paths() == {"a": "SDPA flash", "d": "Triton and fla delta rule", "f": "Triton SwiGLU"}


def test_kernels_of_a_triton_that_is_known_to_be_wrong_say_that_they_were_checked(hopper, monkeypatch):
    monkeypatch.setattr(fla_library, "miscompiles", lambda device: True)
    model = prepared(model_of(head_dim=16))
    assert all(", checked: this Triton is known to miscompile" in path for path in model.paths().values())


def test_what_was_compiled_is_known_and_waits_for_nobody(monkeypatch, tmp_path):
    monkeypatch.setattr(training_path, "_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test GPU")
    operators = [(OPERATORS[kind](), 64) for kind in ("d", "f")]
    for operator in operators:
        training_path._mark(operator).touch()
    monkeypatch.setattr(training_path, "_turn", lambda: pytest.fail("waits for others that compile"))
    training_path.compile_ahead(operators)


def test_an_operator_that_was_checked_alone_is_known_afterwards(hopper, tmp_path):
    model = prepared(model_of(head_dim=16))
    assert len(list(tmp_path.iterdir())) == len(set(model.architecture.operators))


def test_auto_is_the_reference_on_a_cpu_and_the_kernels_are_refused_there():
    cpu = torch.device("cpu")
    model = training_path.prepare(model_of(head_dim=16), "auto", cpu, torch.float32)
    assert set(model.paths().values()) == {"torch"}
    with pytest.raises(EnvironmentUnfit, match="do not run on cpu"):
        training_path.prepare(model, "fla", cpu, torch.bfloat16)


def test_fp32_is_refused_by_name(hopper):
    with pytest.raises(ConfigError, match=r"proxy.dtype: .* bfloat16, not float32") as error:
        prepared(model_of(head_dim=16), torch.float32)
    assert "proxy.kernels=torch" in error.value.remedy


def test_a_head_dim_that_flash_kernels_do_not_take_is_refused_by_name(hopper):
    with pytest.raises(InvalidArchitecture, match="operator a: head_dim 12 is no multiple of 8") as error:
        prepared(model_of(head_dim=12, heads=4))
    assert "8, 16, 24" in error.value.remedy


def test_an_old_gpu_is_refused(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(EnvironmentUnfit, match="older than Ampere") as error:
        prepared(model_of(head_dim=16))
    assert "8.0" in error.value.remedy


@pytest.mark.parametrize("missing", ["fla", "triton"])
def test_a_missing_library_is_named(hopper, monkeypatch, missing):
    monkeypatch.setattr(fla_library.importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(EnvironmentUnfit, match="training on a GPU needs") as error:
        prepared(model_of(head_dim=16))
    assert "archsearch[cuda]" in error.value.remedy


@pytest.mark.parametrize("found", [{"output": 0.01, "q_proj.weight": 0.7}, {"output": math.nan, "input": 0.01}])
def test_a_kernel_that_is_off_makes_the_candidate_invalid(hopper, monkeypatch, found):
    monkeypatch.setattr(self_check, "agreement", lambda *args, **draw: Agreement(found))
    monkeypatch.setattr(self_check, "miscompiles", lambda device: True)
    model = model_of(head_dim=16)
    with pytest.raises(WrongKernels, match=r"operator a .* at width 64 are off by") as error:
        prepared(model)
    assert "known to miscompile" in error.value.cause
    assert classify(error.value) is Outcome.INVALID_MEASUREMENT
    assert set(model.paths().values()) == {"torch"}


@pytest.mark.parametrize("sound", [1, 2, 3, None])
def test_an_unlucky_draw_is_drawn_again(monkeypatch, sound):
    drawn = []

    def agreement(*args, draw):
        drawn.append(draw)
        return Agreement({"output": 0.01 if draw == sound else 0.2})

    monkeypatch.setattr(self_check, "agreement", agreement)
    monkeypatch.setattr(self_check, "miscompiles", lambda device: False)
    if sound:
        assert self_check.require_sound(OPERATORS["r7"](), 64, CUDA).sound
        assert drawn == list(range(1, sound + 1))
        return
    with pytest.raises(WrongKernels, match="off by"):
        self_check.require_sound(OPERATORS["r7"](), 64, CUDA)
    assert drawn == [1, 2, 3]


def test_shipped_configurations_serve_modules_that_were_imported_before(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.something", ModuleType("fla.something"))
    monkeypatch.setattr(fla_library, "installed", lambda name: True)
    monkeypatch.setattr(fla_library, "DEFERRED", ())
    installed = []
    monkeypatch.setattr(tuned, "install", lambda: installed.append(True))
    assert fla_library.load("fla.something") is sys.modules["fla.something"]
    assert installed


def test_a_kernel_that_does_not_run_makes_the_candidate_invalid(hopper, monkeypatch):
    def broken(*args, **draw):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(self_check, "agreement", broken)
    with pytest.raises(WrongKernels, match=r"do not run: RuntimeError: no kernel image$"):
        prepared(model_of(head_dim=16))


def test_sizes_beyond_the_shared_memory_are_told_as_such(hopper, monkeypatch):
    class OutOfResources(Exception):
        """Triton's."""

        required, limit, name = 300000, 232448, "shared memory"

    def too_large(*args, **draw):
        raise OutOfResources

    monkeypatch.setattr(self_check, "agreement", too_large)
    with pytest.raises(
        InvalidArchitecture, match="at width 64 need 300000 of shared memory, and this GPU has 232448"
    ) as error:
        prepared(model_of(head_dim=16))
    assert "smaller head_dim" in error.value.remedy


def test_out_of_memory_in_a_check_is_out_of_memory(hopper, monkeypatch):
    def full(*args, **draw):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(self_check, "agreement", full)
    with pytest.raises(torch.OutOfMemoryError):
        prepared(model_of(head_dim=16))


def test_agreement_names_the_worst():
    found = Agreement({"output": 0.01, "input": math.nan, "b_proj.weight": 0.5})
    assert found.worst == "input"
    assert not found.sound
    assert Agreement({"output": 0.01}).sound


def test_mamba_without_its_extension_is_refused_by_name(hopper, monkeypatch):
    model = build_model(make_architecture(hidden_size=64, vocab_size=32, operators="m"))
    monkeypatch.setattr("archsearch.model.requirements.installed", lambda name: name == "mamba_ssm")
    with pytest.raises(EnvironmentUnfit, match=r"operator m .* selective_scan_cuda cannot be imported") as error:
        prepared(model)
    assert "choose m2" in error.value.remedy
    assert model.paths() == {"m": "torch"}
    monkeypatch.setattr("archsearch.model.requirements.installed", lambda name: True)
    assert prepared(model).paths() == {"m": "mamba-ssm selective_scan_cuda"}


def test_kernels_are_imported_without_torch_compiler():
    code = """
import sys, torch
from archsearch.model.fla_library import load
disable = torch.compiler.disable
for name in ("gla", "delta_rule", "gated_delta_rule", "kda", "rwkv7"):
    load(f"fla.ops.{name}.chunk")
assert torch.compiler.disable is disable
print(sorted({"fla.layers", "torch._dynamo", "torch.distributed.tensor", "sympy"} & set(sys.modules)))
"""
    pytest.importorskip("fla")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_compiler_leaves_a_marked_function_alone_all_the_same():
    compiling = []

    @fla_library._left_alone(recursive=False)
    def marked(x):
        """What it does."""
        compiling.append(torch.compiler.is_compiling())
        return 2 * x

    assert marked.__doc__ == "What it does."
    compiled = torch.compile(lambda x: marked(x + 1) - 1, backend="eager")
    for value in (1.0, 2.0):
        assert compiled(torch.tensor(value)) == 2 * value + 1
    assert compiling == [False, False]
