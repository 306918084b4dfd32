from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from archsearch.architecture import Architecture, make_architecture
from archsearch.config import LatencyConfig
from archsearch.errors import UsageError
from archsearch.latency import decode
from archsearch.latency.decode import DecodeLatency, measure_decode
from archsearch.latency.device import DoesNotFit
from archsearch.latency.runtime import TorchRuntime
from archsearch.latency.validity import TOLERANCE, Errors, InvalidMeasurement, check_depth, check_end, check_runtime
from archsearch.model.hybrid import build_model

OPTIONS = {
    "a": {"head_dim": 16, "kv_heads": 1},
    "w": {"head_dim": 16, "window": 8},
    "d": {"head_dim": 16},
    "gd": {"head_dim": 16},
    "gl": {"head_dim": 16},
    "m2": {"head_dim": 16, "state": 16},
    "f": {"multiple_of": 32},
}
QUICK = LatencyConfig(tokens=48, strata=3, steps=4, repeats=2)


def architecture_of(operators: str, **fields: object) -> Architecture:
    options = {kind: OPTIONS[kind] for kind in set(operators.split())}
    return make_architecture(hidden_size=32, vocab_size=64, operators=operators, options=options, **fields)


EVERY_KIND = architecture_of("a f w d gd gl m2")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fields", [{}, {"meta_tokens": 5}, {"tie_embeddings": False}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kind_is_measured(fields: dict[str, object], batch: int) -> None:
    architecture = architecture_of("a f w d gd gl m2", **fields)
    config = QUICK.model_copy(update={"batch": batch})
    found = measure_decode(architecture, config, device="cpu")
    assert found.positions == (8, 24, 40)
    assert found.seconds == pytest.approx(48 / 3 * sum(found.step_ms) / 1e3)
    assert found.tpot_ms == pytest.approx(1e3 * found.seconds / 48)
    assert found.interval_ms is not None
    assert 0 < found.interval_ms[0] <= found.interval_ms[1]
    assert found.samples.count >= 3 * 3
    assert found.logits_error < 1e-4
    assert (found.batch, found.dtype, found.path, found.threads) == (batch, "float32", "torch step", 1)
    assert found.weight_bytes == architecture.weight_bytes(4)
    assert found.step_bytes == architecture.step_bytes(24, batch=batch, width=4)
    assert found.device.kind == "cpu"
    assert DecodeLatency.model_validate_json(found.model_dump_json()) == found


def test_given_weights_are_measured_as_they_are() -> None:
    model = build_model(EVERY_KIND, seed=3, dtype=torch.bfloat16)
    found = measure_decode(EVERY_KIND, QUICK, device="cpu", model=model)
    assert found.dtype == "bfloat16"
    assert 1e-5 < found.logits_error < 0.05


@pytest.mark.parametrize("config", [{"tokens": 1}, {"tokens": 2, "strata": 512}, {"steps": 1, "repeats": 1}], ids=str)
def test_smallest_settings_work(config: dict[str, int]) -> None:
    found = measure_decode(architecture_of("a f"), QUICK.model_copy(update=config), device="cpu")
    assert found.seconds > 0
    assert found.tokens == config.get("tokens", 48)


def test_too_large_model_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "build_model", lambda *arguments: pytest.fail("built"))
    config = LatencyConfig(tokens=10**9, batch=1000)
    with pytest.raises(DoesNotFit, match="decoding 1000000000 tokens at batch 1000"):
        measure_decode(architecture_of("a f"), config, device="cpu")


@pytest.mark.parametrize("position", [-1, 16])
def test_position_outside_the_cache_is_refused(position: int) -> None:
    runtime = runtime_of(TorchRuntime, architecture_of("a f", meta_tokens=2))
    runtime.seek(15)
    assert runtime.position() == 15
    with pytest.raises(UsageError, match="in a cache of 16 tokens"):
        runtime.seek(position)


# Each way to be wrong is found


def check(runtime: TorchRuntime, batch: int = 2, tokens: int = 16) -> float:
    with torch.inference_mode():
        return check_runtime(runtime, runtime.model, batch, tokens).reference


def runtime_of(kind: type[TorchRuntime], architecture: Architecture = EVERY_KIND) -> TorchRuntime:
    return kind(build_model(architecture), 2, 16)


def test_right_runtime_passes() -> None:
    assert check(runtime_of(TorchRuntime)) < 1e-4
    assert check(runtime_of(TorchRuntime, architecture_of("a m2", meta_tokens=3))) < 1e-4


