"""A lock: one thread at a time runs a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError

_waiting: dict[int, Exclusive] = {}  # thread -> the lock that it waits for
_watching = threading.Lock()


class Exclusive:
    """A re-entrant lock, except that no answer may begin within an answer.

    A forward pass changes state that all sessions of a model share: hooks, the attention kernel, the scale of rotary
    embeddings, the token offsets of a mixture, the spare cache. So the lock is held for a whole question.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._answering = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the lock; other threads wait.

        Raises:
            InputError: If the wait would never end, because the thread that holds it waits for a lock of this thread:
                `on_token` of each of two models asks the other model.
        """
        me = threading.get_ident()
        self._announce(me)
        try:
            with self._lock:
                _waiting.pop(me, None)
                before, self._owner = self._owner, me
                try:
                    yield
                finally:
                    self._owner = before
        finally:
            _waiting.pop(me, None)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """`taken` for an answer. Raises InputError within an answer of the same thread, as if `on_token` asks."""
        with self.taken():
            if self._answering:
                raise InputError("the model is in the middle of an answer: ask or push after it has returned")
            self._answering = True
            try:
                yield
            finally:
                self._answering = False

    def _announce(self, me: int) -> None:
        if self._owner == me:  # never waits
            return
        with _watching:
            wanted: Exclusive | None = self
            while wanted is not None and wanted._owner not in (None, me):
                wanted = _waiting.get(wanted._owner)
            if wanted is not None and wanted._owner == me:
                raise InputError(
                    "two threads, each in the middle of an answer, wait for each other's model: ask after the answer "
                    "has returned, not in on_token"
                )
            _waiting[me] = self
