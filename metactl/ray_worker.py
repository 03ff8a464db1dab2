"""A shard in a Ray actor, anywhere on a cluster."""

import logging
from collections.abc import Sequence
from typing import Any

from metactl.config import ConfigError
from metactl.errors import WorkerDied
from metactl.worker import Build, ShardError, Worker, set_up_torch

logger = logging.getLogger(__name__)

_PATIENCE = 600  # seconds for the cluster to have room for an actor, and to build its shard
_REMIND = 60


class RayWorker(Worker):
    """A shard in an actor of a Ray cluster that this process is connected to.

    Args:
        build: Makes the shard, in the actor.
        arguments: Its arguments.
        cpus: Cores that the actor takes.
        gpus: GPUs, or a share of one, that it takes.
    """

    def __init__(
        self, build: Build, arguments: tuple[Any, ...], *, cpus: float = 1.0, gpus: float = 0.0
    ) -> None:
        import ray

        if not ray.is_initialized():
            raise ConfigError("Shards on Ray need a cluster: call ray.init first")
        self._ray, self._cpus, self._gpus = ray, cpus, gpus
        super().__init__(build, arguments)

    def _start(self) -> None:
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_restarts": 0}
        kind: Any = self._ray.remote(_Actor)
        self.actor: Any = kind.options(**options, scheduling_strategy="SPREAD").remote()
        self._placed = False
        self._answer_ref = self.actor.build.remote(self._build, self._arguments)

    def _send(self, method: str, *args: Any) -> None:
        self._answer_ref = self.actor.call.remote(method, args)

    def _answer(self) -> Any:
        exceptions = self._ray.exceptions
        try:
            self._require_room()
            return self._ray.get(self._answer_ref)
        except exceptions.RayTaskError as error:
            for kind in (ValueError, ImportError):
                if isinstance(error.cause, kind):
                    raise kind(str(error.cause)) from None
            raise ShardError(f"A Ray actor failed:\n{error}") from None
        except exceptions.RayError as error:  # the actor, its node, or the answer on its way
            reason = " ".join(str(error).split())
            raise WorkerDied(f"A Ray actor died: {reason}") from None

    def _require_room(self) -> None:
        """Waits until a new actor has been given its place."""
        if self._placed:
            return
        for waited in range(0, _PATIENCE, _REMIND):
            if self._ray.wait([self._answer_ref], timeout=_REMIND)[0]:
                self._placed = True
                return
            logger.warning("No room yet for a shard on the cluster, for %d s", waited + _REMIND)
        raise WorkerDied(
            f"The cluster had no room for a shard in {_PATIENCE} s: it takes {self._cpus:g} CPU "
            f"and {self._gpus:g} GPU of one node"
        )

    def kill(self) -> None:
        self._ray.kill(self.actor)

    def close(self) -> None:
        self._ray.wait([self._answer_ref], timeout=2)
        self.kill()

    @staticmethod
    def wait(workers: "Sequence[RayWorker]") -> "list[RayWorker]":
        by_ref = {worker._answer_ref: worker for worker in workers}
        ready, _ = workers[0]._ray.wait(list(by_ref))
        return [by_ref[ref] for ref in ready]


class _Actor:
    """What lives in the cluster."""

    def build(self, build: Build, arguments: tuple[Any, ...]) -> None:
        set_up_torch()
        self.shard = build(*arguments)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self.shard, method)(*args)
