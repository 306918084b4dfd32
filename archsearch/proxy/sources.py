"""Where documents come from: ``open_source`` gives what ``proxy.data`` names, as a stream of text or tokens.

A source is read once, in a fixed order, and in memory that does not grow with its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from archsearch.config import ProxyConfig, split_data

PIECE = 2**16
"""Bytes of text that are tokenised as one; longer documents are cut at a line end near it."""
HELD_OUT = 0.05
"""Share of the documents that is kept for validation."""

Piece = bytes | npt.NDArray[np.generic]
"""Text in UTF-8, or tokens that another tool wrote."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        rank: from 0 to 1, a hash that decides the part: below ``HELD_OUT`` is validation.
        pieces: its content in order.
        held_out: the part, where the source decides it instead of the rank.
    """

    rank: float
    pieces: Iterable[Piece]
    held_out: bool | None = None


class Source(Protocol):
    """Documents in a fixed order."""

    name: str

    def fingerprint(self) -> dict[str, Any]:
        """Plain data that changes whenever the documents may have changed."""

    def documents(self) -> Iterator[Document]:
        """All documents, from the first one on at each call. Raises ConfigError where they cannot be read."""


def open_source(config: ProxyConfig) -> Source:
    """What ``config.data`` names.

    Raises:
        ConfigError: it does not exist or holds nothing.
        EnvironmentUnfit: it needs a package or a network that is not there.
    """
    scheme, rest = split_data(config.data)
    if scheme == "hf":
        from archsearch.proxy.hub import HubSource

        return HubSource(rest, config.split, config.text_field)
    if scheme == "tokens":
        from archsearch.proxy.token_files import TokenSource

        return TokenSource(rest, config.token_dtype)
    from archsearch.proxy.text_files import FileSource, builtin_source

    return builtin_source(config.data) if scheme == "builtin" else FileSource.find(rest, config.text_field)


def rank(content: bytes) -> float:
    """A number in [0, 1) that depends on ``content`` alone."""
    digest = rank_digest()
    digest.update(content)
    return rank_of(digest)


def rank_digest() -> hashlib.blake2b:
    """What ``rank_of`` takes, for content that comes in blocks."""
    return hashlib.blake2b(digest_size=8)


def rank_of(digest: hashlib.blake2b) -> float:
    """The rank of all that ``digest`` has seen."""
    return int.from_bytes(digest.digest(), "big") / 2**64


def cut(text: bytes) -> Iterator[bytes]:
    """``text`` in pieces of at most about ``PIECE`` bytes, each ending with a line where it has one."""
    start = 0
    while len(text) - start > PIECE:
        end = start + last_line_end(text[start : start + PIECE])
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def last_line_end(text: bytes) -> int:
    """Where to cut ``text``: behind its last line end, else before its last character."""
    if found := text.rfind(b"\n") + 1:
        return found
    end = len(text) - 1
    while end > 1 and text[end] & 0xC0 == 0x80:  # a byte inside a UTF-8 character
        end -= 1
    return max(end, 1)


def split(documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
    """Each document and whether it is held out; never all of them, and at least the last of several.

    The last document waits for the end of the stream: it goes to the part that has none.
    """
    seen: set[bool] = set()
    waiting: Document | None = None
    for document in documents:
        if waiting is not None:
            held_out = _held_out(waiting)
            seen.add(held_out)
            yield waiting, held_out
        waiting = document
    if waiting is not None:
        yield waiting, (not seen.pop() if len(seen) == 1 and waiting.held_out is None else _held_out(waiting))


def _held_out(document: Document) -> bool:
    return document.rank < HELD_OUT if document.held_out is None else document.held_out
