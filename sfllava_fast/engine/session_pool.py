"""LRU pool of the sessions' KV caches, bounded by count and bytes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..model.kv_cache import KvCache

DEFAULT_SESSIONS = 8


class Resident(Protocol):
    """A session with keys and values, which it can release."""

    @property
    def nbytes(self) -> int: ...

    def release(self) -> None: ...


class SessionPool:
    """Sessions whose keys and values are in memory, the least recently used first.

    Beyond `most` sessions or `most_bytes`, the first ones are released; they can still be asked. The session in use is
    never released. The spare cache counts in the bytes, and is dropped first.

    Attributes:
        spare: The cache of a closed session with its captured CUDA graph, for the next session; or None.
    """

    def __init__(self, most: int, most_bytes: int | None) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.spare: KvCache | None = None
        self._sessions: list[weakref.ref[Resident]] = []

    def __iter__(self) -> Iterator[Resident]:
        return iter([session for ref in self._sessions if (session := ref()) is not None])

    def touch(self, session: Resident, coming: int = 0) -> None:
        """Mark a session as in use; it is about to allocate `coming` bytes."""
        self.forget(session)
        self._sessions.append(weakref.ref(session))
        self._bound_spare(coming)
        held = list(self)
        while len(held) > 1 and self._is_too_much(held, coming):
            held.pop(0).release()

    def keep_spare(self, cache: KvCache) -> None:
        """Keep a cache for the next session if the bytes allow it."""
        self.spare = cache
        self._bound_spare(0)

    def take_spare(self, room: int, skipped: Sequence[int]) -> KvCache | None:
        """The spare cache if it has room for `room` tokens and the same skipped counts; else it is dropped."""
        spare, self.spare = self.spare, None
        if spare is None or spare.capacity < room or spare.skipped != tuple(skipped):
            return None
        spare.length = 0
        return spare

    def forget(self, session: Resident) -> None:
        self._sessions = [ref for ref in self._sessions if ref() not in (None, session)]

    def _bound_spare(self, coming: int) -> None:
        if self.spare is not None and self._is_too_many_bytes([*self, self.spare], coming):
            self.spare = None

    def _is_too_much(self, held: list[Resident], coming: int) -> bool:
        return len(held) > self.most or self._is_too_many_bytes(held, coming)

    def _is_too_many_bytes(self, held: Sequence[Resident | KvCache], coming: int) -> bool:
        return self.most_bytes is not None and coming + sum(each.nbytes for each in held) > self.most_bytes
