"""One thread at a time in a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import InputError


class Exclusive:
    """A lock that the thread which has it may take again, but for a second answer within an answer.

    Sessions of a model share what a forward pass changes for its time: hooks, the attention that is chosen, the scale
    of rotary embeddings, the frames of a mixture, the spare cache. So it is taken for a whole question.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._answering = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Other threads wait until it is left. InputError within itself, as where `on_token` asks."""
        with self._lock:
            if self._answering:
                raise InputError("the model is in the middle of an answer: ask or push when that has returned")
            self._answering = True
            try:
                yield
            finally:
                self._answering = False
