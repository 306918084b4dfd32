"""What every test shares: a cache of its own, so that none reads or fills the user's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest


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
