"""Text for the proxy: bytes of documents, split into training and validation the same way on every machine.

The default, ``builtin:python``, is the source of Python's standard library, found wherever Python is.
Tokens are bytes; a zero byte ends each document.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from archsearch.config import ProxyConfig
from archsearch.errors import ConfigError
from archsearch.schema import did_you_mean

BYTE_VOCABULARY = 256
SEPARATOR = b"\0"
"""Ends each document; text holds no zero bytes, so a generation may start from it."""
HELD_OUT = 0.05
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_MAGIC = set("*?[")

Tokens = npt.NDArray[np.uint8]
Document = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens of the training and of the validation documents, each a flat read-only array of uint8."""

    name: str
    train: Tokens
    validation: Tokens
    train_documents: tuple[str, ...]
    validation_documents: tuple[str, ...]
    vocab_size: int = BYTE_VOCABULARY


def load_corpus(config: ProxyConfig, vocab_size: int) -> Corpus:
    """The corpus that ``config.data`` names: ``builtin:python``, a text file, a folder or a glob.

    A folder or glob is split by file, by a hash of the relative name; of a single file the end is
    held out. Read once a process.

    Raises:
        ConfigError: missing, empty, unreadable, binary or too short data, or a vocabulary below 256.
    """
    if vocab_size < BYTE_VOCABULARY:
        cause = f"vocab_size {vocab_size} is below {BYTE_VOCABULARY}: the proxy's tokens are bytes"
        raise ConfigError(cause, f"set vocab_size to at least {BYTE_VOCABULARY}")
    corpus = _read_corpus(config.data)
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= config.context:
            cause = f"{config.data}: too short: {len(tokens)} {part} tokens for sequences of {config.context}"
            raise ConfigError(cause, "give more text in proxy.data or lower proxy.context")
    return corpus


@lru_cache(maxsize=4)
def _read_corpus(data: str) -> Corpus:
    documents = [(name, content) for name, content in _documents(data) if content]
    if not documents:
        raise ConfigError(f"{data}: holds no text", "set proxy.data to a text file, a folder or a glob of text files")
    train, validation = _split_file(documents[0]) if len(documents) == 1 else _split(documents)
    names = [tuple(name for name, _ in part) for part in (train, validation)]
    return Corpus(data, _join(train), _join(validation), *names)


def _join(documents: Sequence[Document]) -> Tokens:
    return np.frombuffer(b"".join(content + SEPARATOR for _, content in documents), dtype=np.uint8)


# Which files


def _documents(data: str) -> Iterator[Document]:
    """(relative name, bytes) of every document, ordered by name."""
    if data.startswith("builtin:"):
        root, paths = _builtin(data)
    else:
        root, paths = _user_files(data)
    single = len(paths) == 1
    _check_size(data, paths)
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        content = _read(path)
        if b"\0" not in content:
            yield path.relative_to(root).as_posix(), content
        elif single:
            raise ConfigError(f"{path} is not text: it holds zero bytes", "give a file of UTF-8 text")


def _builtin(data: str) -> tuple[Path, list[Path]]:
    if data != "builtin:python":
        raise ConfigError(f"unknown data {data!r}; {did_you_mean(data, ['builtin:python'])}", "correct proxy.data")
    root = Path(sysconfig.get_path("stdlib"))
    return root, [path for path in _walk(root, _NOT_SOURCE) if path.suffix == ".py"]


def _user_files(data: str) -> tuple[Path, list[Path]]:
    """(root, files) of a file, folder or glob; names are relative to the root, so that a copy splits alike."""
    path = Path(data).expanduser()
    if path.is_dir():
        return path, list(_walk(path))
    if path.is_file():
        return path.parent, [path]
    if not _MAGIC & set(data):
        found = "is not a regular file" if path.exists() else "does not exist"
        raise ConfigError(f"proxy.data: {data} {found}", "give builtin:python, a text file, a folder or a glob")
    fixed = [part for index, part in enumerate(path.parts) if not _MAGIC & set("".join(path.parts[: index + 1]))]
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    return Path(*fixed), [match for match in matches if match.is_file()]


def _walk(root: Path, skipped: Container[str] = ()) -> Iterator[Path]:
    """Regular files under ``root``; hidden folders and those named in ``skipped`` are not entered."""
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if child not in skipped and not child.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _check_size(data: str, paths: Sequence[Path]) -> None:
    # Documents and their joined copy are in memory together.
    needed, free = 2 * sum(path.stat().st_size for path in paths), psutil.virtual_memory().available
    if needed > free:
        cause = f"{data}: {needed / 2e9:.1f} GB of text, too much for {free / 1e9:.1f} GB of free memory"
        raise ConfigError(cause, "point proxy.data at a part of it")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check its permissions") from None


# Training and validation


def _split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """About ``HELD_OUT`` of the documents by a hash of their names, at least one and never all."""
    ranked = sorted(documents, key=lambda document: _rank(document[0]))
    below = sum(_rank(name) < HELD_OUT for name, _ in documents)
    count = min(max(below, 1), len(documents) - 1)
    return sorted(ranked[count:]), sorted(ranked[:count])


def _rank(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_file(document: Document) -> tuple[list[Document], list[Document]]:
    """The last part of a single document, from the start of a line on, is held out."""
    name, content = document
    wanted = len(content) - int(len(content) * HELD_OUT)
    cut = content.rfind(b"\n", 0, wanted) + 1 or wanted
    return [(name, content[:cut])], [(f"{name} (end)", content[cut:])]


# Sequences


class Windows:
    """Training sequences in an order fixed by the seed, whatever the batch size.

    Each epoch cuts the tokens into windows of ``context + 1`` (inputs and, one later, targets) from
    another offset and permutes them. Window ``n`` depends on (tokens, context, seed, n) alone, so
    that a training can stop and go on anywhere.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.an_epoch = max((len(tokens) - 1) // context - 1, 1)
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def batch(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Windows ``first`` to ``first + count - 1`` as an array [count, context + 1]."""
        return np.stack([self._window(index) for index in range(first, first + count)])

    def _window(self, index: int) -> npt.NDArray[np.int64]:
        epoch, place = divmod(index, self.an_epoch)
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, self._order(epoch)
        start = self._starts[place]
        return self.tokens[start : start + self.context + 1].astype(np.int64)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, epoch])
        slack = len(self.tokens) - 1 - self.an_epoch * self.context
        return rng.permutation(self.an_epoch) * self.context + rng.integers(slack + 1)


def validation_windows(tokens: Tokens, context: int, wanted: int) -> npt.NDArray[np.int64]:
    """Non-overlapping windows [n, context + 1], about ``wanted`` tokens spread evenly over ``tokens``."""
    held = (len(tokens) - 1) // context
    count = min(max(wanted // context, 1), held)
    starts = np.arange(count) * held // count * context
    return tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
