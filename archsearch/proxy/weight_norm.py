"""Weight normalization (Nemotron-Flash, arXiv 2511.18890, section 3.3): unit vectors along the model dimension.

After every step each row of a matrix that reads the residual stream, and each column of one that writes to
it, is divided by its 2-norm: ``W[i, :] /= |W[i, :]|`` and ``W[:, j] /= |W[:, j]|``. Layers say which of their
matrices are which (``Layer.stream_matrices``). The head reads the stream; a row of the embedding is what it
writes, so that both are normalised by row and tied ones agree. The released code divides each logit by the norm
of its row of the head; here that norm is 1 after every step, so that plain logits are those logits, and
decoding and export need to know nothing of it. Convolutions, gains, biases and meta tokens are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archsearch.model.hybrid import HybridLM

TINY = 1e-12
"""Least norm to divide by, so that a vector of zeros stays one."""


class WeightNormalization:
    """Projects the weights of ``model`` in place, in one pass over each matrix; calls can be captured in a graph."""

    def __init__(self, model: HybridLM) -> None:
        self.rows = [model.embed_tokens.weight, *([] if model.lm_head is None else [model.lm_head.weight])]
        self.columns: list[Tensor] = []
        for layer in model.layers:
            reading, writing = layer.op.stream_matrices()
            self.rows += reading
            self.columns += writing
        self._tables: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        """Normalise everything."""
        if self.rows[0].is_cuda:
            self.launch()
            return
        for matrices, along in ((self.rows, 1), (self.columns, 0)):
            for matrix in matrices:
                matrix.div_(torch.linalg.vector_norm(matrix, dim=along, keepdim=True).clamp_min(TINY))

    def launch(self) -> None:
        """Normalise everything with two kernels, one for all rows and one for all columns."""
        from archsearch.proxy import kernels

        if self._tables is None:
            self._tables = kernels.row_table(self.rows), kernels.column_table(self.columns)
        hidden = self.rows[0].shape[1]
        kernels.normalize_rows_(self._tables[0], hidden)
        kernels.normalize_columns_(self._tables[1], hidden)
