from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from archsearch import worker
from archsearch.architecture import Architecture, make_architecture
from archsearch.config import ExecutionConfig, LatencyConfig, ProxyConfig, RunConfig, SearchConfig
from archsearch.errors import ConfigError, StorageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.latency import decode
from archsearch.model.hybrid import build_model
from archsearch.model.layers.ffn import FFN
from archsearch.proxy import step, trainer
from archsearch.proxy.loss import token_loss
from archsearch.record import classify
from archsearch.space import SearchSpace
from archsearch.worker import ProxyEvaluator, save_weights

CANDIDATE = make_architecture(
    hidden_size=32, vocab_size=256, operators="a f", options={"a": {"head_dim": 16}, "f": {"multiple_of": 32}}
)
SPACE = {
    "name": "test",
    "hidden_size": 32,
    "vocab_size": 256,
    "stages": [{"name": "only", "pattern": ["a f"], "blocks": [1, 2]}],
    "options": {"a": {"head_dim": 16}, "f": {"multiple_of": 32}},
}


def config_of(limits: dict[str, object] | None = None, **parts: object) -> RunConfig:
    fields = {
        "space": SearchSpace.model_validate({**SPACE, "limits": limits or {}}),
        "proxy": ProxyConfig(tokens=1024, batch=4, context=64, validation_tokens=512, validations=2),
        "latency": LatencyConfig(tokens=32, strata=2, steps=4, repeats=1),
        "execution": ExecutionConfig(device="cpu"),
    }
    return RunConfig(**{**fields, **parts})


def evaluate(config: RunConfig, weights: Path | None = None) -> Evaluation:
    evaluator = pickle.loads(pickle.dumps(ProxyEvaluator(config, str(weights) if weights else None)))
    return evaluator(CANDIDATE, seed=5)


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(worker, name, lambda *arguments: pytest.fail(f"{name} ran"))


def test_evaluation_is_complete(tmp_path: Path) -> None:
    objectives = ("loss", "decode_latency", "state_bytes")
    found = evaluate(config_of(search=SearchConfig(objectives=objectives)), tmp_path)
    assert found.ok, found.error
    assert tuple(found.objectives) == objectives
    assert found.objectives["loss"] == found.curve[-1][1] < 5.6
    assert found.objectives["decode_latency"] > 0
    assert found.objectives["state_bytes"] == CANDIDATE.state_bytes(8192)
    assert [tokens for tokens, _ in found.curve] == [512, 1024]
    phases = "import prepare wait latency data build kernels train validate save idle other"
    assert set(found.seconds) == set(phases.split())
    assert min(found.seconds.values()) >= 0
    assert found.paths == {"decode": "torch step", "step": "eager", "loss": "torch", "a": "torch", "f": "torch"}
    assert found.metrics["notation"] == "a f"
    assert found.metrics["parameters"] == CANDIDATE.parameters
    assert found.metrics["proxy_tokens"] == 1024
    assert found.metrics["tpot_ms"] == pytest.approx(1e3 * found.objectives["decode_latency"] / 32)
    assert found.device
    assert (found.seed, found.architecture) == (5, CANDIDATE)
    assert Evaluation.model_validate_json(found.model_dump_json()) == found


def test_weights_are_those_that_were_trained(tmp_path: Path) -> None:
    found = evaluate(config_of(search=SearchConfig(objectives=("loss",))), tmp_path)
    path = tmp_path / f"{CANDIDATE.id}.safetensors"
    assert os.listdir(tmp_path) == [path.name]
    model = build_model(CANDIDATE, seed=99)
    model.load_state_dict(load_file(path))
    config = config_of().proxy
    again = trainer.train_proxy(CANDIDATE, config, seed=5, device="cpu")
    assert again.loss == found.objectives["loss"]
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.model.parameters(), strict=True))
    with safe_open(path, "pt") as file:
        assert Architecture.model_validate(json.loads(file.metadata()["architecture"])) == CANDIDATE


def test_failed_write_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(build_model(CANDIDATE), path)
    old = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="No space"):
        save_weights(build_model(CANDIDATE, seed=1), path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == old


def test_only_what_is_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "_measure")
    forbid(monkeypatch, "_train")
    found = evaluate(config_of(search=SearchConfig(objectives=("parameters", "state_bytes"))))
    assert found.objectives == {"parameters": CANDIDATE.parameters, "state_bytes": CANDIDATE.state_bytes(8192)}


def test_latency_above_the_ceiling_is_infeasible_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "_train")
    found = evaluate(config_of({"decode_latency": 1e-9}, search=SearchConfig(objectives=("loss",))))
    assert found.outcome is Outcome.INFEASIBLE
    assert "above the limit 1e-09 s" in found.error
    assert found.objectives == {}
    assert found.metrics["tpot_ms"] > 0
    assert "train" not in found.seconds
    assert found.seconds["latency"] > 0


