"""One training step: forward, backward, clipping, AdamW and projection, with nothing that waits for the device.

On a GPU the whole step is captured once in a CUDA graph and replayed: of a small model the launches cost
more than the work. The first steps run as they are; they compile and tune the kernels and are training steps
like all others, so that a capture costs no more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from archsearch.config import ProxyConfig
from archsearch.model.hybrid import HybridLM
from archsearch.proxy.loss import token_loss
from archsearch.proxy.optimizer import make_optimizer
from archsearch.proxy.weight_norm import WeightNormalization

EAGER_STEPS = 3
"""Steps before the capture: kernels tune themselves in the first, and the allocator settles in the others."""


Loss = Callable[[HybridLM, Tensor, torch.dtype], Tensor]
"""Of a model, a batch and the type of matrix products: the mean loss []."""


class TrainingStep:
    """Updates ``model`` in place; inputs and results are tensors of fixed address.

    Args:
        model: on ``device``.
        config: the recipe.
        dtype: of matrix products.
        device: where to train.
        loss: of a batch; next tokens of windows [B, context + 1] if absent.
        shape: of a batch that ``loss`` takes.

    Attributes:
        optimizer: AdamW of all parameters.
        loss: the training loss of the last step, fp32 [].
        diverged: whether any loss so far was not finite, bool [].
    """

    def __init__(
        self,
        model: HybridLM,
        config: ProxyConfig,
        dtype: torch.dtype,
        device: torch.device,
        loss: Loss | None = None,
        shape: Sequence[int] = (),
    ) -> None:
        self.model, self.config, self.dtype, self.device = model, config, dtype, device
        self.loss_of = loss or mean_loss
        self.optimizer = make_optimizer(model, config)
        self.normalize = WeightNormalization(model) if config.weight_normalization else lambda: None
        self.normalize()
        self.batch = torch.zeros(*(shape or (config.batch, config.context + 1)), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.diverged = torch.zeros((), dtype=torch.bool, device=device)
        self.path = "cuda graph" if device.type == "cuda" and config.cuda_graph else "eager"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device) if self.path == "cuda graph" else None
        self._taken = 0

    @property
    def settled(self) -> bool:
        """Whether kernels are compiled and the step is captured, where it is captured at all."""
        if self.path == "cuda graph":
            return self._graph is not None
        return self.device.type == "cpu" or self._taken >= EAGER_STEPS

    def __call__(self, batch: Tensor, rate: float) -> Tensor:
        """Train on one batch, int64, at learning rate ``rate``; gives ``loss``."""
        self.batch.copy_(batch, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)
        if self.path == "eager":
            self._update()
        elif self._taken < EAGER_STEPS:
            self._on_side_stream()
        else:
            self._replay()
        self._taken += 1
        return self.loss

    def release(self) -> None:
        """Give back the memory of the gradients and of the graph; the weights stay."""
        self._graph = None
        self.optimizer.zero_grad(set_to_none=True)

    def _update(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(self.model, self.batch, self.dtype)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip, foreach=True)
        self.optimizer.step()
        self.normalize()
        self.loss.copy_(loss.detach())
        self.diverged.logical_or_(~torch.isfinite(self.loss))

    def _on_side_stream(self) -> None:
        """Run a step where the capture will follow: work of the default stream cannot be captured."""
        assert self._stream is not None
        before = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            self._update()
        before.wait_stream(self._stream)

    def _replay(self) -> None:
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._update()
        self._graph.replay()


def mean_loss(model: HybridLM, windows: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean loss of windows [B, context + 1] with matrix products in ``dtype``, nats a token."""
    with torch.autocast(windows.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        return token_loss(model, model.hidden(windows[:, :-1]), windows[:, 1:])


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products that ``proxy.dtype`` names; ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32
