"""The command that prepares a corpus and says what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archsearch.commands.settings import as_overrides, load_section
from archsearch.commands.spaces import duration, mebibytes
from archsearch.config import ProxyConfig, absolute, load_config
from archsearch.errors import StorageError


def prepare(
    source: str | None, space: Path | None, tokenizer: str | None, vocab_size: int | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Tokenise what a run would train on, or find it in the cache and check every byte; the facts as plain data.

    Args:
        source: in place of ``proxy.data``.
        space: takes the proxy settings and the vocabulary from here.
        tokenizer: in place of ``proxy.tokenizer``.
        vocab_size: in place of the space's.
        overrides: ``proxy.key=value``.

    Raises:
        ArchsearchError: as ``load_corpus`` does.
    """
    from archsearch.proxy import cache
    from archsearch.proxy.data import load_corpus

    flags = as_overrides({"proxy.data": source, "proxy.tokenizer": tokenizer})
    config = absolute(load_section("proxy", ProxyConfig, space, [*overrides, *flags]))
    if vocab_size is None:
        vocab_size = load_config(space).space.vocab_size if space else None
    corpus = load_corpus(config, vocab_size)
    if reason := cache.damage(corpus.path, whole=True):
        raise StorageError(f"the cache entry {corpus.path} is damaged: {reason}", "remove that folder and try again")
    facts = cache.facts(corpus.path)
    return {
        "data": config.data,
        "train": {"tokens": len(corpus.train), "documents": corpus.train_documents},
        "validation": {"tokens": len(corpus.validation), "documents": corpus.validation_documents},
        "truncated": corpus.truncated,
        "tokenizer": corpus.tokenizer.name if corpus.tokenizer else None,
        "vocab_size": corpus.vocab_size,
        "token_dtype": corpus.train.dtype.name,
        "bytes_per_token": corpus.bytes_per_token,
        "epochs": config.tokens / len(corpus.train),
        "digest": corpus.digest,
        "cache": str(corpus.path),
        "cache_bytes": cache.size(corpus.path),
        "seconds": facts["seconds"],
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """What ``prepare`` found, as text."""
    parts = [_part(name, facts[name]) for name in ("train", "validation")]
    worth = f", {facts['bytes_per_token']:.2f} bytes a token" if facts["bytes_per_token"] else ""
    tokenizer = facts["tokenizer"] or "unknown"
    found = [
        f"{facts['data']}: {', '.join(parts)}",
        f"tokenizer {tokenizer}: ids below {facts['vocab_size']:,} as {facts['token_dtype']}{worth}",
        f"the training budget is {facts['epochs']:.2f} epochs",
        f"cached in {facts['cache']}: {mebibytes(facts['cache_bytes'])}, made in {duration(facts['seconds'])}",
    ]
    if facts["truncated"]:
        found.insert(1, "only a part: proxy.corpus_tokens is reached")
    return found


def _part(name: str, part: dict[str, int]) -> str:
    documents = f" in {part['documents']:,} documents" if part["documents"] else ""
    return f"{part['tokens']:,} {'training' if name == 'train' else name} tokens{documents}"
