from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from archsearch.architecture import Architecture, make_architecture
from archsearch.config import ProxyConfig
from archsearch.errors import ConfigError
from archsearch.model.hybrid import HybridLM, build_model
from archsearch.proxy import step, trainer
from archsearch.proxy.loss import token_loss
from archsearch.proxy.result import NonFiniteLoss
from archsearch.proxy.trainer import train_proxy

TINY = make_architecture(
    hidden_size=32,
    vocab_size=256,
    operators="a f gd",
    options={"a": {"head_dim": 16}, "gd": {"head_dim": 16}, "f": {"multiple_of": 32}},
)
QUICK = ProxyConfig(tokens=40 * 512, batch=8, context=64, learning_rate=1e-2, validation_tokens=2048, validations=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_learns_text() -> None:
    seen: list[tuple[int, float]] = []
    result = train_proxy(TINY, QUICK, seed=0, device="cpu", on_progress=lambda *point: seen.append(point))
    assert [tokens for tokens, _ in result.curve] == [5120, 10240, 15360, 20480]
    assert result.loss == result.curve[-1][1]
    assert result.loss < 3.4 < math.log(256) - 2
    assert result.curve[0][1] > result.loss
    assert seen[0][1] == pytest.approx(math.log(256), abs=0.2)
    assert len(seen) == 40
    assert seen[-1][0] == result.tokens == 20480
    assert set(result.seconds) == {"data", "build", "kernels", "train", "validate"}
    assert result.paths == {"step": "eager", **dict.fromkeys(["loss", "a", "f", "gd"], "torch")}
    assert result.dtype == "float32"
    assert not result.model.training


@pytest.mark.parametrize("threads", [1, 2])
def test_same_seed_gives_the_same_loss_to_the_last_bit(threads: int) -> None:
    torch.set_num_threads(threads)
    config = QUICK.model_copy(update={"tokens": 3 * 128, "batch": 2, "validations": 1})
    first, second = (train_proxy(TINY, config, seed=7, device="cpu") for _ in range(2))
    assert first.curve == second.curve
    weights = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert train_proxy(TINY, config, seed=8, device="cpu").loss != first.loss


def test_loss_that_is_not_finite_stops_and_keeps_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def poisoned(model: HybridLM, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = token_loss(model, hidden, targets)
        return loss * float("nan") if torch.is_grad_enabled() and next(calls) == 15 else loss

    monkeypatch.setattr(step, "token_loss", poisoned)
    with pytest.raises(NonFiniteLoss, match="after 8192 tokens") as failure:
        train_proxy(TINY, QUICK, seed=0, device="cpu")
    assert [tokens for tokens, _ in failure.value.curve] == [5120]
    copy = pickle.loads(pickle.dumps(failure.value))
    assert (copy.tokens, copy.curve, copy.cause) == (8192, failure.value.curve, failure.value.cause)


def test_weights_that_blow_up_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: torch.optim.AdamW, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1e30)

    monkeypatch.setattr(torch.optim.AdamW, "step", explode)
    with pytest.raises(NonFiniteLoss):
        train_proxy(TINY, QUICK, seed=0, device="cpu")


def test_validation_that_is_not_finite_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer._Training, "validation_loss", lambda self: float("inf"))
    with pytest.raises(NonFiniteLoss, match="after 5120 tokens"):
        train_proxy(TINY, QUICK, seed=0, device="cpu")


def test_budget_below_a_step_trains_one() -> None:
    config = QUICK.model_copy(update={"tokens": 1})
    result = train_proxy(TINY, config, seed=0, device="cpu")
    assert result.tokens == 512
    assert len(result.curve) == 1


def test_more_tokens_than_text_go_round(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"ab\n" * 700)
    untied = Architecture.model_validate({**TINY.to_dict(), "tie_embeddings": False})
    config = QUICK.model_copy(update={"data": str(path)})
    result = train_proxy(untied, config, seed=0, device="cpu")
    assert result.tokens == 20480
    assert result.loss < 0.5


def test_bfloat16_trains_with_fp32_weights() -> None:
    config = QUICK.model_copy(update={"dtype": "bfloat16", "tokens": 10 * 512})
    result = train_proxy(TINY, config, seed=0, device="cpu")
    assert result.dtype == "bfloat16"
    assert result.loss < 5
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


def test_small_vocabulary_is_refused() -> None:
    small = Architecture.model_validate({**TINY.to_dict(), "vocab_size": 100})
    with pytest.raises(ConfigError, match="vocab_size 100"):
        train_proxy(small, QUICK, seed=0, device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_loss_in_pieces_equals_the_whole(tied: bool) -> None:
    model = build_model(Architecture.model_validate({**TINY.to_dict(), "tie_embeddings": tied}))
    tokens = torch.randint(256, (3, 21), generator=torch.Generator().manual_seed(0))
    gradients = []
    for most in (2**20, 7 * 256, 1):
        model.zero_grad()
        loss = token_loss(model, model.hidden(tokens[:, :-1]), tokens[:, 1:], max_logits=most)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        whole = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(loss, whole)
    for pieces in gradients[1:]:
        torch.testing.assert_close(pieces, gradients[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_trains_in_bfloat16_and_catches_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    result = train_proxy(TINY, QUICK, seed=0, device="cuda")
    assert result.dtype == "bfloat16"
    assert result.loss < 3.4
    monkeypatch.setattr(step, "token_loss", lambda *inputs: token_loss(*inputs) * float("nan"))
    with pytest.raises(NonFiniteLoss):
        train_proxy(TINY, QUICK, seed=0, device="cuda")
