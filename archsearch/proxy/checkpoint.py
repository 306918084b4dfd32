"""Checkpoints: safetensors files from which a training goes on as if it had never stopped.

A file holds the weights (``weight.NAME``), Adam's moments (``exp_avg.NAME``, ``exp_avg_sq.NAME``), and as
metadata the number of steps, the loss curve, and what the training was: architecture, seed, recipe, device
kind and implementation. Only that very training may continue from it.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from archsearch.errors import ArchsearchError, StorageError
from archsearch.files import to_json

Curve = tuple[tuple[int, float], ...]


class UnfitCheckpoint(ArchsearchError):
    """A checkpoint that is damaged, or that another training wrote."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is: ``steps`` made, and its validations (tokens, nats a token)."""

    steps: int
    curve: Curve


def save_checkpoint(path: Path, tensors: dict[str, Tensor], training: dict[str, Any], progress: Progress) -> None:
    """Write a checkpoint, all or nothing.

    Args:
        path: the file; an older one is replaced.
        tensors: weights and moments.
        training: plain data that identifies the training.
        progress: how far it is.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    done = {"steps": progress.steps, "curve": progress.curve}
    write_tensors(path, tensors, {"training": to_json(training, indent=None), "progress": to_json(done, indent=None)})


def load_checkpoint(path: Path, tensors: dict[str, Tensor], training: dict[str, Any]) -> Progress | None:
    """Copy a checkpoint into ``tensors``; None, and nothing copied, where there is no file.

    Everything is compared before the first number is copied, so that no training is ever half loaded.

    Raises:
        UnfitCheckpoint: the file is damaged, or another training wrote it.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check_same(path, json.loads(metadata["training"]), json.loads(to_json(training)))
            if set(file.keys()) != set(tensors):
                raise UnfitCheckpoint(f"{path} holds other tensors than this model", _REMEDY)
            found = {name: file.get_tensor(name) for name in tensors}
        progress = json.loads(metadata["progress"])
        curve = tuple((int(tokens), float(loss)) for tokens, loss in progress["curve"])
        steps = int(progress["steps"])
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise UnfitCheckpoint(f"{path} is no readable checkpoint: {error}", _REMEDY) from None
    for name, tensor in tensors.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise UnfitCheckpoint(f"{path}: {name} has another shape or type", _REMEDY)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
    return Progress(steps, curve)


_REMEDY = "remove the file to train from the start, or name another one"


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UnfitCheckpoint with the first difference between two descriptions of a training."""
    for part in wanted:
        there, here = found.get(part), wanted[part]
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            key = next(key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
            part, there, here = f"{part}.{key}", there.get(key), here.get(key)
        raise UnfitCheckpoint(f"{path} is of another training: {part} is {there!r} there, {here!r} here", _REMEDY)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors so that a crash leaves the old file or the new one, never a part.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, {"format": "pt", **metadata})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}", "free space or choose another folder") from error
