"""A tokenised corpus on disk: written as a stream, read as memory-mapped arrays.

Neither needs memory that grows with the corpus.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from archsearch.errors import ConfigError
from archsearch.proxy.sources import Piece, Source, split
from archsearch.proxy.token_files import TokenSource, map_tokens
from archsearch.proxy.tokenizer import JSON_NAME, TextTokenizer, Tokens, read_tokenizer, train_bpe

BATCH = 2**22
"""Bytes of text that are tokenised together, on all cores."""
SCANNED = 2**24
"""Tokens in memory at once while a file is looked through."""
SAMPLED = 2**17
"""Validation tokens that are decoded to see how many bytes stand behind one."""
SECONDS_A_LINE = 10.0
PARTS = ("train", "validation")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Tokens of the training and of the validation documents.

    Attributes:
        name: what ``proxy.data`` said.
        train: [n] read-only, memory-mapped; uint8, uint16 or uint32.
        validation: likewise.
        vocab_size: every id is below it.
        tokenizer: what turns ids back into text; None where nobody knows.
        train_documents: their number; 0 where the source has no boundaries.
        validation_documents: likewise.
        bytes_per_token: of the validation text in UTF-8; None without a tokenizer.
        digest: hash of all tokens and of the tokenizer: equal corpora, equal digests.
        path: its folder in the cache.
        truncated: whether ``proxy.corpus_tokens`` cut it short.
    """

    name: str
    train: Tokens
    validation: Tokens
    vocab_size: int
    tokenizer: TextTokenizer | None
    train_documents: int
    validation_documents: int
    bytes_per_token: float | None
    digest: str
    path: Path
    truncated: bool

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss in nats a token as bits a byte of text: comparable across tokenizers, where perplexity is not.

        None where nobody knows the tokenizer. Tokens that end a document count, their bytes are none.
        """
        return None if self.bytes_per_token is None else loss / math.log(2) / self.bytes_per_token


def write_corpus(
    folder: Path, source: Source, tokenizer: TextTokenizer | None, *, bpe: int | None = None, limit: int
) -> dict[str, Any]:
    """Fill a cache entry: tokens of both parts and the tokenizer. Gives the facts that ``read_corpus`` takes.

    Args:
        folder: empty.
        source: of text, or of tokens.
        tokenizer: of text; None with ``bpe``, and for tokens of unknown origin.
        bpe: train a BPE of at most so many tokens first.
        limit: most tokens to take.

    Raises:
        ConfigError: the source cannot be read, or its tokens are no ids of the tokenizer.
    """
    start = time.perf_counter()
    if isinstance(source, TokenSource) and (slices := source.in_place()):
        parts = {name: {**part.to_dict(), "documents": 0, "bytes": None}
                 for name, part in zip(PARTS, slices, strict=True)}  # fmt: skip
        found: dict[str, Any] = {"parts": parts, "truncated": False}
    else:
        if bpe is not None:
            tokenizer = train_bpe(_training_text(source), bpe)
        found = _tokenise(folder, source, tokenizer, limit)
    if not any(part["tokens"] for part in found["parts"].values()):
        what = "a text file, a folder or a glob of text files"
        raise ConfigError(f"{source.name}: holds no text", f"set proxy.data to {what}")
    if tokenizer is not None:
        tokenizer.save(folder)
    for name, part in found["parts"].items():
        part |= _scan(map_part(folder, part))
        if tokenizer is not None and part["largest"] >= tokenizer.vocab_size:
            cause = f"{source.name}: the {name} part holds token {part['largest']}, and {tokenizer.name} knows only "
            raise ConfigError(f"{cause}{tokenizer.vocab_size} ids", "set proxy.tokenizer to what wrote the tokens")
    content = [part["digest"] for part in found["parts"].values()] + [tokenizer.digest if tokenizer else ""]
    digest = hashlib.blake2b(" ".join(content).encode(), digest_size=16).hexdigest()
    return {"source": source.name, **found, "digest": digest, "seconds": time.perf_counter() - start}


def map_part(folder: Path, part: Mapping[str, Any]) -> Tokens:
    """The array that a part's facts describe; relative paths lie in ``folder``."""
    return map_tokens(folder / part["path"], part["dtype"], part["offset"], part["tokens"])


def read_corpus(name: str, folder: Path, facts: Mapping[str, Any], tokenizer: TextTokenizer | None) -> Corpus:
    """Open a cache entry that ``write_corpus`` filled."""
    if (folder / JSON_NAME).is_file():
        tokenizer = read_tokenizer(folder / JSON_NAME, tokenizer.name if tokenizer else "bpe")
    train, validation = (map_part(folder, facts["parts"][part]) for part in PARTS)
    largest = max(facts["parts"][part]["largest"] for part in PARTS)
    return Corpus(
        name=name,
        train=train,
        validation=validation,
        vocab_size=tokenizer.vocab_size if tokenizer else largest + 1,
        tokenizer=tokenizer,
        train_documents=facts["parts"]["train"]["documents"],
        validation_documents=facts["parts"]["validation"]["documents"],
        bytes_per_token=_bytes_per_token(facts["parts"]["validation"], validation, tokenizer),
        digest=facts["digest"],
        path=folder,
        truncated=facts["truncated"],
    )


