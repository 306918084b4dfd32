"""Text on disk: plain files, JSON lines and Parquet; one of them, a folder or a glob."""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
import sysconfig
import zlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from archsearch.errors import ConfigError, EnvironmentUnfit
from archsearch.proxy.sources import HELD_OUT, PIECE, Document, cut, last_line_end, rank, rank_digest, rank_of
from archsearch.schema import did_you_mean

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET = ".parquet"
ROWS = 256
"""Rows of a Parquet file in memory at once, beside the row group that holds them."""
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_MAGIC = set("*?[")
log = logging.getLogger(__name__)


class FileSource:
    """Files under one root, in the order of their relative names.

    A plain file is a document, and so is each row of JSON lines or Parquet. Documents are held out by
    their content: a copy splits alike, and equal texts go to the same part. Of a single plain file the
    end is held out.

    Args:
        name: for people.
        root: the names of files are relative to it.
        paths: the files.
        text_field: of JSON lines and Parquet.
    """

    def __init__(self, name: str, root: Path, paths: Sequence[Path], text_field: str) -> None:
        self.name, self.root, self.text_field = name, root, text_field
        self.files = sorted((path.relative_to(root).as_posix(), path) for path in paths)

    @classmethod
    def find(cls, pattern: str, text_field: str) -> FileSource:
        """The files that a path, a folder or a glob names."""
        root, paths = find_files(pattern)
        return cls(pattern, root, paths, text_field)

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and times of the files. Their change time moves with every write, copied or not."""
        files = [[name, *stamp(path)] for name, path in self.files]
        return {"files": files, "root": str(self.root.resolve()), "text_field": self.text_field}

    def documents(self) -> Iterator[Document]:
        single = len(self.files) == 1
        skipped = 0
        for name, path in self.files:
            try:
                if name.endswith(PARQUET):
                    yield from _parquet(path, self.text_field)
                elif name.endswith(JSON_LINES):
                    yield from _json_lines(path, self.text_field)
                elif not path.stat().st_size:
                    continue
                elif (place := _rank_file(path)) is not None:
                    yield from _ends(path) if single else [Document(place, _lines(path))]
                elif single:
                    remedy = "give UTF-8 text; write tokens:PATH for arrays of tokens"
                    raise ConfigError(f"{path} is not text: it holds zero bytes", remedy)
                else:
                    skipped += 1
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror or error}", "check it") from None
        if skipped:
            log.warning("%s: left out %d files that are not text", self.root, skipped)


def builtin_source(data: str) -> FileSource:
    """``builtin:python``: the source of Python's standard library, found wherever Python is."""
    if data != "builtin:python":
        raise ConfigError(f"unknown data {data!r}; {did_you_mean(data, ['builtin:python'])}", "correct proxy.data")
    root = Path(sysconfig.get_path("stdlib"))
    return FileSource(data, root, [path for path in _walk(root, _NOT_SOURCE) if path.suffix == ".py"], "text")


def find_files(pattern: str) -> tuple[Path, list[Path]]:
    """(root, files) of a file, folder or glob; names are relative to the root, so that a copy splits alike."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        return path, list(_walk(path))
    if path.is_file():
        return path.parent, [path]
    if not _MAGIC & set(pattern):
        found = "is not a regular file" if path.exists() else "does not exist"
        raise ConfigError(f"proxy.data: {pattern} {found}", "give builtin:python, a file, a folder or a glob")
    fixed = [part for index, part in enumerate(path.parts) if not _MAGIC & set("".join(path.parts[: index + 1]))]
    matches = [match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file()]
    if not matches:
        raise ConfigError(f"proxy.data: no file matches {pattern}", "correct the glob; ** also looks into folders")
    return Path(*fixed), matches


def stamp(path: Path) -> list[int]:
    """Size, modification and change time, in bytes and nanoseconds."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check that it exists") from None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _walk(root: Path, skipped: Container[str] = ()) -> Iterator[Path]:
    """Regular files under ``root``; hidden folders and those named in ``skipped`` are not entered."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}", "check its permissions")

    for folder, children, files in os.walk(root, onerror=refuse):
        children[:] = [child for child in children if child not in skipped and not child.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if os.path.isfile(path))


# Plain text


def _rank_file(path: Path) -> float | None:
    """The rank of a file's content; None where it holds zero bytes, as no text does."""
    digest = rank_digest()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            if b"\0" in block:
                return None
            digest.update(block)
    return rank_of(digest)


def _ends(path: Path) -> Iterator[Document]:
    """The end of a single file, from the start of a line on, is held out. It comes first: a limit cuts the rest."""
    size = path.stat().st_size
    wanted = size - int(size * HELD_OUT)
    with path.open("rb") as file:
        file.seek(max(0, wanted - PIECE))
        before = file.read(min(wanted, PIECE))
    middle = wanted - len(before) + last_line_end(before) if before else wanted
    yield Document(0.0, _lines(path, middle, size), held_out=True)
    yield Document(1.0, _lines(path, 0, middle), held_out=False)


def _lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Bytes ``start`` to ``stop`` in pieces that end with a line."""
    left = b""
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(PIECE if stop is None else min(PIECE, stop - file.tell())):
            chunk = left + chunk
            end = last_line_end(chunk)
            yield chunk[:end]
            left = chunk[end:]
    if left:
        yield left


# Rows of text


def record(value: Any, where: str, field: str) -> Document | None:
    """One row's text as a document, None where it is empty.

    Raises:
        ConfigError: it is no text.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {field!r} is a {type(value).__name__}, not text", "set proxy.text_field")
    text = value.replace("\0", "").encode("utf-8", "replace")
    return Document(rank(text), cut(text)) if text else None


def missing_field(where: str, field: str, known: Sequence[str]) -> ConfigError:
    """The error for a row or table without the field."""
    return ConfigError(f"{where}: no field {field!r}; {did_you_mean(field, known)}", "set proxy.text_field")


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            yield from _json_rows(file, str(path), field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path} is damaged: {error}", "fetch it again") from None


def _json_rows(file: IO[bytes], name: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{where}: not a line of JSON: {reason}", "write one object a line") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a {type(row).__name__} instead of an object", "write one object a line")
        if field not in row:
            raise missing_field(where, field, list(row))
        if (document := record(row[field], where, field)) is not None:
            yield document


def _parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise EnvironmentUnfit(f"{path} needs pyarrow", "pip install 'archsearch[data]'") from None
    try:
        with pq.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise missing_field(str(path), field, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    if value is not None and (document := record(value, str(path), field)) is not None:
                        yield document
    except pa.ArrowException as error:
        raise ConfigError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}", "fetch it again") from None
