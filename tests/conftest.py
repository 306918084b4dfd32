"""What all tests share: one thread a process, and a cache of their own, so that none touches the user's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

# Before numpy and torch are imported: the matrices of the tests are small, and the processes of a run share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests() -> Iterator[None]:
    """One folder a session: a corpus is tokenised once. Processes that tests start inherit it."""
    before = os.environ.get("ARCHSEARCH_CACHE")
    with tempfile.TemporaryDirectory(prefix="archsearch-tests-") as folder:
        os.environ["ARCHSEARCH_CACHE"] = folder
        yield
    if before is None:
        del os.environ["ARCHSEARCH_CACHE"]
    else:
        os.environ["ARCHSEARCH_CACHE"] = before
