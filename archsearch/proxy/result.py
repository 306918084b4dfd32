"""What a proxy training gives: its result, or the error of one that diverged."""

from __future__ import annotations

from dataclasses import dataclass

from archsearch.errors import ArchsearchError
from archsearch.model.hybrid import HybridLM
from archsearch.proxy.checkpoint import Curve


class NonFiniteLoss(ArchsearchError):
    """The loss became NaN or infinite after ``tokens`` tokens; ``curve`` holds the validations before."""

    exit_code = 3

    def __init__(self, tokens: int, curve: Curve) -> None:
        super().__init__(f"the loss is not finite after {tokens} tokens", "lower proxy.learning_rate")
        self.tokens, self.curve = tokens, curve

    def __reduce__(self) -> tuple[type[NonFiniteLoss], tuple[int, Curve]]:  # type: ignore[override]
        return type(self), (self.tokens, self.curve)


@dataclass(frozen=True, slots=True)
class ProxyResult:
    """What a proxy training found.

    Attributes:
        loss: last validation loss, nats a token.
        curve: (tokens trained, validation loss) at each validation.
        tokens: tokens trained, those before the checkpoint that it went on from included.
        tokens_per_second: of the steps in this process after the first ones, which compile; 0 where there were none.
        seconds: of the phases data, build, kernels, compile, train, validate, checkpoint, in this process.
        resumed: tokens of the checkpoint that it went on from; 0 from scratch.
        stopped: the rung at which ``keep_going`` ended it; None when it trained to its end.
        paths: implementation that each operator kind, the step and the loss trained with.
        dtype: of the matrix products.
        model: the trained model, in fp32.
    """

    loss: float
    curve: Curve
    tokens: int
    tokens_per_second: float
    seconds: dict[str, float]
    paths: dict[str, str]
    dtype: str
    model: HybridLM
    resumed: int = 0
    stopped: int | None = None
