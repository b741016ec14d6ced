"""One thread at a time in a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError

_waiting: dict[int, Exclusive] = {}  # by thread, what it waits for
_watching = threading.Lock()


class Exclusive:
    """A lock that the thread which has it may take again, but for a second answer within an answer.

    Sessions of a model share what a forward pass changes for its time: hooks, the attention that is chosen, the scale
    of rotary embeddings, the frames of a mixture, the spare cache. So it is taken for a whole question.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._answering = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Other threads wait until it is left. InputError where the wait would never end: the thread that has it waits
        for one that this thread has, as where `on_token` of either of two models asks the other."""
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
        """Like `taken`, and an InputError within itself, as where `on_token` asks."""
        with self.taken():
            if self._answering:
                raise InputError("the model is in the middle of an answer: ask or push when that has returned")
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
                    "two threads, each in the middle of an answer, wait for each other's model: ask after the answer has "
                    "returned, not in on_token"
                )
            _waiting[me] = self
