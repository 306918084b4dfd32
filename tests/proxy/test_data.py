from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsearch.config import ProxyConfig
from archsearch.errors import ConfigError
from archsearch.proxy.data import Corpus, Windows, load_corpus, validation_windows

PROSE = b"".join(b"line %d of a long and dull story\n" % line for line in range(400))


def corpus_of(path: Path | str, context: int = 16) -> Corpus:
    return load_corpus(ProxyConfig(data=str(path), context=context), 256)


def write_files(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"chapter_{number:03}.txt").write_bytes(b"chapter %d\n" % number + PROSE)
    return folder


def test_standard_library_is_split_by_file() -> None:
    corpus = load_corpus(ProxyConfig(), 256)
    train, validation = set(corpus.train_documents), set(corpus.validation_documents)
    assert not train & validation
    assert {"ast.py", "json/decoder.py"} <= train | validation
    assert not any("site-packages" in name or name.startswith("test/") for name in train | validation)
    assert 0.02 < len(validation) / len(train | validation) < 0.09
    assert len(corpus.train) > 5_000_000
    assert len(corpus.validation) > 200_000


def test_documents_end_with_the_separator(tmp_path: Path) -> None:
    corpus = corpus_of(write_files(tmp_path / "book", 40))
    assert np.count_nonzero(corpus.train == 0) == len(corpus.train_documents)
    assert corpus.train.dtype == np.uint8
    assert not corpus.train.flags.writeable


def test_split_follows_relative_names_alone(tmp_path: Path) -> None:
    first = write_files(tmp_path / "one", 60)
    shutil.copytree(first, tmp_path / "elsewhere" / "two")
    (first / "chapter_007.txt").write_text("rewritten\n" * 50)
    split = corpus_of(first).validation_documents
    assert split == corpus_of(tmp_path / "elsewhere" / "two").validation_documents
    assert split == corpus_of(f"{first}/*.txt").validation_documents
    assert 1 <= len(split) < 12


def test_two_files_give_one_to_each_part(tmp_path: Path) -> None:
    corpus = corpus_of(write_files(tmp_path / "pair", 2))
    assert len(corpus.train_documents) == len(corpus.validation_documents) == 1


def test_end_of_a_single_file_is_held_out_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_bytes(PROSE)
    corpus = corpus_of(path)
    train, validation = bytes(corpus.train[:-1]), bytes(corpus.validation[:-1])
    assert train + validation == PROSE
    assert train.endswith(b"\n")
    assert len(validation) == pytest.approx(0.05 * len(PROSE), rel=0.1)


def test_hidden_folders_and_binary_files_are_left_out(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "book", 20)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret.txt").write_bytes(PROSE)
    (folder / "picture.bin").write_bytes(b"\x89PNG\0\0" * 50)
    corpus = corpus_of(folder)
    names = corpus.train_documents + corpus.validation_documents
    assert len(names) == 20
    assert all(name.startswith("chapter") for name in names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b""), "holds no text"),
        (lambda path: path.mkdir(), "holds no text"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.write_text(PROSE.decode(), encoding="utf-16"), "zero bytes"),
        (lambda path: path.write_bytes(b"short\n" * 10), "too short"),
    ],
    ids=["missing", "empty", "empty folder", "pipe", "utf-16", "short"],
)
def test_unusable_data_is_refused(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "text"
    make(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message) as refused:
        corpus_of(path)
    assert refused.value.remedy


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes(PROSE)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        corpus_of(path)


def test_unknown_builtin_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'builtin:python'"):
        corpus_of("builtin:pyton")


def test_glob_without_matches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no text"):
        corpus_of(tmp_path / "*.md")


def test_data_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(ConfigError, match="too much"):
        corpus_of(path)


def test_vocabulary_below_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size 255"):
        load_corpus(ProxyConfig(), 255)


@settings(deadline=None)
@given(length=st.integers(20, 400), context=st.integers(2, 9), seed=st.integers(0, 5), batch=st.integers(1, 7))
def test_window_order_does_not_depend_on_the_batch_size(length: int, context: int, seed: int, batch: int) -> None:
    tokens = np.arange(length).astype(np.uint8)
    one_by_one = np.concatenate([Windows(tokens, context, seed).batch(index, 1) for index in range(21)])
    windows = Windows(tokens, context, seed)
    batches = np.concatenate([windows.batch(first, batch) for first in range(0, 21, batch)])
    assert np.array_equal(batches[:21], one_by_one)


def test_an_epoch_visits_every_window_once() -> None:
    tokens = np.arange(250).astype(np.uint8)
    windows = Windows(tokens, 10, seed=3)
    epoch = windows.batch(0, windows.an_epoch)
    starts = np.sort(epoch[:, 0])
    assert np.array_equal(np.diff(starts), np.full(windows.an_epoch - 1, 10))
    assert np.array_equal(epoch[:, 1:], epoch[:, :-1] + 1)
    assert not np.array_equal(epoch, windows.batch(windows.an_epoch, windows.an_epoch))
    assert not np.array_equal(epoch, Windows(tokens, 10, seed=4).batch(0, windows.an_epoch))


def test_shortest_text_gives_one_window() -> None:
    tokens = np.arange(11).astype(np.uint8)
    assert np.array_equal(Windows(tokens, 10, seed=0).batch(5, 1)[0], tokens)


@pytest.mark.parametrize("wanted", [1, 40, 80, 10_000])
def test_validation_windows_are_spread_and_disjoint(wanted: int) -> None:
    tokens = (np.arange(201) % 256).astype(np.uint8)
    windows = validation_windows(tokens, 10, wanted)
    assert len(windows) == min(max(wanted // 10, 1), 20)
    starts = windows[:, 0]
    assert np.all(np.diff(starts) >= 10)
    assert np.all(starts % 10 == 0)
