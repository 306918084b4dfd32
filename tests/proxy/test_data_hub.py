"""The hub: datasets as a stream and pretrained tokenizers, from a hub on this machine; and no hub at all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archsearch.config import ProxyConfig
from archsearch.errors import ConfigError, EnvironmentUnfit
from archsearch.proxy import cache
from archsearch.proxy.data import load_corpus
from archsearch.proxy.tokenizer import train_bpe
from tests.kits.hub import COMMIT, hub

ROWS = [f"row {number} of a dull story, told again and again" for number in range(300)]
CARD = b"---\nconfigs:\n- config_name: stories\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n"
SCRIPT = """
import json, sys, time
from archsearch.config import ProxyConfig
from archsearch.errors import ArchsearchError
from archsearch.proxy.data import load_corpus
for settings in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        corpus = load_corpus(ProxyConfig(context=16, **settings), 400)
        found = {"train": corpus.train.tobytes().hex(), "validation": corpus.validation.tobytes().hex(),
                 "documents": [corpus.train_documents, corpus.validation_documents],
                 "tokenizer": corpus.tokenizer.vocab_size, "bytes": corpus.bytes_per_token}
    except ArchsearchError as error:
        found = {"kind": type(error).__name__, "cause": error.cause, "remedy": error.remedy}
    print(json.dumps({**found, "seconds": time.monotonic() - start}), flush=True)
"""


def parquet(rows: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": rows, "score": [1.0] * len(rows)}), buffer)
    return buffer.getvalue()


def in_a_process(home: Path, settings: list[dict[str, Any]], **variables: str) -> list[dict[str, Any]]:
    """Each corpus in turn: the hub's libraries read their variables only once, when they are imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(home / "hf"), "ARCHSEARCH_CACHE": str(home / "cache"), **variables}
    command = [sys.executable, "-c", SCRIPT, json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_datasets_and_tokenizers_of_a_hub(tmp_path: Path) -> None:
    tokenizer = train_bpe([row.encode() for row in ROWS], 350)
    tokenizer.save(tmp_path)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    files = {
        "README.md": CARD,
        "data/a.parquet": parquet(ROWS[:200]),
        "data/b.parquet": parquet(ROWS[200:]),
        **{name: (tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")},
    }
    data = "hf:owner/name/stories"
    settings = [
        {"data": data},
        {"data": data, "tokenizer": "owner/name"},
        {"data": data, "corpus_tokens": 2000},
        {"data": f"hf:{tmp_path / 'local'}"},
        {"data": "hf:owner/name/nope"},
        {"data": data, "split": "test"},
        {"data": data, "text_field": "txt"},
        {"data": data, "text_field": "score"},
        {"data": "hf:owner/other"},
        {"data": data, "tokenizer": "owner/other"},
    ]
    with hub("owner/name", files) as address:
        found = in_a_process(tmp_path, settings, HF_ENDPOINT=address)
    whole, pretrained, part, local = found[:4]
    documents = {*bytes.fromhex(whole["train"] + whole["validation"]).decode().split("\0")} - {""}
    assert documents == {*ROWS}
    assert sum(whole["documents"]) == sum(local["documents"]) == 300
    assert whole["train"] == local["train"]
    assert pretrained["tokenizer"] == tokenizer.vocab_size
    assert pretrained["bytes"] > 2
    assert whole["train"].startswith(part["train"])
    assert len(part["train"] + part["validation"]) // 2 <= 2100
    assert [error["kind"] for error in found[4:]] == ["ConfigError"] * 6
    causes = ["Available: ['stories']", "Available splits: ['train']", "did you mean 'text'", "is a float, not text",
              "404", "404"]  # fmt: skip
    for error, cause in zip(found[4:], causes, strict=True):
        assert cause in error["cause"], error
    # What was prepared serves where there is no network, for the tokenizer, too.
    again = in_a_process(tmp_path, [*settings[:2], {"data": f"{data}@{COMMIT}"}], HF_HUB_OFFLINE="1")
    for first, second in zip(found[:2], again[:2], strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert again[2]["kind"] == "EnvironmentUnfit"
    assert "HF_HUB_OFFLINE forbids" in again[2]["cause"]
    assert not any(".draft-" in path.name for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("settings", [{"data": "hf:owner/name"}, {"tokenizer": "owner/name"}])
def test_without_a_network_the_error_comes_at_once(tmp_path: Path, settings: dict[str, str]) -> None:
    (found,) = in_a_process(tmp_path, [settings], HF_ENDPOINT="http://127.0.0.1:9")
    assert found["kind"] == "EnvironmentUnfit"
    assert "the hub does not answer" in found["cause"]
    assert "archsearch data" in found["remedy"]
    assert found["seconds"] < 20
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"], "no half-written entry"


def test_names_that_are_none() -> None:
    for name in ("hf:", "hf:owner/", "hf:./none"):
        with pytest.raises(ConfigError, match=r"names no dataset|does not exist"):
            load_corpus(ProxyConfig(data=name), 256)
    for name in ("no such name!", "a/b/c/d"):
        with pytest.raises(ConfigError, match="no file and no name"):
            load_corpus(ProxyConfig(tokenizer=name), 256)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(parquet(ROWS))
    for package, data in (("pyarrow", str(tmp_path / "rows.parquet")), ("datasets", f"hf:{tmp_path}")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(EnvironmentUnfit, match=package) as missing:
            load_corpus(ProxyConfig(data=data, context=16), 256)
        assert "archsearch[data]" in missing.value.remedy


def test_forbidden_network_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = set(cache.cache_root().iterdir()) if cache.cache_root().exists() else set()
    start = time.monotonic()
    with pytest.raises(EnvironmentUnfit, match="forbids the network"):
        load_corpus(ProxyConfig(data="hf:owner/name"), 256)
    assert time.monotonic() - start < 10
    assert all(path.suffix == ".lock" for path in set(cache.cache_root().iterdir()) - before)
