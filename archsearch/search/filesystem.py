"""What a folder lies on: the type of its file system, whether it is a network's, and its free space."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from archsearch.errors import StorageError

MOUNTS = Path("/proc/self/mounts")
NETWORK = re.compile(
    r"nfs4?|cifs|smb\w*|9p|afs|ceph|lustre|gpfs|beegfs|glusterfs|pvfs2|orangefs|ocfs2|gfs2|panfs|wekafs|"
    r"fuse\.(sshfs|glusterfs|ceph|s3fs|gcsfuse|rclone|juicefs|beegfs)"
)
"""Types on which SQLite's locks or a rename may not mean what they mean on a local disk."""


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path`` (or its nearest existing parent); "" where it cannot be told."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    folder = path.resolve()
    best, kind = -1, ""
    for line in lines:
        _, mount, found = line.split(" ")[:3]
        mounted = Path(_unescape(mount))
        # Later mounts hide earlier ones at the same place.
        if folder.is_relative_to(mounted) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), found
    return kind


def is_network(path: Path) -> bool:
    """Whether ``path`` lies on a network file system."""
    return NETWORK.fullmatch(file_system(path)) is not None


def refuse_network(path: Path) -> None:
    """Raise StorageError where ``path`` lies on a network file system."""
    if is_network(path):
        raise StorageError(
            f"{path} lies on a network file system ({file_system(path)}), where a study can be damaged",
            "choose a folder on a local disk with --out, and copy it when the search is over",
        )


def free_bytes(path: Path) -> int:
    """Free space for this user on the file system of ``path``, in bytes."""
    return shutil.disk_usage(path).free


def sync_folder(path: Path) -> None:
    """Make renames inside ``path`` survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unescape(mount: str) -> str:
    """Mount points write space, tab, newline and backslash as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount)
