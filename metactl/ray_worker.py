"""A shard in a Ray actor, anywhere on a cluster."""

from collections.abc import Sequence
from typing import Any

from metactl.config import ConfigError
from metactl.errors import WorkerDied
from metactl.worker import Build, ShardError, Worker


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
        self._answer_ref = self.actor.build.remote(self._build, self._arguments)

    def _send(self, method: str, *args: Any) -> None:
        self._answer_ref = self.actor.call.remote(method, args)

    def _answer(self) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(self._answer_ref)
        except exceptions.RayActorError as error:
            reason = " ".join(str(error).split())
            raise WorkerDied(f"A Ray actor died: {reason}") from None
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError | ImportError):
                raise type(error.cause)(str(error.cause)) from None
            raise ShardError(f"A Ray actor failed:\n{error}") from None

    def kill(self) -> None:
        self._ray.kill(self.actor)

    def close(self) -> None:
        self.kill()

    @staticmethod
    def wait(workers: "Sequence[RayWorker]") -> "list[RayWorker]":
        by_ref = {worker._answer_ref: worker for worker in workers}
        ready, _ = workers[0]._ray.wait(list(by_ref))
        return [by_ref[ref] for ref in ready]


class _Actor:
    """What lives in the cluster."""

    def build(self, build: Build, arguments: tuple[Any, ...]) -> None:
        import torch

        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        self.shard = build(*arguments)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self.shard, method)(*args)
