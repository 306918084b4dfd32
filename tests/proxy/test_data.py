"""Text as documents: which files, which part, which tokens."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archsearch.config import ProxyConfig
from archsearch.errors import ConfigError
from archsearch.proxy import sources
from archsearch.proxy.data import Corpus, load_corpus
from archsearch.proxy.sources import Document, cut, split

PROSE = b"".join(b"line %d of a long and dull story\n" % line for line in range(400))


def corpus_of(path: Path | str, context: int = 16, **settings: object) -> Corpus:
    return load_corpus(ProxyConfig(data=str(path), context=context, **settings), 256)


def documents(tokens: np.ndarray) -> set[bytes]:
    """The documents of a part; each ends with a zero byte."""
    content = tokens.tobytes()
    assert content.endswith(b"\0")
    return set(content[:-1].split(b"\0"))


def chapter(number: int) -> bytes:
    return b"chapter %d\n" % number + PROSE


def write_files(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"chapter_{number:03}.txt").write_bytes(chapter(number))
    return folder


def write_rows(path: Path, texts: list[str]) -> Path:
    """The texts as JSON lines or Parquet, as the name says."""
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return path
    opener: Callable = gzip.open if path.suffix == ".gz" else open  # type: ignore[type-arg]
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_standard_library_is_split_by_file() -> None:
    corpus = load_corpus(ProxyConfig(), 256)
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert not train & validation
    assert {Path(os.__file__).read_bytes(), Path(re.__file__).read_bytes()} <= train | validation
    assert Path(pytest.__file__).read_bytes() not in train | validation
    count = corpus.train_documents + corpus.validation_documents
    assert 0.02 < corpus.validation_documents / count < 0.09
    assert len(corpus.train) > 5_000_000
    assert len(corpus.validation) > 200_000
    assert corpus.bytes_per_token == pytest.approx(1, abs=1e-3)


def test_documents_end_with_the_separator(tmp_path: Path) -> None:
    corpus = corpus_of(write_files(tmp_path / "book", 40))
    assert np.count_nonzero(corpus.train == 0) == corpus.train_documents
    assert corpus.train_documents + corpus.validation_documents == 40
    assert corpus.train.dtype == np.uint8
    assert not corpus.train.flags.writeable


def test_split_follows_content_alone(tmp_path: Path) -> None:
    first = write_files(tmp_path / "one", 60)
    shutil.copytree(first, tmp_path / "elsewhere" / "two")
    (tmp_path / "elsewhere" / "two" / "chapter_000.txt").rename(tmp_path / "elsewhere" / "two" / "z.md")
    validation = documents(corpus_of(first).validation)
    assert validation == documents(corpus_of(tmp_path / "elsewhere" / "two").validation)
    assert validation == documents(corpus_of(f"{first}/*.txt").validation)
    assert validation == documents(corpus_of(f"files:{first}/*.txt").validation)
    assert 1 <= len(validation) < 12


def test_an_edited_file_is_seen_by_the_next_process(tmp_path: Path) -> None:
    from archsearch.proxy import data

    folder = write_files(tmp_path / "one", 60)
    before = corpus_of(folder)
    path = folder / "chapter_007.txt"
    path.write_bytes(path.read_bytes().replace(b"dull", b"DULL"))
    data._load.cache_clear()
    after = corpus_of(folder)
    assert len(after.train) == len(before.train)
    assert after.digest != before.digest
    assert after.path != before.path


def test_two_files_give_one_to_each_part(tmp_path: Path) -> None:
    corpus = corpus_of(write_files(tmp_path / "pair", 2))
    assert corpus.train_documents == corpus.validation_documents == 1


def test_end_of_a_single_file_is_held_out_at_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.proxy.text_files.PIECE", 1000)
    path = tmp_path / "story.txt"
    path.write_bytes(PROSE)
    corpus = corpus_of(path)
    train, validation = bytes(corpus.train[:-1]), bytes(corpus.validation[:-1])
    assert train + validation == PROSE
    assert train.endswith(b"\n")
    assert len(validation) == pytest.approx(0.05 * len(PROSE), rel=0.1)


def test_hidden_folders_and_binary_files_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_files(tmp_path / "book", 20)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret.txt").write_bytes(PROSE)
    (folder / "picture.bin").write_bytes(b"\x89PNG\0\0" * 50)
    (folder / "empty.txt").touch()
    (folder / "late.log").write_bytes(PROSE * 100 + b"\0")
    corpus = corpus_of(folder)
    assert documents(corpus.train) | documents(corpus.validation) == {chapter(number) for number in range(20)}
    assert "left out 2 files" in caplog.text


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json.gz", "rows.parquet"])
def test_each_row_is_a_document(tmp_path: Path, name: str) -> None:
    texts = [f"row {number}: naïve £ 漢字 " * 9 for number in range(200)]
    corpus = corpus_of(write_rows(tmp_path / name, [*texts, "", texts[5]]))
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert train | validation == {text.encode() for text in texts}
    assert not train & validation, "equal rows go to the same part"
    assert corpus.train_documents + corpus.validation_documents == 201
    assert 2 <= corpus.validation_documents <= 20


def test_kinds_of_files_mix_in_a_folder(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "mixed", 5)
    write_rows(folder / "rows.jsonl", ["one row of text here"] * 3)
    write_rows(folder / "rows.parquet", ["another row of text"] * 3)
    (folder / "settings.json").write_text('{"plain": "text"}')
    corpus = corpus_of(folder)
    assert corpus.train_documents + corpus.validation_documents == 12


def test_another_field(tmp_path: Path) -> None:
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"content": f"x = {number}\n" * 20}) + "\n" for number in range(50)))
    assert corpus_of(path, text_field="content").train_documents > 40


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": "b"\n', "rows.jsonl:2: not a line of JSON"),
        ('{"text": "a"}\n\n[1]\n', "rows.jsonl:3: a list instead of an object"),
        ('{"content": "a"}\n', "rows.jsonl:1: no field 'text'; known: content"),
        ('{"text": 5}\n', "rows.jsonl:1: 'text' is a int, not text"),
        ("[" * 10**5 + "\n", "rows.jsonl:1: not a line of JSON"),
        ('{"text": ""}\n', "holds no text"),
        (json.dumps({"text": "one row " * 99}), "too short: 0 validation tokens"),
        ("\x00\x01", "not a line of JSON"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines)
    with pytest.raises(ConfigError, match=re.escape(message)):
        corpus_of(path)


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    whole = write_rows(tmp_path / "whole.parquet", ["a text of some length"] * 300)
    for name, content in {"cut.parquet": whole.read_bytes()[:-50], "not.parquet": PROSE, "none.parquet": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="is not a Parquet file"):
            corpus_of(tmp_path / name)
    with pytest.raises(ConfigError, match="no field 'txt'; did you mean 'text'"):
        corpus_of(whole, text_field="txt")
    packed = write_rows(tmp_path / "rows.jsonl.gz", ["a text of some length"] * 300)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="is damaged"):
        corpus_of(packed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b""), "holds no text"),
        (lambda path: path.mkdir(), "holds no text"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.write_text(PROSE.decode(), encoding="utf-16"), "zero bytes"),
        (lambda path: path.write_bytes(b"short\n" * 10), "too short"),
        (lambda path: path.write_bytes(b"a"), "too short"),
        (lambda path: path.write_bytes(b"\n"), "too short"),
    ],
    ids=["missing", "empty", "empty folder", "pipe", "utf-16", "short", "letter", "line"],
)
def test_unusable_data_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "text"
    make(path)
    with pytest.raises(ConfigError, match=message) as refused:
        corpus_of(path)
    assert refused.value.remedy


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes(PROSE)

    def refuse(path: Path) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("archsearch.proxy.text_files._rank_file", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        corpus_of(path)


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'builtin:python'"):
        corpus_of("builtin:pyton")
    with pytest.raises(ValueError, match="did you mean 'tokens'"):
        ProxyConfig(data="token:train.bin")


def test_glob_without_matches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file matches .*\*\.md"):
        corpus_of(tmp_path / "*.md")


@pytest.mark.parametrize("data", ["files:", "tokens:"])
def test_a_scheme_alone_is_refused(data: str) -> None:
    with pytest.raises(ValueError, match=f"'{data}' names nothing"):
        ProxyConfig(data=data)


def test_no_more_tokens_are_taken_than_asked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [f"a short text, number {number}\n" for number in range(3000)])
    part, whole = corpus_of(path, corpus_tokens=20_000), corpus_of(path)
    assert part.truncated
    assert not whole.truncated
    assert 20_000 <= len(part.train) + len(part.validation) < 20_100
    assert np.array_equal(part.train, whole.train[: len(part.train)])
    with pytest.raises(ConfigError, match="too short") as refused:
        corpus_of(path, corpus_tokens=30)
    assert refused.value.remedy == "raise proxy.corpus_tokens"


# Parts and pieces


def ranked(*ranks: float) -> list[Document]:
    return [Document(rank, ()) for rank in ranks]


@pytest.mark.parametrize(
    ("ranks", "held_out"),
    [((), []), ((0.5,), [False]), ((0.5, 0.6), [False, True]), ((0.01, 0.02, 0.03), [True, True, False]),
     ((0.5, 0.01, 0.6), [False, True, False]), ((0.01, 0.6), [True, False])],
)  # fmt: skip
def test_no_part_stays_empty(ranks: tuple[float, ...], held_out: list[bool]) -> None:
    assert [part for _, part in split(ranked(*ranks))] == held_out


def test_pieces_join_to_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 100)
    for text in (PROSE[:1000], "漢字".encode() * 200, b"x" * 1001, b"\x80" * 300, b"", b"\n" * 300):
        pieces = list(cut(text))
        assert b"".join(pieces) == text
        assert all(0 < len(piece) <= 100 for piece in pieces)
    assert [piece.decode() for piece in cut("漢字".encode() * 200)], "no character is cut"
