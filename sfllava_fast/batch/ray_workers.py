"""Workers that are actors of a Ray cluster, wherever it has room; the batch stays what hands out and counts."""

from __future__ import annotations

from multiprocessing.connection import Connection
from threading import Thread

from ..errors import BackendError
from .workers import Desk, MakeAnswerer, Worker

try:
    import ray
except ImportError as error:
    raise BackendError("--ray needs Ray: pip install 'ray>=2.40'") from error


class RayWorker(Worker):
    """A worker in an actor, on a GPU of its own where the cluster has any.

    Ray would restart actors and retry their tasks, and Ray Data retries a block whose worker died without end: a video
    that kills its worker would do so for ever. Here Ray retries nothing, and the batch counts the attempts.
    """

    def _start(self, theirs: Connection, make: MakeAnswerer, number: int, count: int) -> None:
        if not ray.is_initialized():  # the cluster of RAY_ADDRESS, else one of this machine
            ray.init(log_to_driver=False, logging_level="ERROR")
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Desk)
        self._actor, self._cause = actor.remote(), "the actor ended"
        Thread(target=self._carry, args=(theirs, make), daemon=True).start()

    def _carry(self, theirs: Connection, make: MakeAnswerer) -> None:
        """Between the pipe that the batch waits on, and the actor."""
        try:
            # Ray gives the actor its GPU and its cores: it is the only worker that it sees.
            theirs.send(ray.get(self._actor.load.remote(make, 0, 1)))
            while True:
                theirs.send(ray.get(self._actor.answer.remote(theirs.recv())))
        except (EOFError, OSError):
            pass
        except ray.exceptions.RayError as error:
            self._cause = " ".join(f"the actor ended: {error}".split())
        finally:
            theirs.close()

    def _cause_of_death(self) -> str:
        return self._cause

    def kill(self) -> None:
        ray.kill(self._actor)
        self.connection.close()
