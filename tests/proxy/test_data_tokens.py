"""Arrays of tokens as other tools write them: read, split, or refused."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from archsearch.config import ProxyConfig
from archsearch.errors import ConfigError
from archsearch.proxy.data import Corpus, load_corpus
from archsearch.proxy.token_files import LLM_C_HEADER, find_dtype, open_tokens
from archsearch.proxy.tokenizer import train_bpe

VOCABULARY = 50304


def corpus_of(path: Path | str, vocab_size: int = VOCABULARY, **settings: object) -> Corpus:
    return load_corpus(ProxyConfig(data=f"tokens:{path}", context=16, **settings), vocab_size)


def some(count: int, limit: int = 50257, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(limit, size=count)


def write_megatron(prefix: Path, documents: list[np.ndarray], code: int = 8, dtype: str = "<u2") -> None:
    """``prefix.bin`` and ``prefix.idx`` of MMapIndexedDataset: each document one sequence."""
    np.concatenate(documents).astype(dtype).tofile(prefix.with_suffix(".bin"))
    lengths = np.array([len(document) for document in documents], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype="<i8")]) * np.dtype(dtype).itemsize
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1))
        file.write(lengths.tobytes() + pointers.astype("<i8").tobytes())
        file.write(np.arange(len(documents) + 1, dtype="<i8").tobytes())


@pytest.mark.parametrize(("dtype", "limit"), [("<u2", 50257), ("<u4", 128256)])
def test_nanogpt_pair_is_used_where_it_lies(tmp_path: Path, dtype: str, limit: int) -> None:
    train, validation = some(5000, limit), some(500, limit, 1)
    train.astype(dtype).tofile(tmp_path / "train.bin")
    validation.astype(dtype).tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"never read")
    corpus = corpus_of(tmp_path, 131072 if dtype == "<u4" else VOCABULARY)
    assert corpus.train.dtype == np.dtype(dtype)
    assert np.array_equal(corpus.train, train)
    assert np.array_equal(corpus.validation, validation)
    assert corpus.tokenizer is None
    assert corpus.bytes_per_token is None
    assert sorted(path.name for path in corpus.path.iterdir()) == ["meta.json"], "nothing is copied"


def test_end_of_a_single_array_is_held_out(tmp_path: Path) -> None:
    tokens = some(10_000).astype("<u2")
    tokens.tofile(tmp_path / "corpus.bin")
    np.save(tmp_path / "corpus.npy", tokens)
    for name in ("corpus.bin", "corpus.npy"):
        corpus = corpus_of(tmp_path / name)
        assert np.array_equal(corpus.train, tokens[:9500])
        assert np.array_equal(corpus.validation, tokens[9500:])


def test_llm_c_shards_are_gathered(tmp_path: Path) -> None:
    parts = [some(3000, seed=seed) for seed in range(3)]
    for tokens, name in zip(parts, ["train_000001", "train_000002", "val_000000"], strict=True):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        (tmp_path / f"fineweb_{name}.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    corpus = corpus_of(tmp_path)
    assert np.array_equal(corpus.train, np.concatenate(parts[:2]))
    assert np.array_equal(corpus.validation, parts[2])
    path = tmp_path / "fineweb_val_000000.bin"
    assert open_tokens(path, path.name, "uint32").offset == LLM_C_HEADER
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match="cut off"):
        open_tokens(path, path.name, "auto")


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatron_documents_are_held_out_whole(tmp_path: Path, code: int, dtype: str) -> None:
    documents = [np.append(some(20 + seed, 400, seed), 499 - seed % 90) for seed in range(120)]
    write_megatron(tmp_path / "wiki_text_document", documents, code, dtype)
    corpus = corpus_of(tmp_path / "wiki_text_document")
    assert corpus.train_documents + corpus.validation_documents == 120
    assert 1 <= corpus.validation_documents <= 15
    assert corpus.train.dtype == (np.uint16 if dtype == "<u2" else np.uint32)
    ranks = {document.astype(int).tobytes(): number for number, document in enumerate(documents)}
    place = 0
    while place < len(corpus.validation):
        ends = [place + len(document) for document in documents
                if np.array_equal(corpus.validation[place : place + len(document)], document)]  # fmt: skip
        assert len(ends) == 1
        assert ranks.pop(corpus.validation[place : ends[0]].astype(int).tobytes()) >= 0
        place = ends[0]
    for suffix in (".bin", ".idx"):
        assert corpus_of((tmp_path / "wiki_text_document").with_suffix(suffix)).digest == corpus.digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda index: index[:20], "no Megatron index"),
        (lambda index: index[:-8], "no Megatron index"),
        (lambda index: b"TNTIDX\x00\x00" + index[8:], "no Megatron index"),
        (lambda index: index[:17] + b"\x07" + index[18:], "no Megatron index"),
        (lambda index: index[:34] + b"\x01\x00\x00\x00" + index[38:], "no Megatron index"),
        (lambda index: index[:34] + struct.pack("<2i", -5, 65) + index[42:], "no Megatron index"),
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, make: object, message: str) -> None:
    write_megatron(tmp_path / "text", [some(30, seed=seed) for seed in range(9)])
    index = tmp_path / "text.idx"
    index.write_bytes(make(index.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        corpus_of(tmp_path / "text")


def test_tokens_that_the_vocabulary_does_not_hold_are_refused(tmp_path: Path) -> None:
    np.array([5, 50256, 7] * 400, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(ConfigError, match=re.escape("holds token 50256, which vocab_size 32768 does not know")):
        corpus_of(tmp_path / "train.bin", 32768)
    with pytest.raises(ConfigError, match="vocab_size 131072 is larger than the 65536 ids"):
        corpus_of(tmp_path / "train.bin", 131072)
    with pytest.raises(ConfigError, match="needs text"):
        corpus_of(tmp_path / "train.bin", tokenizer="bpe")
    with pytest.raises(ConfigError, match="holds token 50256, and bytes knows only 256 ids"):
        corpus_of(tmp_path / "train.bin", tokenizer="bytes")


def test_a_tokenizer_tells_what_a_token_is_worth(tmp_path: Path) -> None:
    text = b"the quick brown fox jumps over the lazy dog. " * 400
    tokenizer = train_bpe([text], 300)
    (tmp_path / "own").mkdir()
    tokenizer.save(tmp_path / "own")
    np.array(tokenizer.encode([text])[0], "<u2").tofile(tmp_path / "train.bin")
    corpus = corpus_of(tmp_path / "train.bin", 300, tokenizer=str(tmp_path / "own"))
    whole = len(text) / len(tokenizer.encode([text])[0])
    assert corpus.bytes_per_token == pytest.approx(whole, rel=0.05)
    assert corpus.tokenizer is not None
    assert corpus.tokenizer.decode(corpus.train[:40]) in text.decode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.bin", b"", "is empty"),
        ("train.bin", b"\0dd", "no whole number of uint16 tokens"),
        ("train.bin", bytes(20), "too short"),
        ("train.npy", b"no array", "not a NumPy array"),
        ("train.txt", b"plain text of ten words is not an array here", "holds text"),
        ("train.bin", "Grüße, auch ohne Endung\n".encode() * 99, "holds text"),
        ("rows.jsonl.gz", gzip.compress(b"rows of text"), "or a container of it"),
    ],
)
def test_what_is_no_array_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        corpus_of(tmp_path / name, 20_000)


def test_arrays_of_another_kind_are_refused(tmp_path: Path) -> None:
    for array in (np.zeros((9, 9), np.uint16), np.zeros(99), np.zeros(99, ">u2"), np.array([{}])):
        np.save(tmp_path / "train.npy", array)
        with pytest.raises(ConfigError, match=r"instead of a flat array|not a NumPy array"):
            corpus_of(tmp_path / "train.npy")
    path = tmp_path / "train.npy"
    np.save(path, some(5000).astype("<u2"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="not a NumPy array"):
        corpus_of(path)
    np.save(tmp_path / "train.npy", np.array([5, -1] * 400))
    with pytest.raises(ConfigError, match="-1 is no token"):
        corpus_of(tmp_path / "train.npy")
    with pytest.raises(ConfigError, match="does not exist"):
        corpus_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=re.escape("no .bin or .npy file")):
        corpus_of(tmp_path / "empty")


@pytest.mark.parametrize("limit", [2, 65, 256, 300, 50257, 128256, 2**20])
def test_width_of_a_headerless_file_is_found(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "train.bin"
    some(4000, limit).astype("<u4").tofile(path)
    assert find_dtype(path, path.stat().st_size) == "<u4"
    if limit <= 2**16:
        some(4001, limit).astype("<u2").tofile(path)
        assert find_dtype(path, path.stat().st_size) == "<u2"


def test_given_type_wins(tmp_path: Path) -> None:
    some(4000, 60000).astype("<u4").tofile(tmp_path / "train.bin")
    assert corpus_of(tmp_path / "train.bin", 60000).train.dtype == np.uint32
    assert corpus_of(tmp_path / "train.bin", 60000, token_dtype="uint16").train.dtype == np.uint16
