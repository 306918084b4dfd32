"""AdamW of the proxy, and its moments as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from archsearch.config import ProxyConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square."""


def make_optimizer(model: nn.Module, config: ProxyConfig) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices and leaves norms, biases and other vectors alone.

    The learning rate is a tensor on the model's device, changed in place, so that a captured step reads it.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        groups,
        lr=torch.tensor(config.learning_rate, device=device),
        betas=(config.beta1, config.beta2),
        fused=True,
        capturable=device.type == "cuda",
    )
    set_step(optimizer, 0)
    return optimizer


@torch.no_grad()
def set_step(optimizer: torch.optim.AdamW, step: int) -> None:
    """Tell the optimizer how many steps there were; the moments of a fresh one are zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            state["step"] = torch.tensor(float(step), device=parameter.device)


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> Iterator[tuple[str, Tensor]]:
    """(``exp_avg.NAME`` or ``exp_avg_sq.NAME``, the tensor itself) of every parameter of ``model``."""
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            yield f"{moment}.{name}", optimizer.state[parameter][moment]
