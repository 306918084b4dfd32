"""The cache on disk: folders that are written whole or not at all, once, by one of many processes.

Each entry is named by a hash of what it was made of. It is filled in a hidden folder beside its place,
under a lock that the kernel frees when its holder dies, and renamed when complete; checksums find what
was damaged since. ``ARCHSEARCH_CACHE`` moves the cache; else it lies where the platform keeps caches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from archsearch.errors import StorageError
from archsearch.files import to_json

VARIABLE = "ARCHSEARCH_CACHE"
FORMAT = 1
"""Part of every entry's name, so that a newer layout never meets an older one."""
CHUNK = 2**26
"""Bytes a checksum covers."""
CHECKED_CHUNKS = 64
"""Chunks of a file that are read at each opening, spread evenly: all of a file up to 4 GiB."""
META = "meta.json"
DRAFT = ".draft-"
Build = Callable[[Path], Mapping[str, Any] | None]
log = logging.getLogger(__name__)


def cache_root() -> Path:
    """The folder of the cache; it need not exist yet."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "archsearch"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "archsearch"


def entry(key: Mapping[str, Any], build: Build) -> Path:
    """The folder of ``key``; ``build`` fills it where it is missing or damaged, in one process at a time.

    Args:
        key: plain data; equal keys share an entry.
        build: given an empty folder to fill; what it returns is kept for ``facts``.

    Raises:
        StorageError: the cache cannot be written.
    """
    content = json.dumps([FORMAT, key], sort_keys=True).encode()
    folder = cache_root() / hashlib.blake2b(content, digest_size=12).hexdigest()
    if damage(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if (reason := damage(folder)) is not None:
                if reason:
                    log.warning("the cache entry %s is damaged (%s) and is made again", folder, reason)
                _make(folder, build)
    except OSError as error:
        remedy = f"free space, or set {VARIABLE} to another folder"
        raise StorageError(f"cannot write the cache {folder.parent}: {error.strerror or error}", remedy) from error
    return folder


def facts(folder: Path) -> dict[str, Any]:
    """What ``build`` returned for a complete entry."""
    return dict(_meta(folder)["facts"])


def damage(folder: Path, *, whole: bool = False) -> str | None:
    """Why an entry cannot be used: None where it can, an empty string where there is none.

    Args:
        folder: of the entry.
        whole: read every byte, where otherwise large files are sampled.
    """
    if not folder.exists():
        return ""
    try:
        files = _meta(folder)["files"]
        for name, (size, wanted) in files.items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            step = 1 if whole else max(1, -(-len(wanted) // CHECKED_CHUNKS))
            for index in range(0, len(wanted), step):
                if _checksum(path, index) != wanted[index]:
                    return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{META} or what it names cannot be read: {error}"
    return None


def size(folder: Path) -> int:
    """Bytes on disk."""
    return sum(path.stat().st_size for path in folder.iterdir())


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that fills the cache entry %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, build: Build) -> None:
    _sweep(folder)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}{DRAFT}"))
    try:
        found = build(draft) or {}
        files = {path.name: _sealed(path) for path in sorted(draft.iterdir())}
        meta = {"format": FORMAT, "facts": found, "files": files}
        (draft / META).write_text(to_json(meta), encoding="utf-8")
        _sync(draft / META)
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _sweep(folder: Path) -> None:
    """Remove what killed processes left: drafts of this entry, whose lock is ours, and of those that nobody fills."""
    from filelock import FileLock, Timeout

    for left in folder.parent.glob(f".*{DRAFT}*"):
        name = left.name.split(DRAFT)[0]
        if name == f".{folder.name}":
            shutil.rmtree(left)
            continue
        with suppress(Timeout), FileLock(folder.with_name(f"{name}.lock"), timeout=0):
            shutil.rmtree(left)


def _sealed(path: Path) -> tuple[int, list[int]]:
    """Size and checksums of a file that is safe on disk."""
    _sync(path)
    size = path.stat().st_size
    return size, [_checksum(path, index) for index in range(-(-size // CHUNK))]


def _checksum(path: Path, index: int) -> int:
    with path.open("rb") as file:
        file.seek(index * CHUNK)
        left, found = CHUNK, 0
        while left and (block := file.read(min(left, 2**20))):
            found = zlib.crc32(block, found)
            left -= len(block)
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    return meta
