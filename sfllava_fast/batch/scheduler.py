"""Which question goes to which worker, and what becomes of those that fail."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from multiprocessing import connection as connections
from typing import Any

from ..errors import BackendError, InputError
from ..terminal import one_line
from .journal import Journal
from .questions import Group, Id, Question
from .workers import Reply, Worker

DEFAULT_ATTEMPTS = 3
# A signal that comes as a wait begins does not end it: its handler runs when the wait is over.
_SECONDS_AT_MOST = 1.0
_LEFT_BEHIND = "the worker, or the whole batch, ended while it was asked"


class Scheduler:
    """Hands groups of questions to workers and journals what becomes of each question.

    Within a group questions are asked in order, so that a video stays encoded. One that fails is asked again, up to
    `attempts` times in all runs together; the rest of its group waits with it, behind all others. One that fails for
    good is an error; if none of its group was ever answered, the group is at fault, and all of it is. An unexpected
    exception is the question's own.

    start: makes the worker of a number. timeout: seconds for one answer. told: called with whether a question that is
    over was answered. again: questions whose errors in the journal are forgotten.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        journal: Journal,
        start: Callable[[int], Worker],
        attempts: int = DEFAULT_ATTEMPTS,
        timeout: float | None = None,
        told: Callable[[bool], None] = lambda answered: None,
        again: Collection[Id] = (),
    ) -> None:
        self.journal, self.start, self.attempts, self.timeout = journal, start, attempts, timeout
        self.told, self.again = told, again
        self.begun = False
        self.waiting: deque[Group] = deque()
        for group in groups:
            left = deque(asked for asked in group.questions if asked.id in again or asked.id not in journal.done)
            if left:
                self.waiting.append(Group(group.name, left))
        self.workers: list[Worker] = []

    def run(self, workers: int) -> None:
        """Ask until every question is over. Raises InputError or BackendError where the batch cannot go on."""
        try:
            for number in range(min(workers, len(self.waiting))):
                self.workers.append(self.start(number))
            while self.waiting or any(worker.asked for worker in self.workers):
                self._step()
        finally:
            for worker in self.workers:
                if worker.asked:
                    with suppress(InputError):  # where there is no room, that has been said
                        self.journal.withdraw(worker.asked.id)
                worker.kill()

    def _step(self) -> None:
        """Wait for the next thing to happen, and do what follows from it."""
        by_connection = {worker.connection: worker for worker in self.workers}
        soonest = min(worker.deadline for worker in self.workers) - time.monotonic()
        happened = connections.wait(by_connection, min(max(0, soonest), _SECONDS_AT_MOST))
        for connection in happened:
            self._take(by_connection[connection], *by_connection[connection].reply())
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.deadline <= now:
                self._take(worker, Reply.DIED, f"no answer within {self.timeout:g} seconds", self.timeout)
        for worker in self.workers:
            if worker.ready and not worker.asked:
                self._hand_out(worker)

    def _take(self, worker: Worker, reply: Reply, value: Any, seconds: float) -> None:
        asked, group, worker.asked, worker.deadline = worker.asked, worker.group, None, float("inf")
        if reply is Reply.READY:
            worker.ready = True
            if not self.begun:  # only now: without a model nothing is written
                self.journal.begin(self.again)
                self.begun = True
            return
        if reply is Reply.UNUSABLE or not worker.ready:
            worker.asked = asked
            raise BackendError(str(value) if reply is Reply.UNUSABLE else f"no model could be loaded: {value}")
        if reply is Reply.ANSWERED:
            self._finish(asked, {"ok": True, **value}, seconds)
            group.questions.popleft()
        elif reply is Reply.REFUSED:
            self._finish(asked, {"ok": False, "error": value}, seconds)
            group.questions.popleft()
        elif asked:
            worker.group = None
            self._again_or_give_up(group, reply, value, seconds)
        if reply in (Reply.BROKEN, Reply.DIED):
            worker.kill()
            self.workers.remove(worker)
            if self.waiting:
                self.workers.append(self.start(worker.number))

    def _hand_out(self, worker: Worker) -> None:
        """The next question of the worker's group, else of the first group that waits."""
        while True:
            if not (worker.group and worker.group.questions):
                worker.group = self.waiting.popleft() if self.waiting else None
            if worker.group is None:
                return
            question = worker.group.questions[0]
            if self.journal.attempts[question.id] < self.attempts:
                self.journal.start(question.id)
                worker.ask(question, self.timeout)
                return
            self._give_up(worker.group, _LEFT_BEHIND, 0.0)

    def _again_or_give_up(self, group: Group, reply: Reply, error: str, seconds: float) -> None:
        if self.journal.attempts[group.questions[0].id] >= self.attempts:
            if reply in (Reply.BROKEN, Reply.UNSERVED):
                self._finish(group.questions.popleft(), {"ok": False, "error": error}, seconds)
            else:
                self._give_up(group, error, seconds)
        if group.questions:
            self.waiting.append(group)

    def _give_up(self, group: Group, error: str, seconds: float) -> None:
        """The group's first question is an error; so are the others, where none was ever answered."""
        question = group.questions.popleft()
        self._finish(question, {"ok": False, "error": error, "quarantined": True}, seconds)
        if question.video not in self.journal.answered_videos:
            error = f"{one_line(question.video)} is quarantined: {error}"
            while group.questions:
                self._finish(group.questions.popleft(), {"ok": False, "error": error, "quarantined": True}, 0.0)

    def _finish(self, question: Question, result: dict[str, Any], seconds: float) -> None:
        told = {"attempts": self.journal.attempts[question.id], "seconds": round(seconds, 3)}
        self.journal.finish({**question.to_json(), **result, **told})
        self.told(result["ok"])
