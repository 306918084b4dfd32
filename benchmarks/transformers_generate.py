"""The baseline of ``benchmarks/decode.py``: transformers' own ``generate``, compiled, with a static cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from archsearch.architecture import Architecture

TOKENS = 512
"""Tokens that it generates from a prompt of one; the cache has just that room."""
SKIPPED = 64
"""First tokens that do not count: the prompt, compilation, and recording of the CUDA graph anew for each cache."""


class Clock:
    """A logits processor that changes nothing and notes when it is called, once a token.

    ``generate`` looks at its stop flag after each token, so the host's clock follows the device's.
    """

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ticks.append(time.perf_counter())
        return scores


def time_generate(architecture: Architecture, device: torch.device, runs: int = 4) -> dict[str, Any]:
    """Milliseconds a token of a Qwen3 of this shape with random weights, in bf16; the best of the runs after the first.

    All settings are the defaults of transformers but for ``cache_implementation="static"``, which makes it compile
    the decode step itself: ``torch.compile(mode="reduce-overhead")``, that is with CUDA graphs; attention by SDPA.

    Returns:
        ``steady_ms``, without the first ``SKIPPED`` tokens; ``whole_ms``, everything from call to return;
        ``first_seconds``, of the first run, which compiles; settings and versions.
    """
    import transformers

    model = qwen3(architecture, device)
    prompt = torch.ones(1, 1, dtype=torch.int64, device=device)
    options = {"do_sample": False, "cache_implementation": "static", "eos_token_id": None, "pad_token_id": 0}
    whole, steady = [], []
    with torch.no_grad():
        for _ in range(runs):
            clock = Clock()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            out = model.generate(
                prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, logits_processor=[clock], **options
            )
            torch.cuda.synchronize()
            whole.append((time.perf_counter() - begun) / TOKENS)
            steady.append((clock.ticks[-1] - clock.ticks[SKIPPED]) / (len(clock.ticks) - 1 - SKIPPED))
            assert out.shape[1] == TOKENS + 1 == len(clock.ticks) + 1
    if device.type == "cuda":
        assert hasattr(model, "_compiled_call"), "this version of transformers did not compile"
    return {
        "steady_ms": 1e3 * min(steady[1:] or steady),
        "whole_ms": 1e3 * min(whole[1:] or whole),
        "first_seconds": whole[0] * TOKENS,
        "tokens": TOKENS,
        "skipped": SKIPPED,
        "runs": runs,
        "attention": model.config._attn_implementation,
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


def qwen3(architecture: Architecture, device: torch.device) -> Any:
    """Transformers' model of the shape of ``architecture``, a Qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    attention, ffn = architecture.operators[:2]
    shape = Qwen3Config(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=ffn.inner(architecture.hidden_size),
        num_hidden_layers=len(architecture.operators) // 2,
        num_attention_heads=attention.query_heads(architecture.hidden_size),
        num_key_value_heads=attention.stored_heads(architecture.hidden_size),
        head_dim=attention.head_dim,
        tie_word_embeddings=architecture.tie_embeddings,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM(shape).to(torch.bfloat16).eval()
    assert sum(p.numel() for p in model.parameters()) == architecture.parameters
    return model