def fail_in_layer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    def forward(self: FFN, x: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(FFN, "forward", forward)
    return evaluate(config_of())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError("no memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_out_of_memory(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fail_in_layer(error, monkeypatch)
    assert found.outcome is Outcome.OOM
    assert str(error) in found.error
    assert found.objectives == {}


def test_real_allocation_failure_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**58)
    assert classify(failure.value) is Outcome.OOM


def test_model_that_cannot_fit_is_out_of_memory() -> None:
    found = evaluate(config_of(latency=LatencyConfig(tokens=10**9, batch=10**6)))
    assert found.outcome is Outcome.OOM
    assert found.error.startswith("DoesNotFit: decoding 1000000000 tokens")


def test_seconds_are_complete_and_idle_time_is_counted() -> None:
    evaluate(config_of())
    time.sleep(0.2)
    begin = time.time()
    found = evaluate(config_of())
    took = time.time() - begin
    assert 0.2 <= found.seconds["idle"] < 1
    assert sum(found.seconds.values()) - found.seconds["idle"] == pytest.approx(took, abs=0.1)


def test_training_that_diverges_keeps_its_curve_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(100))

    def poisoned(*inputs: torch.Tensor) -> torch.Tensor:
        late = torch.is_grad_enabled() and next(steps) >= 2
        return token_loss(*inputs) * (float("nan") if late else 1)

    monkeypatch.setattr(step, "token_loss", poisoned)
    found = evaluate(config_of(search=SearchConfig(objectives=("loss",))))
    assert found.outcome is Outcome.NAN
    assert [tokens for tokens, _ in found.curve] == [512]
    assert found.seconds["train"] > 0
    assert found.objectives == {}


def test_divergence_keeps_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = ((512, 4.5),)

    def diverge(*arguments: object, **keywords: object) -> None:
        raise trainer.NonFiniteLoss(768, curve)

    monkeypatch.setattr(trainer, "train_proxy", diverge)
    found = evaluate(config_of())
    assert found.outcome is Outcome.NAN
    assert found.curve == curve
    assert found.error == "NonFiniteLoss: the loss is not finite after 768 tokens; lower proxy.learning_rate"


def test_steps_that_disagree_with_the_forward_pass_are_an_invalid_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FFN, "step", lambda self, x, state, position: 3 * x)
    forbid(monkeypatch, "_train")
    found = evaluate(config_of())
    assert found.outcome is Outcome.INVALID_MEASUREMENT
    assert "other logits than the reference" in found.error


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), RuntimeError("CUDA error: an illegal memory access was encountered")],
    ids=["bug", "cuda"],
)
def test_anything_else_is_a_crash_with_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_release_memory", lambda: pytest.fail("a broken CUDA context was touched"))
    found = fail_in_layer(error, monkeypatch)
    assert found.outcome is Outcome.CRASH
    assert found.error.startswith("Traceback")
    assert found.error.endswith(f"{type(error).__name__}: {error}")


def test_missing_data_names_cause_and_remedy() -> None:
    proxy = config_of().proxy.model_copy(update={"data": "/nowhere"})
    found = evaluate(config_of(proxy=proxy, search=SearchConfig(objectives=("loss",))))
    assert found.outcome is Outcome.CRASH
    assert found.error.startswith("ConfigError: proxy.data: /nowhere does not exist; give ")
    assert classify(ConfigError("a", "b")) is Outcome.CRASH


def test_interrupt_is_not_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "measure_decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config_of())


def run_python(code: str, **environment: str) -> str:
    keep = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], env=keep | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_torch() -> None:
    assert run_python("import sys, archsearch.worker, archsearch.proxy.data; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(("environment", "threads"), [({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_cpu_worker_uses_one_thread_unless_told(environment: dict[str, str], threads: str) -> None:
    code = "import torch, archsearch.worker as w; w.prepare_device('cpu'); print(torch.get_num_threads())"
    assert run_python(code, **environment) == threads


def test_too_many_epochs_are_said_before_the_search(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text").write_text("a line of text\n" * 2000)
    proxy = config_of().proxy.model_copy(update={"data": str(tmp_path / "text"), "tokens": 10**6})
    config = config_of(proxy=proxy, search=SearchConfig(objectives=("loss",)))
    worker.prepare_data(config)
    assert "proxy.tokens is 35.1 epochs of its 28,501 training tokens" in caplog.text
    with pytest.raises(ConfigError, match="does not exist"):
        worker.prepare_data(config_of(proxy=proxy.model_copy(update={"data": str(tmp_path / "none")})))


def test_data_is_not_looked_at_where_nobody_trains_here(tmp_path: Path) -> None:
    proxy = config_of().proxy.model_copy(update={"data": str(tmp_path / "none")})
    worker.prepare_data(config_of(proxy=proxy, search=SearchConfig(objectives=("parameters",))))
    worker.prepare_data(config_of(proxy=proxy, execution=ExecutionConfig(address="somewhere:6379")))
