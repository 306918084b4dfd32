"""Tokenizers: bytes, trained, from files; what does not match is refused before anything is tokenised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from archsearch.config import ProxyConfig
from archsearch.errors import ConfigError
from archsearch.proxy.corpus import token_dtype
from archsearch.proxy.data import Corpus, load_corpus
from archsearch.proxy.tokenizer import END_OF_TEXT, ByteTokenizer, SubwordTokenizer, find_tokenizer, train_bpe

TEXT = b"the dull story goes on, and on, and on; 12345 times\n" * 50


def write_story(folder: Path, count: int = 60) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_bytes(b"chapter %d\n" % number + TEXT)
    return folder


def corpus_of(path: Path, tokenizer: str, vocab_size: int = 512) -> Corpus:
    return load_corpus(ProxyConfig(data=str(path), tokenizer=tokenizer, context=16), vocab_size)


def test_the_same_texts_give_the_same_bpe() -> None:
    texts = [TEXT, "naïve 漢字 £\r\n\t".encode() * 9, b"\xff\xfe broken"]
    first, second = train_bpe(texts, 400), train_bpe(iter(texts), 400)
    assert first.digest == second.digest
    assert first.digest != train_bpe(texts, 300).digest
    assert first.tokenizer.token_to_id(END_OF_TEXT) == first.end == 0
    for text in (TEXT, "naïve 漢字 £\r\n\t 𝄞 never seen".encode(), b""):
        (tokens,) = first.encode([text])
        assert first.decode(tokens).encode() == text
        assert not len(tokens) or 0 < tokens.max() < first.vocab_size <= 400
    assert len(first.encode([TEXT])[0]) < len(TEXT) / 3


def test_a_small_text_fills_a_part_of_the_vocabulary() -> None:
    assert 257 <= train_bpe([b"abc abc"], 30_000).vocab_size < 270
    with pytest.raises(ConfigError, match="vocab_size 256 is too small for a BPE"):
        train_bpe([TEXT], 256)


def test_bpe_of_a_corpus(tmp_path: Path) -> None:
    folder = write_story(tmp_path / "story")
    corpus, plain = corpus_of(folder, "bpe"), corpus_of(folder, "bytes")
    assert isinstance(corpus.tokenizer, SubwordTokenizer)
    assert corpus.train.dtype == np.uint16
    assert corpus.train.max() < corpus.vocab_size <= 512
    ends = np.flatnonzero(corpus.train == corpus.tokenizer.end)
    assert len(ends) == corpus.train_documents
    first = corpus.tokenizer.decode(corpus.train[: ends[0]]).encode()
    assert first == bytes(plain.train[: plain.train.tolist().index(0)])
    assert corpus.bytes_per_token == pytest.approx((len(plain.validation) - plain.validation_documents)
                                                   / len(corpus.validation))  # fmt: skip
    assert plain.bits_per_byte(np.log(2)) == pytest.approx(1, rel=1e-3)
    assert corpus.bits_per_byte(1.0) < plain.bits_per_byte(1.0) / 3  # type: ignore[operator]


def test_the_bpe_never_sees_validation_text(tmp_path: Path) -> None:
    folder = write_story(tmp_path / "story")
    held_out = corpus_of(folder, "bytes").validation.tobytes().split(b"\0")[0]
    (path,) = (path for path in folder.iterdir() if path.read_bytes() == held_out)
    secret = b"Xylophonist " * 500
    for number in range(300):
        # Some ending keeps the document in the validation part.
        path.write_bytes(held_out + secret + b"%d" % number)
        tokenizer = corpus_of(write_link(tmp_path / f"copy{number}", folder), "bytes")
        if secret in tokenizer.validation.tobytes():
            break
    corpus = corpus_of(tmp_path / f"copy{number}", "bpe", 600)
    assert isinstance(corpus.tokenizer, SubwordTokenizer)
    assert "Xylophonist" in corpus.tokenizer.decode(corpus.validation)
    assert not [word for word in corpus.tokenizer.tokenizer.get_vocab() if "Xylo" in word]


def write_link(copy: Path, folder: Path) -> Path:
    copy.symlink_to(folder)
    return copy


def test_files_of_tokenizers(tmp_path: Path) -> None:
    trained = train_bpe([TEXT], 300)
    trained.save(tmp_path)
    for name in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        found = find_tokenizer(name)
        assert found.digest == trained.digest
        assert (found.vocab_size, found.end) == (trained.vocab_size, 0)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "story"}}))
    other = find_tokenizer(str(tmp_path))
    assert isinstance(other, SubwordTokenizer)
    assert other.end == other.tokenizer.token_to_id("story")
    assert other.digest != trained.digest
    assert isinstance(find_tokenizer("auto"), ByteTokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"", "is not a tokenizer"), (b"{}", "is not a tokenizer"), (b"\xff\xfe", "not UTF-8")],
)
def test_damaged_tokenizers_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        find_tokenizer(str(path))
    assert "tokenizer.json" in refused.value.remedy


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    folder = write_story(tmp_path / "story", 3)
    trained = train_bpe([TEXT], 300)
    trained.save(tmp_path)
    size = trained.vocab_size
    with pytest.raises(ConfigError, match=f"vocab_size {size - 1} is below {size}, the ids of the tokenizer"):
        corpus_of(folder, str(tmp_path), size - 1)
    assert corpus_of(folder, str(tmp_path), size).vocab_size == size
    with pytest.raises(ConfigError, match="vocab_size 255"):
        load_corpus(ProxyConfig(), 255)
    with pytest.raises(ConfigError, match="vocab_size 256 is too small for a BPE"):
        corpus_of(folder, "bpe", 256)


@pytest.mark.parametrize(("vocab_size", "bits"), [(256, 8), (257, 16), (65536, 16), (65537, 32), (2**24, 32)])
def test_tokens_are_as_small_as_they_can_be(vocab_size: int, bits: int) -> None:
    assert token_dtype(vocab_size) == np.dtype(f"uint{bits}")
