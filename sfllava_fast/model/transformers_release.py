"""What differs between releases of transformers, and which one is loaded."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from torch import nn

from ..errors import PatchError

# How models, decoder layers and outputs name a key/value cache: since 5.24, where the second one warns, and before.
CACHE_NAMES = ("cache", "past_key_values")


def release() -> str:
    """Name and version of the transformers that is loaded, for error lines."""
    return f"transformers {getattr(sys.modules.get('transformers'), '__version__', '(not loaded)')}"


def name_of_cache(names: Collection[str]) -> str | None:
    """The one of these names, of parameters, arguments or outputs, that a key/value cache has; None: none of them."""
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_in(named: Mapping[str, Any]) -> Any:
    """The key/value cache among arguments by name, or in a model's output; None: there is none."""
    name = name_of_cache(named)
    return None if name is None else named[name]


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A key/value cache as the keyword argument that a model takes by its signature; a wrapper's is the model's inside.

    Raises PatchError where neither it nor a module inside takes one.
    """
    for module in model.modules():
        if name := _name_in(type(module).forward):
            return {name: cache}
    raise PatchError(f"{type(model).__name__} takes no key/value cache by {' or '.join(CACHE_NAMES)} ({release()})")


@cache
def _name_in(forward: Callable) -> str | None:
    return name_of_cache(inspect.signature(forward).parameters)
