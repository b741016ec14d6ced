"""Drop-ins for other code bases. They replace attributes, import nothing before it is needed, and can be undone."""

from __future__ import annotations

from importlib import import_module

from ..patching import Patch, undo

_HOMES = {
    "patch_llava_next": "llava_next",
    "patch_slowfast_llava": "slowfast_llava",
    "patch_transformers": "transformers",
}
__all__ = ["Patch", "undo", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
