"""archsearch: hardware-aware architecture search for hybrid small language models.

``run`` searches and ``open_run`` looks at what was found; every name below loads what it needs when first used.
Importing archsearch also lets transformers' Auto classes load exported models.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from archsearch.api import Run, open_run, run
    from archsearch.architecture import Architecture, load_architecture
    from archsearch.config import RunConfig, load_config
    from archsearch.space import SearchSpace

__version__ = "0.1.0"
__all__ = ["Architecture", "Run", "RunConfig", "SearchSpace", "load_architecture", "load_config", "open_run", "run"]

_HOMES = {
    "api": ("Run", "open_run", "run"),
    "architecture": ("Architecture", "load_architecture"),
    "config": ("RunConfig", "load_config"),
    "space": ("SearchSpace",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"archsearch.{module}"), name)
    raise AttributeError(f"module 'archsearch' has no attribute {name!r}")


def _register_config(_: ModuleType) -> None:
    import_module("archsearch.export.configuration")


def _register_model(_: ModuleType) -> None:
    import_module("archsearch.export.modeling")


# The hooks run when, and only when, transformers loads the module they name; ours then registers its class.
register_post_import_hook(_register_config, "transformers.models.auto.configuration_auto")
register_post_import_hook(_register_model, "transformers.models.auto.modeling_auto")
