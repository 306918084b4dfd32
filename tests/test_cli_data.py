"""``archsearch data``: prepares a corpus, says what it holds, and refuses what a run would refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from archsearch.cli import main
from archsearch.proxy import cache
from tests.kits.runs import TINY


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    rows = (json.dumps({"body": f"row {number} of a long and dull story\n" * 9}) + "\n" for number in range(200))
    (tmp_path / "story.jsonl").write_text("".join(rows))
    return tmp_path / "story.jsonl"


def test_facts_as_text(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "story.jsonl", "--set", "proxy.text_field=body", "--set", "proxy.context=64"]
    assert main([*words, "--tokenizer", "bpe", "--vocab-size", "400"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{story}: ")
    assert "training tokens in 1" in lines[0]
    assert lines[1].startswith("tokenizer bpe: ids below ")
    assert "epochs" in lines[2]
    assert str(story.parent / "cache") in lines[3]


def test_facts_as_json(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--set", "proxy.text_field=body", "--set", "proxy.corpus_tokens=9K", "--json"]
    assert main(["data", str(story), "--space", str(TINY), *flags]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["train"]["tokens"] + facts["validation"]["tokens"] >= 9000
    assert facts["truncated"] is True
    assert (facts["tokenizer"], facts["vocab_size"], facts["token_dtype"]) == ("bytes", 256, "uint8")
    assert Path(facts["cache"]).is_dir()
    assert facts["cache_bytes"] > 9000


def test_tokens_need_no_vocabulary(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.arange(60_000, dtype="<u2").tofile("train.bin")
    assert main(["data", "tokens:train.bin"]) == 0
    assert "tokenizer unknown: ids below 60,000 as uint16" in capsys.readouterr().out
    assert main(["data", "tokens:train.bin", "--space", str(TINY)]) == 3
    assert "which vocab_size 256 does not know" in capsys.readouterr().err


def test_a_run_refuses_its_data_before_anything_is_written(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in story.parent.iterdir()}
    assert main(["run", "--space", str(TINY), "--out", "run", "--set", "proxy.data=story.jsonl"]) == 3
    error = capsys.readouterr().err
    assert "story.jsonl:1: no field 'text'; known: body" in error
    assert {path.name for path in story.parent.iterdir()} - before <= {"cache"}
