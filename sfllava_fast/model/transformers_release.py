"""Differences between releases of transformers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from torch import nn

from ..errors import PatchError

# Names of the KV cache in models, decoder layers and outputs: since 5.24, where the second one warns, and before.
CACHE_NAMES = ("cache", "past_key_values")


def release() -> str:
    """Name and version of the loaded transformers, for error messages."""
    return f"transformers {getattr(sys.modules.get('transformers'), '__version__', '(not loaded)')}"


def name_of_cache(names: Collection[str]) -> str | None:
    """The name of the KV cache among names of parameters, arguments or outputs; None if there is none."""
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_in(named: Mapping[str, Any]) -> Any:
    """The KV cache among arguments by name, or in a model's output; None if there is none."""
    name = name_of_cache(named)
    return None if name is None else named[name]


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A KV cache as the keyword argument of a model; a wrapper has the keyword of the model inside.

    Raises:
        PatchError: If neither the model nor a module inside has a parameter for a KV cache.
    """
    for module in model.modules():
        if name := _name_in(type(module).forward):
            return {name: cache}
    raise PatchError(f"{type(model).__name__} takes no key/value cache by {' or '.join(CACHE_NAMES)} ({release()})")


@cache
def _name_in(forward: Callable) -> str | None:
    return name_of_cache(inspect.signature(forward).parameters)
