"""Tokens that other tools wrote: nanoGPT's flat arrays, llm.c's shards, Megatron's indexed files, NumPy's.

=================  =====================================================================================
``.bin``           uint16 or uint32, little endian, no header (nanoGPT's ``train.bin`` and ``val.bin``)
``.bin``           256 int32 of header before them: magic 20240520 (uint16) or 20240801 (uint32) (llm.c)
``.bin``, ``.idx``  Megatron-LM's: the index holds the type, the lengths of sequences and the documents
``.npy``           one dimension of an integer type
=================  =====================================================================================
"""

from __future__ import annotations

import struct
from codecs import getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from archsearch.errors import ConfigError
from archsearch.proxy.sources import HELD_OUT, Document, rank
from archsearch.proxy.text_files import find_files, stamp

LLM_C = {20240520: "<u2", 20240801: "<u4"}
LLM_C_HEADER = 1024
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
SAMPLE = 2**20
"""Tokens that are looked at to find the type of a headerless file."""
LARGEST_HALF = 2**8
"""Upper halves of 32-bit ids stay below this for vocabularies up to 16M."""
BLOCK = 2**20
SUFFIXES = (".bin", ".npy")
OTHERS = (b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
"""How Parquet, gzip, Zstandard and ZIP begin."""
Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class TokenFile:
    """One array on disk.

    Attributes:
        name: relative to the source.
        path: of the file.
        dtype: NumPy's name of the type.
        offset: bytes before the first token.
        count: tokens.
        ends: where each document ends, in tokens; empty where the format does not say.
    """

    name: str
    path: Path
    dtype: str
    offset: int
    count: int
    ends: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def array(self) -> Integers:
        """All tokens, memory-mapped."""
        return np.asarray(np.memmap(self.path, self.dtype, "r", self.offset, (self.count,)))

    @property
    def validation(self) -> bool | None:
        """What its name says of its part; None where it says nothing."""
        words = Path(self.name).stem.lower().replace("-", "_").split("_")
        if {"val", "valid", "validation", "test"} & {*words}:
            return True
        return False if "train" in words else None


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens ``start`` to ``stop`` of a file, used where they lie."""

    file: TokenFile
    start: int
    stop: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``map_tokens`` takes."""
        offset = self.file.offset + self.start * np.dtype(self.file.dtype).itemsize
        path = str(self.file.path.resolve())
        return {"path": path, "dtype": self.file.dtype, "offset": offset, "tokens": self.stop - self.start}


def map_tokens(path: str | Path, dtype: str, offset: int, tokens: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """A memory-mapped, read-only array [tokens]; signed types are read as unsigned."""
    kind = np.dtype(dtype)
    unsigned = np.dtype(f"<u{kind.itemsize}")
    if not tokens:
        return np.empty(0, unsigned)
    return np.asarray(np.memmap(path, unsigned, "r", offset, (tokens,)))


class TokenSource:
    """Arrays of tokens under a file, a folder, a glob or Megatron's prefix.

    Documents of an index are held out by a hash of their tokens. Without an index, files whose names say
    ``val`` are held out; else the end of a single file, or whole files by a hash of their names.

    Args:
        pattern: what follows ``tokens:``.
        dtype: of headerless files: ``auto``, ``uint16`` or ``uint32``.
    """

    def __init__(self, pattern: str, dtype: str) -> None:
        self.name, self.dtype = f"tokens:{pattern}", dtype
        prefix = Path(pattern).expanduser()
        if not prefix.exists() and prefix.with_name(prefix.name + ".idx").is_file():
            pattern = f"{pattern}.bin"
        root, paths = find_files(pattern)
        if len(paths) == 1 and paths[0].suffix == ".idx":
            paths = [paths[0].with_suffix(".bin")]
        self.root = root
        self.paths = sorted(path for path in paths if path.suffix in SUFFIXES or len(paths) == 1)
        if not self.paths:
            raise ConfigError(f"{self.name}: no .bin or .npy file", "give a file, a folder or a glob of token arrays")

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and times of the files."""
        files = [[path.relative_to(self.root).as_posix(), *stamp(path), *_stamp_index(path)] for path in self.paths]
        return {"token_files": files, "root": str(self.root.resolve()), "token_dtype": self.dtype}

    def files(self) -> list[TokenFile]:
        """Every file, its header read. Raises ConfigError where one is no array of tokens."""
        return [open_tokens(path, path.relative_to(self.root).as_posix(), self.dtype) for path in self.paths]

    def common_dtype(self) -> np.dtype[Any]:
        """The type that all files are gathered in; what 32 bits do not hold is refused on the way."""
        return np.dtype("<u2" if all(file.dtype[1:] in ("u1", "u2") for file in self.files()) else "<u4")

    def in_place(self) -> tuple[Slice, Slice] | None:
        """(training, validation) where both are one stretch of a file, None where they must be gathered."""
        files = self.files()
        if any(len(file.ends) or np.dtype(file.dtype).itemsize not in (1, 2, 4) for file in files):
            return None
        if len(files) == 1:
            (file,) = files
            middle = file.count - int(file.count * HELD_OUT)
            return Slice(file, 0, middle), Slice(file, middle, file.count)
        train = [file for file in files if not file.validation]
        held_out = [file for file in files if file.validation]
        if len(train) != 1 or len(held_out) != 1:
            return None
        return Slice(train[0], 0, train[0].count), Slice(held_out[0], 0, held_out[0].count)

    def documents(self) -> Iterator[Document]:
        files = self.files()
        named = any(file.validation for file in files)
        for file in files:
            tokens = file.array()
            if not len(file.ends):
                held_out = bool(file.validation) if named else None
                yield Document(rank(file.name.encode()), _blocks(tokens), held_out)
                continue
            for start, end in zip([0, *file.ends[:-1].tolist()], file.ends.tolist(), strict=True):
                if end > start:
                    part = tokens[start:end]
                    yield Document(rank(part[:BLOCK].tobytes()), _blocks(part))


def _blocks(tokens: Integers) -> Iterator[Integers]:
    for start in range(0, len(tokens), BLOCK):
        yield tokens[start : start + BLOCK]


def _stamp_index(path: Path) -> list[int]:
    index = path.with_suffix(".idx")
    return stamp(index) if index.is_file() else []


def open_tokens(path: Path, name: str, dtype: str) -> TokenFile:
    """Read what a file says of itself.

    Raises:
        ConfigError: empty, cut off, or of a type that holds no tokens.
    """
    size, *_ = stamp(path)
    if not size:
        raise ConfigError(f"{path} is empty", "give an array of tokens")
    try:
        if path.suffix == ".npy":
            return _open_npy(path, name)
        if path.with_suffix(".idx").is_file():
            return _open_megatron(path, name, size)
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from None
    if start.startswith(OTHERS) or _is_text(start):
        raise ConfigError(f"{path} holds text or a container of it, not tokens", "write files:PATH for text")
    header = start[:12]
    if len(header) == 12 and (kind := LLM_C.get(struct.unpack("<3i", header)[0])):
        return _open_llm_c(path, name, kind, size, struct.unpack("<3i", header)[2])
    kind = {"uint16": "<u2", "uint32": "<u4"}[dtype] if dtype != "auto" else find_dtype(path, size)
    if size % np.dtype(kind).itemsize:
        cause = f"{path} has {size} bytes, which is no whole number of {np.dtype(kind).name} tokens"
        raise ConfigError(cause, "set proxy.token_dtype, or write the file again")
    return TokenFile(name, path, kind, 0, size // np.dtype(kind).itemsize)


def _is_text(start: bytes) -> bool:
    """Whether a page is UTF-8 without zero bytes, as no page of 16-bit or 32-bit ids is."""
    try:
        return b"\0" not in start and bool(getincrementaldecoder("utf-8")().decode(start))
    except UnicodeDecodeError:
        return False


def find_dtype(path: Path, size: int) -> str:
    """The type of a headerless file: 32 bits show in upper halves that are small where the lower ones are not."""
    with path.open("rb") as file:
        halves = np.frombuffer(file.read(min(size, 4 * SAMPLE) // 4 * 4), "<u2").reshape(-1, 2)
    lower, upper = halves[:, 0].max(initial=0), halves[:, 1].max(initial=0)
    wide = size % 4 == 0 and (upper < LARGEST_HALF <= lower or upper == 0 < lower)
    return "<u4" if wide else "<u2"


def _open_llm_c(path: Path, name: str, kind: str, size: int, count: int) -> TokenFile:
    if LLM_C_HEADER + count * np.dtype(kind).itemsize != size:
        raise ConfigError(f"{path} is cut off: its header promises {count} tokens", "write the file again")
    return TokenFile(name, path, kind, LLM_C_HEADER, count)


def _open_npy(path: Path, name: str) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ConfigError(f"{path} is not a NumPy array: {str(error).splitlines()[0]}", "write it again") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.dtype.byteorder == ">":
        cause = f"{path} holds {array.dtype.name} {array.shape} instead of a flat array of integers"
        raise ConfigError(cause, "save one dimension of uint16 or uint32")
    return TokenFile(name, path, array.dtype.str, int(array.offset), len(array))


def _open_megatron(path: Path, name: str, size: int) -> TokenFile:
    """Megatron-LM's index: magic, version, type, counts; lengths int32, pointers int64, documents int64."""
    index = path.with_suffix(".idx").read_bytes()
    damaged = ConfigError(f"{path.with_suffix('.idx')} is no Megatron index of this file", "write both again")
    if len(index) < 34 or not index.startswith(MEGATRON):
        raise damaged
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, len(MEGATRON))
    if version != 1 or code not in MEGATRON_TYPES or len(index) != 34 + 12 * sequences + 8 * documents:
        raise damaged
    lengths = np.frombuffer(index, "<i4", sequences, 34).astype(np.int64)
    firsts = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
    kind = MEGATRON_TYPES[code]
    count = int(lengths.sum())
    whole = lengths.min(initial=0) >= 0 and count * np.dtype(kind).itemsize == size
    if not whole or (len(firsts) and not 0 <= firsts.min() <= firsts.max() <= sequences):
        raise damaged
    ends = np.concatenate([[0], np.cumsum(lengths)])[np.unique(np.append(firsts[firsts > 0], sequences))]
    return TokenFile(name, path, kind, 0, count, ends if len(ends) > 1 else ends[:0])
