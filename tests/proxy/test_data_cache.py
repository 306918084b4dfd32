"""The cache: one process builds, others wait, the dead leave nothing behind, damage is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from archsearch.config import ProxyConfig
from archsearch.errors import ConfigError, StorageError
from archsearch.proxy import cache, data
from archsearch.proxy.data import load_corpus

KEY = {"a": 1}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(folder: Path) -> Mapping[str, int]:
    (folder / "big.bin").write_bytes(b"0123456789" * 1000)
    return {"answer": 42}


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | variables, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def test_an_entry_is_built_once(root: Path) -> None:
    folder = cache.entry(KEY, build)
    assert cache.entry(KEY, lambda folder: pytest.fail("built twice")) == folder
    assert cache.facts(folder) == {"answer": 42}
    assert cache.entry({"a": 2}, build) != folder
    assert cache.size(folder) > 10_000


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "meta", "empty meta"])
def test_damage_is_found_said_and_mended(root: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = cache.entry(KEY, build)
    path = folder / "big.bin"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    if harm == "flip":
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1])
    elif harm == "remove":
        path.unlink()
    else:
        (folder / cache.META).write_text("" if harm == "empty meta" else "[]")
    assert cache.damage(folder)
    assert cache.entry(KEY, build) == folder
    assert "is damaged" in caplog.text
    assert "made again" in caplog.text
    assert cache.damage(folder, whole=True) is None


def test_a_failed_build_leaves_nothing(root: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise ConfigError("no", "yes")

    with pytest.raises(ConfigError):
        cache.entry(KEY, fail)
    assert [path.suffix for path in root.iterdir()] == [".lock"]
    assert cache.entry(KEY, build)


def test_a_full_disk_leaves_nothing(root: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left") as full:
        cache.entry(KEY, fail)
    assert "ARCHSEARCH_CACHE" in full.value.remedy
    assert [path.suffix for path in root.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("/proc/nowhere", "/dev/null"):
        monkeypatch.setenv(cache.VARIABLE, place)
        with pytest.raises(StorageError, match="cannot write the cache"):
            cache.entry(KEY, build)


def test_a_corpus_in_a_cache_that_is_read_only(root: Path, tmp_path: Path) -> None:
    folder = cache.entry(KEY, build)
    (root / f".{folder.name}.lock").unlink()
    before = sorted(root.iterdir())
    assert cache.entry(KEY, build) == folder
    assert sorted(root.iterdir()) == before, "a complete entry needs no lock"


def test_many_processes_build_once(root: Path) -> None:
    code = """
        import os, time
        from archsearch.proxy import cache
        def build(folder):
            print("built", flush=True)
            time.sleep(0.5)
            (folder / "big.bin").write_bytes(b"x" * 10000)
        folder = cache.entry({"a": 1}, build)
        assert cache.damage(folder) is None
    """
    processes = [start(code) for _ in range(4)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert sum(out.count("built") for out, _ in results) == 1


@pytest.mark.parametrize("other", [KEY, {"a": 2}], ids=["same entry", "another entry"])
def test_a_killed_builder_leaves_nothing_half_written(root: Path, other: dict[str, int]) -> None:
    code = """
        import time
        from archsearch.proxy import cache
        def build(folder):
            (folder / "big.bin").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
        cache.entry({"a": 1}, build)
    """
    process = start(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any(".draft-" in path.name for path in root.iterdir())
    begin = time.monotonic()
    folder = cache.entry(other, build)
    assert time.monotonic() - begin < 10, "the lock died with its holder"
    assert (folder / "big.bin").stat().st_size == 10_000
    assert not any(".draft-" in path.name for path in root.iterdir())


def test_a_damaged_corpus_is_tokenised_again(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text").write_text("a line of text\n" * 2000)
    config = ProxyConfig(data=str(tmp_path / "text"), context=16)
    data._load.cache_clear()
    corpus = load_corpus(config, 256)
    path = corpus.path / "train.bin"
    content = bytearray(path.read_bytes())
    content[77] ^= 8
    path.write_bytes(content)
    data._load.cache_clear()
    again = load_corpus(config, 256)
    assert again.digest == corpus.digest
    assert bytes(again.train[:15]) == b"a line of text\n"
    assert caplog.text.count("is damaged") == 1


def test_memory_does_not_grow_with_the_corpus(root: Path, tmp_path: Path) -> None:
    size = 96 * 2**20
    with (tmp_path / "text").open("wb") as file:
        for number in range(size // 2**20):
            file.write((b"%07d: a long and dull line of text\n" % number * 2**15)[: 2**20])
    code = f"""
        import resource
        from archsearch.config import ProxyConfig
        from archsearch.proxy.data import Windows, load_corpus, validation_windows
        used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
        limit = used + {size // 3}  # of memory of its own, mapped files left out
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            bytearray({size // 2})
        except MemoryError:
            print("the limit holds")
        corpus = load_corpus(ProxyConfig(data={str(tmp_path / "text")!r}), 256)
        assert Windows(corpus.train, 1024, 0).batch(10**6, 8).shape == (8, 1025)
        assert len(validation_windows(corpus.validation, 1024, 10**5)) == 97
        print(len(corpus.train) + len(corpus.validation) - 2)
    """
    out, err = start(code).communicate(timeout=120)
    assert out.split() == ["the", "limit", "holds", str(size)], err


@pytest.mark.parametrize(("variables", "expected"), [
    ({"ARCHSEARCH_CACHE": "/somewhere"}, "/somewhere"),
    ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/archsearch"),
    ({"HOME": "/home/me"}, "/home/me/.cache/archsearch"),
])  # fmt: skip
def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("ARCHSEARCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_root()) == expected
