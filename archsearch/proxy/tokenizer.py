"""Tokenizers: bytes, a ``tokenizer.json``, a pretrained name, or a BPE trained on the corpus itself.

All but bytes are those of the ``tokenizers`` library; they tokenise on all cores.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from archsearch.errors import ConfigError
from archsearch.files import write_atomic
from archsearch.proxy import cache

if TYPE_CHECKING:
    import tokenizers

Tokens = npt.NDArray[np.unsignedinteger[Any]]

log = logging.getLogger(__name__)

BYTES = 256
END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]")
"""What known tokenizers end a document with, where no ``tokenizer_config.json`` says it."""
BPE_BYTES = 2**28
"""Text that a BPE is trained on: the first 256 MiB of the training documents."""
JSON_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"


class TextTokenizer(Protocol):
    """Turns text into ids.

    Attributes:
        name: for people.
        vocab_size: every id is below it.
        end: the id that ends a document, None where the tokenizer has none.
    """

    name: str
    vocab_size: int
    end: int | None

    @property
    def digest(self) -> str:
        """A hash of everything that decides the ids."""

    def encode(self, texts: Sequence[bytes]) -> list[Tokens]:
        """The ids of each text, without any that stand for start or end."""

    def decode(self, tokens: Tokens) -> str:
        """The text that ``tokens`` stand for."""

    def save(self, folder: Path) -> None:
        """Write what ``read_tokenizer`` reads. Raises StorageError."""


class ByteTokenizer:
    """Token i is byte i. A zero byte ends a document: text holds none, so a generation may start from it."""

    name, digest = "bytes", "bytes"
    vocab_size = BYTES
    end: int | None = 0

    def encode(self, texts: Sequence[bytes]) -> list[Tokens]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: Tokens) -> str:
        return tokens.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Nothing to write: it is known by its name."""


class SubwordTokenizer:
    """A tokenizer of the ``tokenizers`` library.

    Args:
        tokenizer: the library's.
        name: for people.
        end_name: the token that ends a document; found among ``END_NAMES`` where absent.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, name: str, end_name: str | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer, self.name = tokenizer, name
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        names = (end_name,) if end_name else END_NAMES
        self.end_name = next((known for known in names if tokenizer.token_to_id(known) is not None), None)
        self.end: int | None = None if self.end_name is None else tokenizer.token_to_id(self.end_name)

    @cached_property
    def digest(self) -> str:
        content = json.dumps([self.tokenizer.to_str(), self.end_name])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> list[Tokens]:
        strings = [text.decode("utf-8", "replace") for text in texts]
        found = self.tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    def decode(self, tokens: Tokens) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        write_atomic(folder / CONFIG_NAME, json.dumps({"eos_token": self.end_name}) + "\n")
        write_atomic(folder / JSON_NAME, self.tokenizer.to_str())


def find_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer that ``proxy.tokenizer`` names, except ``bpe``, which only a corpus can train.

    Raises:
        ConfigError: no such file or name, or the file is no tokenizer.
        EnvironmentUnfit: a pretrained one that is not on this machine, and there is no network.
    """
    if name in ("auto", "bytes"):
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / JSON_NAME
    if path.suffix == ".json" or path.exists():
        return read_tokenizer(path, name)
    from archsearch.proxy.hub import fetch_tokenizer

    folder = cache.entry({"tokenizer": name}, lambda folder: fetch_tokenizer(name, folder))
    return read_tokenizer(folder / JSON_NAME, name)


def read_tokenizer(path: Path, name: str) -> SubwordTokenizer:
    """A ``tokenizer.json``; ``tokenizer_config.json`` beside it names the token that ends a document.

    Raises:
        ConfigError: missing, unreadable or no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"proxy.tokenizer: cannot read {path}: {reason}", "give a tokenizer.json") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        reason = str(error).splitlines()[0]
        remedy = "give a tokenizer.json of the tokenizers library"
        raise ConfigError(f"proxy.tokenizer: {path} is not a tokenizer: {reason}", remedy) from None
    return SubwordTokenizer(tokenizer, name, _end_name(path.with_name(CONFIG_NAME)))


def _end_name(config: Path) -> str | None:
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> SubwordTokenizer:
    """A byte-level BPE with GPT-2's word pattern (Sennrich et al. 2016; Radford et al. 2019), trained on ``texts``.

    The same texts give the same tokenizer on any machine. Its vocabulary is smaller than asked where
    the texts hold too few pairs.

    Raises:
        ConfigError: ``vocab_size`` does not hold all bytes and the end of text.
    """
    if vocab_size <= BYTES:
        cause = f"vocab_size {vocab_size} is too small for a BPE, which starts from {BYTES} bytes and an end of text"
        raise ConfigError(cause, "set proxy.tokenizer to bytes, or raise vocab_size")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    log.info("training a BPE of %d tokens", vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    strings = (text.decode("utf-8", "replace") for text in _first(texts, BPE_BYTES))
    tokenizer.train_from_iterator(strings, trainer)
    return SubwordTokenizer(tokenizer, "bpe", END_OF_TEXT)


def _first(texts: Iterable[bytes], size: int) -> Iterator[bytes]:
    for text in texts:
        if size <= 0:
            return
        size -= len(text)
        yield text
