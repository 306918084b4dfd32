"""Fast decoding: an architecture as a chain of kernel launches a token, and that chain as a CUDA graph.

Everything of a step is on the device (embedding, operators, head, choice of the token, position), nothing is
allocated after construction, so a graph of one or several steps can be replayed without the host looking on.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import cast

import torch
from torch import Tensor

from archsearch.errors import EnvironmentUnfit, UsageError
from archsearch.model.hybrid import DecodeState, HybridLM, Residual
from archsearch.model.kernels import TORCH, TRITON, Kernels
from archsearch.model.kernels.chains import build_chain
from archsearch.model.kernels.projection import Norm, head_parts, kernel_count
from archsearch.model.kernels.workspace import Chain, Workspace

WARM_UP = 3
"""Steps run before a capture: each kernel is compiled and loaded by then."""


class DecodePlan:
    """Greedy decoding of ``batch`` sequences, at most ``length`` tokens each besides the model's meta tokens.

    Merged copies of the weights are made, so the model is not needed after construction. Caches of keys and values
    start with random numbers: what is not stored is never read, and reading zeros would be cheaper than real data.

    Attributes:
        logits: [B, vocab], what the last step predicts for the next token.
        token: [B] in int64, the token that the next step reads; a step replaces it by its most likely successor.
        position: [] in int64, tokens stored so far, meta tokens included.
        capacity: tokens that fit, meta tokens included.
        meta: number of meta tokens.

    Raises:
        UsageError: a batch or length below 1, or a model that is neither bf16, fp16 nor fp32.
    """

    def __init__(self, model: HybridLM, batch: int, length: int, kernels: Kernels | None = None) -> None:
        embedding = model.embed_tokens.weight.detach()
        if batch < 1 or length < 1:
            raise UsageError(f"batch {batch} of {length} tokens", "decode at least one sequence of one token")
        if embedding.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UsageError(f"decoding in {embedding.dtype}", "convert the model to bfloat16, float16 or float32")
        vocabulary, width = embedding.shape
        kernels = kernels or (TRITON if embedding.is_cuda else TORCH)
        self.batch, self.meta, self.capacity = batch, model.n_meta, length + model.n_meta
        self.embedding = embedding
        self.token = torch.zeros(batch, dtype=torch.int64, device=embedding.device)
        self.position = torch.zeros((), dtype=torch.int64, device=embedding.device)
        self.logits = embedding.new_zeros(batch, vocabulary)
        self.hidden = embedding.new_zeros(batch, width)
        work = Workspace(kernels, batch, self.capacity, self.hidden, self.position)
        head = embedding if model.lm_head is None else model.lm_head.weight.detach()
        self.chains = [build_chain(cast(Residual, layer), work) for layer in model.layers]
        self._start = model.begin(model.allocate_state(1, 1)) if self.meta else None
        self._end = self._ending(head, Norm(model.norm.eps, gain=model.norm.weight.detach()), kernels)
        self.begin()

    def _ending(self, weight: Tensor, norm: Norm, kernels: Kernels) -> Chain:
        """Final norm, head, choice, look-up."""
        parts = head_parts(self.batch, *weight.shape)
        best = torch.zeros(self.batch, parts, device=weight.device)
        best_row = torch.zeros(self.batch, parts, dtype=torch.int32, device=weight.device)
        head = partial(kernels.head, self.hidden, weight, self.logits, best, best_row, norm)
        select = partial(kernels.select, best, best_row, self.embedding, self.token, self.hidden, self.position)
        return Chain("head", [head, select])

    def step(self) -> None:
        """Launch one token: read ``token``, write ``logits``, ``token`` and ``position``."""
        for chain in (*self.chains, self._end):
            for launch in chain.launches:
                launch()

    def feed(self, token: Tensor) -> None:
        """Make ``token`` [B] the one that the next step reads."""
        self.token.copy_(token)
        self.hidden.copy_(self.embedding[self.token])

    def begin(self) -> None:
        """Forget all tokens but the meta tokens, and feed token 0."""
        self.position.fill_(self.meta)
        for chain in self.chains:
            for name, buffer in chain.state.items():
                if name not in ("k", "v"):
                    buffer.zero_()
        if self._start is not None:
            self._copy(self._start)
        self.feed(torch.zeros_like(self.token))

    def seek(self, tokens: int) -> None:
        """Go on as if ``tokens`` tokens had been decoded; caches keep whatever they hold.

        Raises:
            UsageError: no room for another token after those.
        """
        if not 0 <= tokens < self.capacity - self.meta:
            most = self.capacity - self.meta - 1
            raise UsageError(f"position {tokens} of {most + 1}", f"choose 0 to {most}")
        self.position.fill_(tokens + self.meta)

    def load(self, state: DecodeState, token: Tensor) -> None:
        """Go on from ``state``, as ``HybridLM.prefill`` or ``begin`` left it, with ``token`` [B].

        A state of one sequence becomes that of all.

        Raises:
            UsageError: a state of another batch or capacity.
        """
        if state.batch not in (1, self.batch) or state.capacity != self.capacity:
            mismatch = f"a state of {state.batch} x {state.capacity} for a plan of {self.batch} x {self.capacity}"
            raise UsageError(mismatch, "allocate the state with the plan's batch and length")
        self._copy(state)
        self.feed(token)

    def _copy(self, state: DecodeState) -> None:
        """Take over ``state``, of this batch or of one sequence, of this capacity or a smaller one."""
        self.position.copy_(state.position)
        for chain, source in zip(self.chains, state.layers, strict=True):
            for name, buffer in source.items():
                if name == "conv" and not chain.plain:
                    _fill_ring(chain.state[name], buffer, int(state.position))
                elif name in ("k", "v"):
                    chain.state[name][:, :, : buffer.shape[2]] = buffer
                else:
                    chain.state[name].copy_(buffer)

    def check(self) -> None:
        """Raise UsageError when more tokens were decoded than fit: the logits since then mean nothing."""
        if int(self.position) > self.capacity:
            raise UsageError(f"{int(self.position)} tokens decoded into {self.capacity}", "allow for more tokens")

    @property
    def kernels(self) -> dict[str, int]:
        """Kernels of one operator of each kind, and of ``head`` (head, choice and look-up)."""
        return {chain.kind: self._count(chain) for chain in (*self.chains, self._end)}

    @property
    def kernels_per_token(self) -> int:
        """Kernels of one step."""
        return sum(self._count(chain) for chain in (*self.chains, self._end))

    def _count(self, chain: Chain) -> int:
        return sum(kernel_count(launch, self.batch) for launch in chain.launches)

    @property
    def plain(self) -> set[str]:
        """The kinds of operators that have no kernels and run their own plain-torch step."""
        return {chain.kind for chain in self.chains if chain.plain}

    @property
    def operators(self) -> Counter[str]:
        """How many operators of each kind there are."""
        return Counter(chain.kind for chain in self.chains)

    @property
    def state_bytes(self) -> int:
        """Memory of the decode state."""
        return sum(buffer.nbytes for chain in self.chains for buffer in chain.state.values())


class DecodeGraph:
    """A ``DecodePlan`` captured as a CUDA graph of ``steps`` tokens.

    Attributes:
        plan: what was captured.
        path: what runs.
        steps: tokens that each ``step`` decodes.
        logits: [B, vocab], of the last token.
        token: [B] in int64, the token chosen last.

    Raises:
        EnvironmentUnfit: the model is not on a CUDA device.
        UsageError: see ``DecodePlan``; or fewer than one step.
    """

    def __init__(self, model: HybridLM, batch: int, tokens: int, steps: int = 1) -> None:
        if not model.embed_tokens.weight.is_cuda:
            raise EnvironmentUnfit("CUDA graphs need a model on an NVIDIA GPU", "move the model there")
        if steps < 1:
            raise UsageError(f"a graph of {steps} steps", "capture at least one")
        self.plan = DecodePlan(model, batch, tokens)
        plain = f", plain torch for {' '.join(sorted(self.plan.plain))}" if self.plan.plain else ""
        self.path = f"Triton kernels{plain}, CUDA graph"
        self.steps, self.logits, self.token = steps, self.plan.logits, self.plan.token
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.logits.device):
            self._capture()
        self.plan.begin()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.plan.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            for _ in range(self.steps):
                self.plan.step()

    @property
    def kernels(self) -> dict[str, int]:
        """See ``DecodePlan.kernels``."""
        return self.plan.kernels

    def begin(self) -> None:
        """See ``DecodePlan.begin``."""
        self.plan.begin()

    def feed(self, token: Tensor) -> None:
        """See ``DecodePlan.feed``."""
        self.plan.feed(token)

    def load(self, state: DecodeState, token: Tensor) -> None:
        """See ``DecodePlan.load``."""
        self.plan.load(state, token)

    def seek(self, tokens: int) -> None:
        """See ``DecodePlan.seek``."""
        self.plan.seek(tokens)

    def position(self) -> int:
        """Tokens decoded so far, as the device counts them; waits for it."""
        return int(self.plan.position) - self.plan.meta

    def step(self) -> None:
        """Decode ``steps`` tokens; returns before the device is done."""
        self._graph.replay()


def _fill_ring(ring: Tensor, inputs: Tensor, position: int) -> None:
    """Put the last inputs [B, taps - 1, channels], oldest first, where a ring [B, taps, channels] has them."""
    taps = ring.shape[1]
    slots = [(position - taps + 1 + i) % taps for i in range(taps - 1)]
    ring[:, slots] = inputs.to(ring.dtype)
