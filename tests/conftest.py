"""What all tests share."""

from __future__ import annotations

import os

# Before numpy and torch are imported: the matrices of the tests are small, and the processes of a run share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
