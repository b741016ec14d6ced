"""Attributes replaced on instances, classes or modules, all of them or none, and put back exactly."""

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
    """Stands for an attribute that the owner did not hold itself. A class, so that copies of it are it."""


@dataclass
class _Replaced:
    owner: Any
    name: str
    before: Any
    after: Any


class Patch:
    """What was replaced on a target. `undo`, or leaving it as a context, puts back what was there.

    replacements: (owner, attribute, new value); owners are instances, classes or modules. An earlier patch of the
    target is undone first, so that a notebook's cell may run twice.
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
        """Put back the original attributes; nothing where that was done already.

        Raises PatchError, and changes nothing, where something else replaced one of them since.
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
    """Undo a target's patch, for those who did not keep it; nothing where there is none. Errors: `Patch.undo`'s."""
    patch = _own(target, _HANDLE)
    if patch is not _Inherited:
        patch.undo()


@cache
def warn_once(message: str) -> None:
    """Say in the log, once in a process, what a patch could not take over."""
    log.warning(message)


def _own(owner: Any, name: str) -> Any:
    """What the owner itself holds under a name: putting an inherited attribute back would pin it."""
    held = vars(owner)
    for kind in ("_modules", "_parameters", "_buffers"):  # where an nn.Module keeps what it is made of
        if not isinstance(owner, type) and name in held.get(kind, ()):
            return held[kind][name]
    return held.get(name, _Inherited)


def _name(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, type) or hasattr(owner, "__name__") else type(owner).__name__