@pytest.mark.parametrize("checked", [check_runtime, check_depth], ids=["start", "depth"])
def test_rounding_of_a_deep_model_is_told_from_a_fault(
    checked: Callable[..., Errors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are off by a little or by much, where the bound for shallow models allows neither."""
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 1e-5)
    model = build_model(EVERY_KIND, dtype=torch.bfloat16)

    def off(by: float) -> Errors:
        class Off(TorchRuntime):
            def step(self) -> None:
                super().step()
                self.logits[:, :16].mul_(1 + by)
                torch.argmax(self.logits, dim=-1, out=self.token)

        with torch.inference_mode():
            runtime = Off(model, 1, 16)
            return checked(runtime, model, 1, 16) if checked is check_runtime else checked(runtime, model, 16)

    errors = off(2**-8)
    assert errors.fp32 is not None
    steps, reference = errors.fp32["logits"]
    assert errors.reference > 1e-5
    assert 0 < steps <= 1.5 * reference
    with pytest.raises(InvalidMeasurement, match=r"off fp32 logits .* \(the reference"):
        off(0.5)


def test_stale_buffer_is_found() -> None:
    class Stale(TorchRuntime):
        def feed(self, token: torch.Tensor) -> None:
            pass

    with pytest.raises(InvalidMeasurement, match="other logits than the reference"):
        check(runtime_of(Stale))


def test_wrong_position_is_found() -> None:
    class Shifted(TorchRuntime):
        def step(self) -> None:
            self.state.position.add_(2)
            super().step()
            self.state.position.sub_(2)

    with pytest.raises(InvalidMeasurement, match="other logits than the reference"):
        check(runtime_of(Shifted))


@pytest.mark.parametrize("kind", ["a", "w"])
def test_step_that_reads_the_tail_of_a_cache_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention

    def careless(*args: object, attn_mask: object = None, **options: object) -> torch.Tensor:
        return attend(*args, **options)

    runtime = runtime_of(TorchRuntime, architecture_of(f"{kind} f"))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", careless)
    with pytest.raises(InvalidMeasurement, match="other logits than the reference"):
        check(runtime)


@pytest.mark.parametrize("kind", ["a", "w", "d", "gd", "gl", "m2"])
def test_state_that_is_not_emptied_is_found(kind: str) -> None:
    class Dirty(TorchRuntime):
        def begin(self) -> None:
            self.state.zero_()
            for layer in self.state.layers:
                for buffer in layer.values():
                    buffer.fill_(1.0)
            self.state.position.fill_(2)

    with pytest.raises(InvalidMeasurement):
        check(runtime_of(Dirty, architecture_of(f"{kind} f")))


def test_lost_step_is_found() -> None:
    class Forgetful(TorchRuntime):
        def step(self) -> None:
            super().step()
            self.state.position.fill_(1)

    with pytest.raises(InvalidMeasurement, match="after 2 tokens the device"):
        check(runtime_of(Forgetful))


def test_token_that_is_not_fed_back_is_found() -> None:
    class Deaf(TorchRuntime):
        def step(self) -> None:
            super().step()
            self.token.fill_(63)

    with pytest.raises(InvalidMeasurement, match="does not feed its token back"):
        check(runtime_of(Deaf))


def test_logits_that_are_not_finite_are_found() -> None:
    model = build_model(EVERY_KIND)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(InvalidMeasurement, match="relative error of logits nan"):
        measure_decode(EVERY_KIND, QUICK, device="cpu", model=model)


def test_poisoned_cache_is_found_at_the_end() -> None:
    runtime = runtime_of(TorchRuntime, architecture_of("d f"))
    check(runtime)
    for buffer in runtime.state.layers[0].values():
        buffer.fill_(float("nan"))
    runtime.step()
    with pytest.raises(InvalidMeasurement, match="NaN or infinity"):
        check_end(runtime)


def test_step_that_does_not_advance_while_timed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    class Stuck(TorchRuntime):
        def step(self) -> None:
            super().step()
            if next(calls) >= 20:
                self.state.position.sub_(1)

    monkeypatch.setattr(decode, "make_runtime", Stuck)
    with pytest.raises(InvalidMeasurement, match="counts"):
        measure_decode(architecture_of("a f"), QUICK, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("batch", "kernels"), [(1, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"meta_tokens": 5}], ids=str)
def test_gpu_is_measured_through_a_graph(fields: dict[str, object], batch: int, kernels: int) -> None:
    architecture = architecture_of("a f w d gd gl m2", **fields)
    found = measure_decode(architecture, QUICK.model_copy(update={"batch": batch, "others": "note"}), device="cuda")
    assert found.dtype == "bfloat16"
    assert found.path != "torch step"
    assert found.seconds > 0
    assert found.device.kind == "cuda"
    assert len(found.device.uuid_hash) == 12
    assert len(found.gpu) >= 3 or found.notes
    assert len(found.canary_ms) == 2
    assert found.kernels["a"] == kernels  # of several sequences the norm is a kernel of its own
    assert found.peak_bytes > found.weight_bytes
