"""HybridForCausalLM: ``HybridLM`` behind the interface of transformers, with generation from a static state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from archsearch.errors import UsageError
from archsearch.export.configuration import HybridConfig
from archsearch.model.hybrid import DecodeState, HybridLM


class HybridCache:
    """What ``generate`` hands from step to step: a decode state, allocated at the first call.

    Args:
        length: tokens that it can hold, prompt included.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen = 0
        self.state: DecodeState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.seen

    def advance(self, tokens: Tensor) -> None:
        """Count ``tokens`` [B, T]. Raises UsageError where they do not fit."""
        if self.state is not None and len(tokens) != self.state.batch:
            raise UsageError(f"{len(tokens)} sequences for a cache of {self.state.batch}", "use one cache a batch")
        if self.seen + tokens.shape[1] > self.length:
            raise UsageError(f"the cache holds {self.length} tokens and is full", "make a longer HybridCache")
        self.seen += tokens.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence ``i`` go on from sequence ``beam_idx[i]`` (beam search)."""
        for layer in self.state.layers if self.state else ():
            for buffer in layer.values():
                buffer.copy_(buffer.index_select(0, beam_idx))


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """A found language model. Weights are those of ``HybridLM`` under the prefix ``model.``."""

    config_class = HybridConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted decoding would need

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridLM(config.architecture)
        self._awaits_checkpoint = self.model.embed_tokens.weight.is_meta
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to draw: ``HybridLM`` did. transformers calls this for weights that a checkpoint lacks, too."""
        missing = [name for name, weight in module.named_parameters(recurse=False) if not weight.is_meta]
        if self._awaits_checkpoint and missing:
            raise UsageError(f"the checkpoint lacks a weight of {type(module).__name__}", "export the model again")

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.model.embed_tokens if self.model.lm_head is None else self.model.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits, and with ``labels`` the mean loss of the next tokens (nats; label -100 does not count).

        Args:
            input_ids: int64 [B, T]; with a cache that has seen tokens, those that come next.
            attention_mask: [B, T] or None. Only right padding, and none with a cache.
            past_key_values: goes on from here, in place. The logits are then those of the last token, [B, 1, vocab].
            labels: int64 [B, T], the same tokens as ``input_ids``; they are shifted here.
            use_cache: ignored; give a ``HybridCache``, as ``generate`` does.
            logits_to_keep: only the last ones; 0 for all.
            return_dict: False for a tuple.

        Raises:
            UsageError: padding that changes the result, or more tokens than the cache holds.
        """
        if past_key_values is not None:
            logits = self._decode(input_ids, attention_mask, past_key_values)
        else:
            _refuse_left_padding(attention_mask)
            logits = self.model.logits(self.model.hidden(input_ids)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _decode(self, tokens: Tensor, attention_mask: Tensor | None, cache: HybridCache) -> Tensor:
        """Prefill an empty cache or step through ``tokens``: logits [B, 1, vocab] after the last one."""
        if cache.state is None:
            _refuse_any_padding(attention_mask)
            cache.advance(tokens)
            cache.state = self.model.allocate_state(len(tokens), cache.length)
            return self.model.prefill(tokens, cache.state)[:, None]
        cache.advance(tokens)
        for token in tokens.unbind(1):
            logits = self.model.step(token, cache.state)
        return logits[:, None]

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation is not None:
            kind = generation_config.cache_implementation
            raise UsageError(f"no cache_implementation {kind!r}", "leave it out: the model has a cache of its own")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HybridCache(max_cache_length)


def _refuse_left_padding(mask: Tensor | None) -> None:
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise UsageError("left padding would enter the recurrent states", "pad on the right, or batch equal lengths")


def _refuse_any_padding(mask: Tensor | None) -> None:
    if mask is not None and not bool(torch.all(mask != 0)):
        raise UsageError("generation takes no padding", "batch prompts of equal length, or one prompt at a time")


AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
