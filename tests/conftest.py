"""What all tests share."""

from __future__ import annotations

import os

# Before numpy and torch are imported: the matrices of the tests are small, and the processes of a run share the cores.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