def _bytes_per_token(part: Mapping[str, Any], tokens: Tokens, tokenizer: TextTokenizer | None) -> float | None:
    if not len(tokens) or tokenizer is None:
        return None
    if part["bytes"] is not None:
        return float(part["bytes"] / len(tokens))
    sample = tokens[:SAMPLED]
    return len(tokenizer.decode(sample).encode()) / len(sample)


# Writing


class _PartWriter:
    """Appends the tokens of one part to a file, and counts."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self.file: IO[bytes] = path.open("wb")
        self.tokens = self.documents = self.bytes = 0

    def append(self, tokens: Tokens, size: int = 0) -> None:
        """Add ``tokens`` that stand for ``size`` bytes of text."""
        if tokens.dtype.kind == "i" and len(tokens) and tokens.min() < 0:
            raise ConfigError(f"{tokens.min()} is no token", "write non-negative integers")
        if tokens.dtype.itemsize > self.dtype.itemsize and len(tokens) and tokens.max() > np.iinfo(self.dtype).max:
            raise ConfigError(f"{tokens.max()} is no token: it needs more than 32 bits", "write tokens as uint32")
        self.file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.tokens += len(tokens)
        self.bytes += size

    def close(self) -> dict[str, Any]:
        """What was written."""
        self.file.close()
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return {"path": self.path.name, "dtype": self.dtype.str, "offset": 0, **counts}


def _tokenise(folder: Path, source: Source, tokenizer: TextTokenizer | None, limit: int) -> dict[str, Any]:
    if isinstance(source, TokenSource):
        dtype, ends = source.common_dtype(), []
    else:
        assert tokenizer is not None, "text needs a tokenizer"
        dtype, ends = token_dtype(tokenizer.vocab_size), [tokenizer.end]
    writers = [_PartWriter(folder / f"{part}.bin", dtype) for part in PARTS]
    end = np.array([token for token in ends if token is not None], dtype)
    heard, done = time.monotonic(), 0
    for held_out, piece, tokens in _encoded(_flow(source), tokenizer):
        if done >= limit:
            break
        if piece is None:
            writers[held_out].documents += 1
            tokens = end
        writers[held_out].append(tokens, 0 if piece is None else len(piece))
        done += len(tokens)
        if time.monotonic() - heard > SECONDS_A_LINE:
            heard = time.monotonic()
            log.info("%s: %.1f million tokens so far", source.name, done / 1e6)
    parts = {part: writer.close() for part, writer in zip(PARTS, writers, strict=True)}
    if isinstance(source, TokenSource):
        parts = {part: {**facts, "bytes": None} for part, facts in parts.items()}
    return {"parts": parts, "truncated": done >= limit}


Step = tuple[bool, Piece | None]
"""(held out, piece), or None for the piece where a document ends."""


def _flow(source: Source) -> Iterator[Step]:
    for document, held_out in split(source.documents()):
        for piece in document.pieces:
            yield held_out, piece
        yield held_out, None


def _encoded(steps: Iterator[Step], tokenizer: TextTokenizer | None) -> Iterator[tuple[bool, Piece | None, Tokens]]:
    """Each step with its tokens: text is tokenised, tokens pass through, the end of a document is empty."""
    for batch in _batches(steps):
        texts = [piece for _, piece in batch if isinstance(piece, bytes)]
        found = iter(tokenizer.encode(texts)) if texts and tokenizer else iter(())
        for held_out, piece in batch:
            if isinstance(piece, bytes):
                yield held_out, piece, next(found)
            else:
                yield held_out, piece, np.empty(0, np.uint8) if piece is None else piece  # type: ignore[misc]


def _batches(steps: Iterator[Step]) -> Iterator[list[Step]]:
    batch: list[Step] = []
    held = 0
    for step in steps:
        batch.append(step)
        held += 1 if step[1] is None else len(step[1])
        if held >= BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _training_text(source: Source) -> Iterator[bytes]:
    return (piece for held_out, piece in _flow(source) if not held_out and isinstance(piece, bytes))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id below ``vocab_size``."""
    return np.dtype("<u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


def _scan(tokens: Tokens) -> dict[str, Any]:
    """The largest id and a hash."""
    largest, digest = 0, hashlib.blake2b(digest_size=16)
    for start in range(0, len(tokens), SCANNED):
        block = tokens[start : start + SCANNED]
        largest = max(largest, int(block.max()))
        digest.update(block.tobytes())
    return {"largest": largest, "digest": digest.hexdigest()}
