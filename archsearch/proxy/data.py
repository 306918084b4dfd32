"""Text and tokens for the proxy: ``load_corpus`` gives what the config names, tokenised once on this machine.

========================  ====================================================================
``builtin:python``        the source of Python's standard library, found wherever Python is
``files:PATH``, ``PATH``  text, JSON lines (also ``.gz``), Parquet: a file, a folder or a glob
``tokens:PATH``           arrays of tokens by nanoGPT, llm.c, Megatron-LM or NumPy
``hf:OWNER/NAME``         a Hugging Face dataset, ``/CONFIG`` and ``@REVISION`` behind it
========================  ====================================================================
"""

from __future__ import annotations

from functools import lru_cache

from archsearch.config import ProxyConfig, split_data
from archsearch.errors import ConfigError
from archsearch.proxy import cache
from archsearch.proxy.corpus import Corpus, read_corpus, write_corpus
from archsearch.proxy.feed import feed
from archsearch.proxy.sources import open_source
from archsearch.proxy.tokenizer import BPE_BYTES, TextTokenizer, find_tokenizer
from archsearch.proxy.windows import Windows, validation_windows

__all__ = ["Corpus", "Windows", "feed", "load_corpus", "validation_windows"]

DATA_FIELDS = ("data", "tokenizer", "text_field", "split", "token_dtype", "corpus_tokens")
"""What of the config decides the corpus."""
BPE_VOCABULARY = 2**15
"""Of a BPE that no model asks for yet."""


def load_corpus(config: ProxyConfig, vocab_size: int | None) -> Corpus:
    """The corpus that ``config`` names, for models of ``vocab_size``; None takes any vocabulary.

    It is tokenised at the first call on this machine; every later one, in any process, maps it from the
    cache. In one process it is opened once, and stays as it was then. Documents are held out by a hash,
    about one in twenty; at least one is, and never all.

    Raises:
        ConfigError: missing, empty, unreadable, binary or too short data; a tokenizer that does not match
            it, or that needs a larger vocabulary.
        EnvironmentUnfit: a package or the network is missing.
        StorageError: the cache cannot be written.
    """
    fields = {name: getattr(config, name) for name in DATA_FIELDS}
    corpus = _load(ProxyConfig(**fields), vocab_size)
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= config.context:
            cause = f"{config.data}: too short: {len(tokens)} {part} tokens for sequences of {config.context}"
            remedy = "give more text or more documents in proxy.data, or lower proxy.context"
            raise ConfigError(cause, "raise proxy.corpus_tokens" if corpus.truncated else remedy)
    return corpus


@lru_cache(maxsize=4)
def _load(config: ProxyConfig, vocab_size: int | None) -> Corpus:
    tokenizer = _tokenizer(config, vocab_size)
    source = open_source(config)
    bpe = (vocab_size or BPE_VOCABULARY) if config.tokenizer == "bpe" else None
    key = {
        "source": source.fingerprint(),
        "tokenizer": tokenizer.digest if tokenizer else None,
        "bpe": [bpe, BPE_BYTES] if bpe else None,
        "limit": config.corpus_tokens,
    }
    limit = config.corpus_tokens
    folder = cache.entry(key, lambda folder: write_corpus(folder, source, tokenizer, bpe=bpe, limit=limit))
    corpus = read_corpus(config.data, folder, cache.facts(folder), tokenizer)
    if vocab_size is not None:
        _check_vocabulary(config, corpus, vocab_size)
    return corpus


def _tokenizer(config: ProxyConfig, vocab_size: int | None) -> TextTokenizer | None:
    """What tokenises, or did; None for a BPE that is yet to train, and for tokens of unknown origin."""
    tokens = split_data(config.data)[0] == "tokens"
    if config.tokenizer == "bpe" and tokens:
        cause = f"proxy.tokenizer bpe needs text, and {config.data} holds tokens"
        raise ConfigError(cause, "set proxy.tokenizer to what wrote them, or to auto where you do not know")
    if config.tokenizer == "bpe" or (tokens and config.tokenizer == "auto"):
        return None
    tokenizer = find_tokenizer(config.tokenizer)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        cause = f"vocab_size {vocab_size} is below {tokenizer.vocab_size}, the ids of the tokenizer {tokenizer.name}"
        raise ConfigError(cause, f"set vocab_size to at least {tokenizer.vocab_size}, or another proxy.tokenizer")
    return tokenizer


def _check_vocabulary(config: ProxyConfig, corpus: Corpus, vocab_size: int) -> None:
    if corpus.vocab_size > vocab_size:
        cause = f"{config.data} holds token {corpus.vocab_size - 1}, which vocab_size {vocab_size} does not know"
        raise ConfigError(cause, "raise vocab_size to that of the tokenizer that wrote it, or check token_dtype")
    held = 2 ** (8 * corpus.train.itemsize)
    if split_data(config.data)[0] == "tokens" and vocab_size > held:
        cause = f"vocab_size {vocab_size} is larger than the {held} ids that {config.data} can name"
        raise ConfigError(cause, "set vocab_size to that of the tokenizer that wrote it, or check token_dtype")
