"""The tokenizer that a model was trained with, as transformers loads it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from archsearch.config import ProxyConfig, split_data
from archsearch.proxy.data import load_corpus
from archsearch.proxy.tokenizer import JSON_NAME, ByteTokenizer, SubwordTokenizer, TextTokenizer, read_tokenizer

BYTES = 256


def trained_with(proxy: ProxyConfig, vocab_size: int, kept: Path) -> TextTokenizer | None:
    """The tokenizer of a training; None where the data were tokens of unknown origin.

    Args:
        proxy: how the model was trained.
        vocab_size: of the model.
        kept: the folder where the run kept its tokenizer. Without one, the corpus gives it again.
    """
    if (kept / JSON_NAME).is_file():
        return read_tokenizer(kept / JSON_NAME, proxy.tokenizer)
    if proxy.tokenizer == "bytes" or (proxy.tokenizer == "auto" and split_data(proxy.data)[0] != "tokens"):
        return ByteTokenizer()
    return load_corpus(proxy, vocab_size).tokenizer


def for_transformers(tokenizer: TextTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with the same ids. Nothing is added to a text: no start, no end."""
    if not isinstance(tokenizer, SubwordTokenizer):
        return byte_tokenizer()
    end = tokenizer.end_name
    names = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
    plain = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    plain.post_processor = None  # a template would add the start that the training never saw
    return PreTrainedTokenizerFast(tokenizer_object=plain, clean_up_tokenization_spaces=False, **names)


def byte_symbols() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers, by byte (GPT-2's table).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(BYTES) if byte not in printable]
    return [chr(byte) if byte in printable else chr(BYTES + others.index(byte)) for byte in range(BYTES)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Text to the bytes of its UTF-8, and back. No special tokens; nothing is added or lost."""
    symbols = byte_symbols()
    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
