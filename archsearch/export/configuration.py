"""HybridConfig: an ``Architecture`` as a transformers configuration."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from archsearch.architecture import Architecture, make_architecture


class HybridConfig(PreTrainedConfig):
    """The fields of an ``Architecture``; ``tie_word_embeddings`` is what transformers calls ``tie_embeddings``.

    The list of layers is called ``operators``, because transformers rewrites or refuses a field ``layer_types``
    whose kinds it does not know.
    """

    model_type = "archsearch_hybrid"

    hidden_size: int = 64
    vocab_size: int = 256
    tie_word_embeddings: bool = True
    meta_tokens: int = 0
    norm_eps: float = 1e-6
    operators: list[dict[str, Any]] | None = None

    @classmethod
    def from_architecture(cls, architecture: Architecture, **options: Any) -> HybridConfig:
        """The configuration of ``architecture``; ``options`` are fields of any transformers configuration."""
        fields = architecture.to_dict()
        fields["tie_word_embeddings"] = fields.pop("tie_embeddings")
        return cls(**fields, **options)

    @property
    def architecture(self) -> Architecture:
        """The architecture that the configuration states.

        Raises:
            InvalidArchitecture: the fields do not make one.
        """
        return make_architecture(
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            tie_embeddings=self.tie_word_embeddings,
            meta_tokens=self.meta_tokens,
            norm_eps=self.norm_eps,
            operators=self.operators or [],
        )

    @property
    def num_hidden_layers(self) -> int:
        """Number of operators."""
        return len(self.operators or [])


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
