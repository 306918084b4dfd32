"""Linear algebra on one thread: the matrices of a proposal are small, and its cores belong to the workers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


def one_thread() -> AbstractContextManager[Any]:
    """Inside, BLAS and OpenMP libraries that were loaded at the first call use one thread."""
    limit: AbstractContextManager[Any] = _controller().limit(limits=1)
    return limit


@cache
def _controller() -> ThreadpoolController:
    # Looking for the libraries takes milliseconds, telling them to use one thread microseconds.
    return ThreadpoolController()
