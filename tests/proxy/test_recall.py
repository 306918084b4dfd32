"""Associative recall: the task, and that a network's error is measured as the architecture's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from archsearch.architecture import make_architecture
from archsearch.config import ProxyConfig, RecallConfig
from archsearch.proxy import recall
from archsearch.proxy.recall import FILLER, IGNORED, measure_recall, sequences
from archsearch.proxy.result import NonFiniteLoss

TINY = {"context": 16, "pairs": [1, 2], "vocab_size": 8, "tokens": 1024, "batch": 8, "test_sequences": 16}
MODEL = make_architecture(hidden_size=32, vocab_size=256, operators="a a", options={"a": {"head_dim": 16}})


def config(**changes: object) -> ProxyConfig:
    return ProxyConfig.model_validate({"recall": {**TINY, **changes}})


@pytest.mark.parametrize(("pairs", "context", "vocab"), [(1, 8, 8), (3, 12, 8), (16, 64, 64), (64, 256, 512)])
def test_every_query_has_the_value_that_its_key_had(pairs: int, context: int, vocab: int) -> None:
    tokens, targets = sequences(np.random.default_rng(0), 20, pairs, context=context, vocab_size=vocab)
    assert tokens.shape == targets.shape == (20, context)
    for row, wanted in zip(tokens, targets, strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < key < vocab // 2 <= value < vocab for key, value in zip(keys, values, strict=True))
        asked = np.flatnonzero(wanted != IGNORED)
        assert asked.min() >= 2 * pairs
        told = dict(zip(keys, values, strict=True))
        assert {row[place]: wanted[place] for place in asked} == told
        rest = np.setdiff1d(np.arange(2 * pairs, context), asked)
        assert (row[rest] == FILLER).all()


def test_most_queries_come_soon() -> None:
    _, targets = sequences(np.random.default_rng(0), 400, 2, context=256, vocab_size=64)
    gaps = (np.nonzero(targets != IGNORED)[1] - 4) // 2
    assert np.median(gaps) < 30
    assert gaps.max() > 100


def test_a_network_is_trained_and_tested_on_every_number_of_pairs() -> None:
    found = measure_recall(MODEL, config(), seed=1, device="cpu")
    assert set(found.accuracy) == {1, 2}
    assert found.error == pytest.approx(1 - np.mean(list(found.accuracy.values())))
    assert [tokens for tokens, _ in found.curve] == [128 * n for n in range(1, 9)]
    assert found.curve[-1][1] == found.error
    assert found.tokens == 1024
    summary = found.summary()
    assert summary["accuracy"] == {"1": found.accuracy[1], "2": found.accuracy[2]}
    again = measure_recall(MODEL.model_copy(update={"vocab_size": 32768}), config(), seed=1, device="cpu")
    assert again == found


def test_training_ends_where_all_is_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_test", lambda *arguments: {1: 1.0, 2: 0.999})
    found = measure_recall(MODEL, config(), seed=1, device="cpu")
    assert found.tokens == 128
    assert len(found.curve) == 1


def test_seeds_are_averaged() -> None:
    one, two = (measure_recall(MODEL, config(), seed=seed, device="cpu") for seed in (3, 4))
    both = measure_recall(MODEL, config(seeds=2), seed=3, device="cpu")
    assert both.errors == (one.error, two.error)
    assert both.error == pytest.approx((one.error + two.error) / 2)
    assert both.curve == one.curve


def test_attention_learns_what_a_copy_of_it_without_layers_to_look_back_cannot() -> None:
    task = {"context": 12, "pairs": [2], "vocab_size": 8, "tokens": "150K", "batch": 32, "test_sequences": 256}
    task["learning_rate"] = 1e-2
    looking = measure_recall(MODEL, config(**task), seed=0, device="cpu")
    ffn = make_architecture(hidden_size=32, vocab_size=256, operators="f f", options={"f": {"multiple_of": 32}})
    blind = measure_recall(ffn, config(**task), seed=0, device="cpu")
    assert blind.error > 0.6
    assert looking.error < blind.error - 0.2


def test_attention_recalls_all_at_the_default_rate_within_a_short_training() -> None:
    task = {"context": 24, "pairs": [2, 4], "vocab_size": 16, "tokens": "800K", "batch": 32}
    options = {"a": {"head_dim": 16, "qk_norm": True}}
    model = make_architecture(hidden_size=32, vocab_size=256, operators="a a", options=options)
    assert measure_recall(model, config(**task), seed=0, device="cpu").error < 0.05


def test_divergence_is_told_with_its_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_loss", lambda model, *rest: model.norm.weight.sum() * torch.nan)
    with pytest.raises(NonFiniteLoss):
        measure_recall(MODEL, config(), seed=1, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": [5]}, "need a context of 20"),
        ({"pairs": [4]}, "need a vocab_size above 8"),
        ({"pairs": [0, 2]}, "positive and different"),
        ({"pairs": [2, 2]}, "positive and different"),
        ({"pairs": []}, "at least 1 item"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"pears": [1]}, "did you mean 'pairs'"),
    ],
)
def test_tasks_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecallConfig.model_validate({**TINY, **changes})
