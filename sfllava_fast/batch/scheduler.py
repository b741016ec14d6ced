"""Distribution of a batch's questions over workers, with retries, timeouts and quarantine."""

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
# A signal that arrives as a wait begins does not end it: its handler runs after the wait.
_LONGEST_WAIT = 1.0  # seconds
_INTERRUPTED = "the worker, or the whole batch, ended while it was asked"


class Scheduler:
    """Hands groups of questions to workers and writes the outcome of each question to a journal.

    - The questions of a group are asked in order, by one worker, so that its video is encoded once.
    - A question that fails is retried, up to `attempts` times over all runs. Until then the rest of its group waits, at
      the end of the queue.
    - After its last attempt it is an error. If no question of its video was ever answered, the video is quarantined:
      the rest of the group are errors, too.
    - An unexpected exception is an error of its question alone.

    Args:
        groups: The questions, by video.
        journal: The output. Questions that it has are not asked.
        start: Makes the worker with a given number.
        attempts: How often a question is handed out at most, over all runs.
        timeout: Seconds for one answer; None waits forever.
        on_done: Called after each question with whether it was answered.
        retry: Ids of questions whose recorded outcomes are discarded and that are asked again.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        journal: Journal,
        start: Callable[[int], Worker],
        attempts: int = DEFAULT_ATTEMPTS,
        timeout: float | None = None,
        on_done: Callable[[bool], None] = lambda answered: None,
        retry: Collection[Id] = (),
    ) -> None:
        self.journal, self.start, self.attempts, self.timeout = journal, start, attempts, timeout
        self.on_done, self.retry = on_done, retry
        self.journal_open = False
        self.waiting: deque[Group] = deque()
        for group in groups:
            left = deque(q for q in group.questions if q.id in retry or q.id not in journal.done)
            if left:
                self.waiting.append(Group(group.name, left))
        self.workers: list[Worker] = []

    def run(self, workers: int) -> None:
        """Ask until every question is done.

        Raises:
            InputError: The output cannot be written.
            BackendError: No question can be answered on this machine, or no model can be loaded.
        """
        try:
            for number in range(min(workers, len(self.waiting))):
                self.workers.append(self.start(number))
            while self.waiting or any(worker.asked for worker in self.workers):
                self._step()
        finally:
            for worker in self.workers:
                if worker.asked:
                    with suppress(InputError):  # a full disk, which was reported before
                        self.journal.withdraw(worker.asked.id)
                worker.kill()

    def _step(self) -> None:
        """Wait for the next reply or timeout, handle it, and hand out new questions."""
        by_connection = {worker.connection: worker for worker in self.workers}
        soonest = min(worker.deadline for worker in self.workers) - time.monotonic()
        for connection in connections.wait(by_connection, min(max(0, soonest), _LONGEST_WAIT)):
            worker = by_connection[connection]  # type: ignore[index]  # what is given are connections
            self._handle(worker, *worker.reply())
        now = time.monotonic()
        for worker in list(self.workers):
            if self.timeout and worker.deadline <= now:
                self._handle(worker, Reply.DIED, f"no answer within {self.timeout:g} seconds", self.timeout)
        for worker in self.workers:
            if worker.ready and not worker.asked:
                self._hand_out(worker)

    def _handle(self, worker: Worker, reply: Reply, value: Any, seconds: float) -> None:
        if reply is Reply.UNUSABLE or (reply is not Reply.READY and not worker.ready):
            # The batch ends. `worker.asked` stays, so that `run` withdraws the attempt: the question is not at fault.
            raise BackendError(str(value) if reply is Reply.UNUSABLE else f"no model could be loaded: {value}")
        asked, group, worker.asked, worker.deadline = worker.asked, worker.group, None, float("inf")
        if reply is Reply.READY:
            worker.ready = True
            if not self.journal_open:  # not before: if no model can be loaded, no file is written
                self.journal.begin(self.retry)
                self.journal_open = True
        elif asked and group:
            if reply is Reply.ANSWERED:
                self._finish(group.questions.popleft(), {"ok": True, **value}, seconds)
            elif reply is Reply.REFUSED:
                self._finish(group.questions.popleft(), {"ok": False, "error": value}, seconds)
            else:
                worker.group = None
                self._retry_or_give_up(group, reply, value, seconds)
        if reply in (Reply.BROKEN, Reply.DIED):
            worker.kill()
            self.workers.remove(worker)
            if self.waiting:
                self.workers.append(self.start(worker.number))

    def _hand_out(self, worker: Worker) -> None:
        """Ask the next question of the worker's group, or of the next waiting group."""
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
            self._give_up(worker.group, _INTERRUPTED, 0.0)

    def _retry_or_give_up(self, group: Group, reply: Reply, error: str, seconds: float) -> None:
        if self.journal.attempts[group.questions[0].id] >= self.attempts:
            if reply in (Reply.BROKEN, Reply.UNSERVED):
                self._finish(group.questions.popleft(), {"ok": False, "error": error}, seconds)
            else:
                self._give_up(group, error, seconds)
        if group.questions:
            self.waiting.append(group)

    def _give_up(self, group: Group, error: str, seconds: float) -> None:
        """Record the group's first question as an error; the others too if no question of the video was answered."""
        question = group.questions.popleft()
        self._finish(question, {"ok": False, "error": error, "quarantined": True}, seconds)
        if question.video not in self.journal.answered_videos:
            error = f"{one_line(question.video)} is quarantined: {error}"
            while group.questions:
                self._finish(group.questions.popleft(), {"ok": False, "error": error, "quarantined": True}, 0.0)

    def _finish(self, question: Question, result: dict[str, Any], seconds: float) -> None:
        effort = {"attempts": self.journal.attempts[question.id], "seconds": round(seconds, 3)}
        self.journal.finish({**question.to_json(), **result, **effort})
        self.on_done(result["ok"])
