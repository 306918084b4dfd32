from __future__ import annotations

from pathlib import Path

import pytest
import torch

from archsearch.architecture import make_architecture
from archsearch.config import ProxyConfig
from archsearch.errors import StorageError
from archsearch.proxy import checkpoint as module
from archsearch.proxy.checkpoint import Progress, UnfitCheckpoint, load_checkpoint, save_checkpoint
from archsearch.proxy.result import ProxyResult
from archsearch.proxy.trainer import train_proxy

TINY = make_architecture(
    hidden_size=32,
    vocab_size=256,
    operators="a f gd",
    options={"a": {"head_dim": 16}, "gd": {"head_dim": 16}, "f": {"multiple_of": 32}},
)
CONFIG = ProxyConfig(tokens=12 * 128, batch=2, context=64, learning_rate=1e-2, validation_tokens=512, validations=2)
RUNGS = (3 * 128, 8 * 128)


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(checkpoint: Path | None = None, **changes: object) -> ProxyResult:
    return train_proxy(TINY, CONFIG, seed=1, device="cpu", rungs=RUNGS, checkpoint=checkpoint, **changes)


def test_rungs_are_validated_and_asked() -> None:
    asked: list[tuple[int, float]] = []

    def keep_going(tokens: int, loss: float) -> bool:
        asked.append((tokens, loss))
        return True

    found = train_proxy(TINY, CONFIG, seed=1, device="cpu", rungs=(*RUNGS, CONFIG.tokens, 10**9), keep_going=keep_going)
    assert [tokens for tokens, _ in found.curve] == [384, 768, 1024, 1536]
    assert asked == [found.curve[0], found.curve[2]]
    assert (found.stopped, found.resumed) == (None, 0)
    plain = train_proxy(TINY, CONFIG, seed=1, device="cpu")
    assert plain.curve == tuple(point for point in found.curve if point[0] in (768, 1536))


def test_rung_between_steps_is_reached_by_the_next_one() -> None:
    found = train_proxy(TINY, CONFIG, seed=1, device="cpu", rungs=(300,), keep_going=lambda tokens, loss: tokens != 300)
    assert found.stopped == 300
    assert found.tokens == 384


def test_stopped_training_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "candidate.safetensors"
    whole = train()
    for rung in RUNGS:
        part = train(path, keep_going=lambda tokens, loss, rung=rung: tokens != rung)
        assert part.stopped == part.tokens == rung
        assert part.curve == tuple(point for point in whole.curve if point[0] <= rung)
    rest = train(path)
    assert rest.resumed == RUNGS[1]
    assert (rest.curve, rest.tokens, rest.stopped) == (whole.curve, whole.tokens, None)
    assert all(torch.equal(*pair) for pair in zip(rest.model.parameters(), whole.model.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == [path]


def test_resumed_training_is_asked_at_its_rung_again(tmp_path: Path) -> None:
    path = tmp_path / "candidate.safetensors"
    asked: list[int] = []
    train(path, keep_going=lambda tokens, loss: False)
    again = train(path, keep_going=lambda tokens, loss: bool(asked.append(tokens)))
    assert asked == [RUNGS[0]]
    assert (again.stopped, again.tokens_per_second) == (RUNGS[0], 0.0)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 2}, "seed is 1 there, 2 here"),
        ({"config": CONFIG.model_copy(update={"learning_rate": 0.5})}, "proxy.learning_rate is 0.01 there, 0.5 here"),
        ({"architecture": TINY.model_copy(update={"meta_tokens": 2})}, "architecture.meta_tokens is 0 there, 2 here"),
    ],
    ids=["seed", "recipe", "architecture"],
)
def test_another_training_is_refused(tmp_path: Path, change: dict[str, object], difference: str) -> None:
    path = tmp_path / "candidate.safetensors"
    train(path)
    before = path.read_bytes()
    request = {"architecture": TINY, "config": CONFIG, "seed": 1, "device": "cpu", "checkpoint": path, **change}
    with pytest.raises(UnfitCheckpoint, match=difference):
        train_proxy(**request)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "truncated"])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "candidate.safetensors"
    train(path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UnfitCheckpoint, match="no readable checkpoint"):
        train(path)


def test_nothing_is_half_loaded(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_checkpoint(path, {"a": torch.ones(2), "b": torch.ones(3)}, {"seed": 1}, Progress(1, ()))
    tensors = {"a": torch.zeros(2), "b": torch.zeros(4)}
    with pytest.raises(UnfitCheckpoint, match="b has another shape"):
        load_checkpoint(path, tensors, {"seed": 1})
    assert float(tensors["a"].sum()) == 0
    with pytest.raises(UnfitCheckpoint, match="other tensors"):
        load_checkpoint(path, {"a": torch.zeros(2)}, {"seed": 1})


def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "candidate.safetensors"
    train(path, keep_going=lambda tokens, loss: False)
    before = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(StorageError, match="No space"):
        train(path)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])
