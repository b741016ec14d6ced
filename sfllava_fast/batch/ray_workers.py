"""Workers as actors of a Ray cluster; the batch hands out questions and counts attempts, as with local workers."""

from __future__ import annotations

from multiprocessing.connection import Connection
from threading import Thread

from ..errors import BackendError
from .workers import AnswererHost, MakeAnswerer, Worker

try:
    import ray
except ImportError as error:
    raise BackendError("--ray needs Ray: pip install 'ray>=2.40'") from error


class RayWorker(Worker):
    """A worker in a Ray actor, with one GPU if the cluster has any.

    Ray's own restarts and retries are off: a video that crashes its worker would be retried forever.
    """

    def _start(self, theirs: Connection, make: MakeAnswerer, number: int, count: int) -> None:
        if not ray.is_initialized():  # the cluster of RAY_ADDRESS, else a local one
            ray.init(log_to_driver=False, logging_level="ERROR")
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(AnswererHost)
        self._actor, self._cause = actor.remote(), "the actor ended"
        Thread(target=self._forward, args=(theirs, make), daemon=True).start()

    def _forward(self, theirs: Connection, make: MakeAnswerer) -> None:
        """Forward questions and replies between the pipe that the batch waits on and the actor."""
        try:
            # Worker 0 of 1: the actor sees no GPU and no cores but its own.
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
