"""Replacement of attributes on instances, classes or modules, atomically, with exact undo."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from .errors import PatchError

log = logging.getLogger("sfllava_fast")

_HANDLE = "_sfllava_fast_patch"


class _Inherited:
    """Marks an attribute that the owner did not have itself. A class, since copies of a class are identical."""


@dataclass
class _Replaced:
    owner: Any
    name: str
    before: Any
    after: Any


class Patch:
    """Replaced attributes of a target. `undo`, or the end of a `with` block, restores them.

    An earlier patch of the target is undone first, so that a notebook's cell may run twice.

    Args:
        target: The object, class or module that is patched.
        replacements: (owner, attribute, new value); owners are instances, classes or modules. If one cannot be set, all
            are undone.
    """

    def __init__(self, target: Any, replacements: Iterable[tuple[Any, str, Any]]) -> None:
        replacements = [*replacements, (target, _HANDLE, self)]
        undo(target)
        self._replaced: list[_Replaced] = []
        try:
            for owner, name, value in replacements:
                before = _own(owner, name)
                setattr(owner, name, value)
                self._replaced.append(_Replaced(owner, name, before, _own(owner, name)))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore the original attributes. Does nothing if that was done.

        Raises:
            PatchError: If one of them was replaced again since. Nothing is changed.
        """
        for item in self._replaced:
            if _own(item.owner, item.name) is not item.after:
                raise PatchError(f"{_name(item.owner)}.{item.name} was replaced again since: undo that first")
        while self._replaced:
            item = self._replaced.pop()
            if item.before is _Inherited:
                delattr(item.owner, item.name)
            else:
                setattr(item.owner, item.name, item.before)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def undo(target: Any) -> None:
    """Undo a target's patch, if there is one. Raises PatchError as `Patch.undo` does."""
    patch = _own(target, _HANDLE)
    if patch is not _Inherited:
        patch.undo()


@cache
def warn_once(message: str) -> None:
    """Log a warning once in a process."""
    log.warning(message)


def _own(owner: Any, name: str) -> Any:
    """The owner's own attribute, or _Inherited: setting that on the owner would hide later changes of the class's."""
    held = vars(owner)
    for kind in ("_modules", "_parameters", "_buffers"):  # where an nn.Module stores its parts
        if not isinstance(owner, type) and name in held.get(kind, ()):
            return held[kind][name]
    return held.get(name, _Inherited)


def _name(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, type) or hasattr(owner, "__name__") else type(owner).__name__
