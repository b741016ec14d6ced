"""Patches of other code bases: they replace attributes, import lazily, and can be undone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..patching import Patch, undo

_HOMES = {
    "patch_llava_next": "llava_next",
    "patch_slowfast_llava": "slowfast_llava",
    "patch_transformers": "transformers",
}
__all__ = ["Patch", "patch_llava_next", "patch_slowfast_llava", "patch_transformers", "undo"]

if TYPE_CHECKING:
    from .llava_next import patch_llava_next as patch_llava_next
    from .slowfast_llava import patch_slowfast_llava as patch_slowfast_llava
    from .transformers import patch_transformers as patch_transformers


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
