"""An exported model speaks with the tokenizer that it was trained with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from archsearch.architecture import Architecture, make_architecture
from archsearch.config import ProxyConfig, SearchConfig, load_config
from archsearch.evaluation import Evaluation, Outcome
from archsearch.export import export_candidate
from archsearch.proxy.data import load_corpus
from archsearch.proxy.tokenizer import SubwordTokenizer, train_bpe
from archsearch.worker import ProxyEvaluator
from tests.kits.runs import TINY

EXAMPLE = Path(__file__).parents[2] / "examples" / "generate.py"
TEXTS = ["", "def f(x):\n\treturn  x\r\n", "naïve £ 𝄞 漢字", " <|endoftext| > x", "the dull story " * 3]


@pytest.fixture
def story(tmp_path: Path) -> Path:
    folder = tmp_path / "story"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"chapter {number}: the dull story goes on and on, 漢字 and all\n" * 60)
    return folder


def small(vocab_size: int) -> Architecture:
    options = {"f": {"multiple_of": 8}}
    return make_architecture(hidden_size=16, vocab_size=vocab_size, operators="f", options=options)


def exported(tmp_path: Path, proxy: ProxyConfig, vocab_size: int) -> Path:
    """Evaluate one candidate as a worker does, then export it."""
    config = load_config(TINY).model_copy(update={"proxy": proxy, "search": SearchConfig(objectives=("loss",))})
    architecture = small(vocab_size)
    weights = tmp_path / "weights"
    weights.mkdir()
    evaluation = ProxyEvaluator(config, str(weights))(architecture, seed=1)
    assert evaluation.outcome is Outcome.OK, evaluation.error
    path = weights / f"{architecture.id}.safetensors"
    return export_candidate(evaluation, tmp_path / "model", number=0, proxy=proxy, weights=path)


def quick(data: str, **settings: str) -> ProxyConfig:
    sizes = {"tokens": 512, "batch": 2, "context": 32, "validation_tokens": 128, "validations": 1}
    return ProxyConfig(data=data, **sizes, **settings)  # type: ignore[arg-type]


def generate(folder: Path) -> str:
    command = [sys.executable, str(EXAMPLE), str(folder), "the dull"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_bpe_travels_with_the_model(tmp_path: Path, story: Path) -> None:
    proxy = quick(str(story), tokenizer="bpe")
    folder = exported(tmp_path, proxy, 320)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = load_corpus(proxy, 320)
    assert isinstance(corpus.tokenizer, SubwordTokenizer)
    for text in TEXTS:
        (wanted,) = corpus.tokenizer.encode([text.encode()])
        assert tokenizer(text)["input_ids"] == wanted.tolist()
        assert tokenizer.decode(wanted) == text
    assert tokenizer.eos_token_id == corpus.tokenizer.end == 0
    assert "has 320 tokens" in (folder / "README.md").read_text()
    assert generate(folder).startswith("the dull")


def test_the_kept_tokenizer_wins_over_changed_data(tmp_path: Path, story: Path) -> None:
    proxy = quick(str(story), tokenizer="bpe")
    (tmp_path / "weights").mkdir()
    kept = train_bpe([b"quite another text " * 50], 280)
    kept.save(tmp_path / "weights")
    evaluation = Evaluation(
        architecture=small(320),
        outcome=Outcome.OK,
        objectives={},
        seed=1,
    )
    path = tmp_path / "weights" / f"{evaluation.architecture.id}.safetensors"
    folder = export_candidate(evaluation, tmp_path / "model", number=0, proxy=proxy, weights=path)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == kept.tokenizer.get_vocab()


def test_tokens_of_unknown_origin_bring_no_tokenizer(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(300, size=5000).astype("<u2").tofile(tmp_path / "train.bin")
    folder = exported(tmp_path, quick(f"tokens:{tmp_path / 'train.bin'}"), 300)
    assert not list(folder.glob("*token*"))
    assert "bring your own" in (folder / "README.md").read_text()


def test_bits_a_byte_are_recorded(tmp_path: Path, story: Path) -> None:
    folder = exported(tmp_path, quick(str(story), tokenizer="bpe"), 320)
    record = Evaluation.model_validate_json((folder / "evaluation.json").read_text())
    corpus = load_corpus(quick(str(story), tokenizer="bpe"), 320)
    assert corpus.bytes_per_token is not None
    bits = record.objectives["loss"] / np.log(2) / corpus.bytes_per_token
    assert record.metrics["bits_per_byte"] == pytest.approx(bits)
    assert record.metrics["corpus"] == corpus.digest
    assert 0 < bits < 8
