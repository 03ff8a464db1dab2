"""Shards that live elsewhere, and outlive the place where they live."""

import abc
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Protocol

from metactl.errors import WorkerDied, is_of_size

logger = logging.getLogger(__name__)

_DEATHS = 3  # in one call, before the call is to blame
_CHANGES = ("reset", "step", "load_state_dict")  # what a shard does, from its state and arguments
_SETTINGS = ("set_reward_scale",)  # what is no part of its state


class ShardError(RuntimeError):
    """A worker process failed; the message holds what it said."""


class Served(Protocol):
    """What a worker process builds and answers calls with."""

    def close(self) -> None: ...


Build = Callable[..., Served]


def set_up_torch() -> None:
    """One thread, and no slow arithmetic near 0: what a process of small models needs."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _serve(parent: Connection, build: Build, arguments: tuple[Any, ...], owner: int) -> None:
    """A worker process: builds its shard, then answers calls until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()
    set_up_torch()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        _answer_calls(parent, build, arguments)


def _end_with(owner: int) -> None:
    """Ends this process soon after its owner, also in the middle of a call."""
    while os.getppid() == owner:
        time.sleep(1.0)
    os._exit(1)


def _answer_calls(parent: Connection, build: Build, arguments: tuple[Any, ...]) -> None:
    try:
        shard = build(*arguments)
        parent.send(("ok", None))
        while True:
            method, args = parent.recv()
            parent.send(("ok", getattr(shard, method)(*args)))
            if method == "close":
                return
    except (EOFError, ConnectionError):
        raise
    except ImportError as error:
        parent.send(("not found", str(error)))
    except ValueError as error:
        parent.send(("refused", str(error)))
    except Exception as error:
        if is_of_size(error):
            parent.send(("refused", f"too large for this machine: {error}"))
        else:
            parent.send(("failed", traceback.format_exc()))


class Worker(abc.ABC):
    """A shard that lives elsewhere, and outlives the place where it lives.

    What dies is started again: its shard gets the state that it last told, and does again what it
    did since. What a shard does follows from its state and the calls alone, so the answers are
    those that the dead one would have given, bit for bit.

    Args:
        build: Makes the shard, there.
        arguments: Its arguments.
    """

    def __init__(self, build: Build, arguments: tuple[Any, ...]) -> None:
        self._build, self._arguments = build, arguments
        self._state: Any = None
        self._since: list[tuple[str, tuple[Any, ...]]] = []
        self._settings: dict[str, tuple[Any, ...]] = {}
        self._call: tuple[str, tuple[Any, ...]] = ("", ())
        self._start()

    @abc.abstractmethod
    def _start(self) -> None:
        """Begins to build the shard; `_answer` says when it is built."""

    @abc.abstractmethod
    def _send(self, method: str, *args: Any) -> None:
        """Calls a method; `_answer` gives the answer."""

    @abc.abstractmethod
    def _answer(self) -> Any:
        """The answer to the last call; raises `WorkerDied` where there will be none."""

    @abc.abstractmethod
    def kill(self) -> None:
        """Ends it, whatever it does."""

    @abc.abstractmethod
    def close(self) -> None:
        """Waits for the end that `send("close")` asked for, not for long."""

    @staticmethod
    @abc.abstractmethod
    def wait(workers: Sequence[Any]) -> list[Any]:
        """Those of some workers that have an answer, as soon as one has."""

    def require_ready(self) -> None:
        """Waits until the shard is built; raises what went wrong."""
        self._answer()

    def send(self, method: str, *args: Any) -> None:
        """Calls a method of the shard; `receive` gives the answer."""
        self._call = (method, args)
        self._send(method, *args)

    def receive(self) -> Any:
        """The answer to the last call.

        Raises:
            WorkerDied: If the process dies in this call again and again.
            ShardError: If the shard failed.
            ValueError: If the shard refused.
        """
        for deaths in range(1, _DEATHS + 1):
            try:
                if deaths > 1:
                    self._revive()
                answer = self._answer()
                break
            except WorkerDied as error:
                if deaths == _DEATHS:
                    raise
                logger.warning(
                    "%s It starts again and redoes %d calls.", error, len(self._since) + 1
                )
        self._note(*self._call, answer)
        return answer

    def _revive(self) -> None:
        self.kill()
        self._start()
        self._answer()
        if self._state is not None:
            self._redo("load_state_dict", self._state)
        for method, args in (*self._settings.items(), *self._since):
            self._redo(method, *args)
        self._send(self._call[0], *self._call[1])

    def _redo(self, method: str, *args: Any) -> None:
        self._send(method, *args)
        self._answer()

    def _note(self, method: str, args: tuple[Any, ...], answer: Any) -> None:
        """Remembers what it takes to get here again."""
        if method == "state_dict":
            self._state, self._since = answer, []
        elif method in _CHANGES:
            self._since.append((method, args))
        elif method in _SETTINGS:
            self._settings[method] = args
        elif method == "play":  # whole runs from their starts
            self._state, self._since = None, []


class ProcessWorker(Worker):
    """A shard in a process of this machine, with one thread."""

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self._build, self._arguments, os.getpid()), daemon=True
        )
        self.process.start()
        theirs.close()

    def _send(self, method: str, *args: Any) -> None:
        try:
            self.connection.send((method, args))
        except OSError:
            pass  # what the worker said, or its end, is read by the receiver

    def _answer(self) -> Any:
        try:
            status, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            raise WorkerDied(
                f"A worker process died (exit code {self.process.exitcode}); "
                f"was it killed, or out of memory?"
            ) from None
        if status == "refused":
            raise ValueError(answer)
        if status == "not found":
            raise ImportError(answer)
        if status == "failed":
            raise ShardError(f"A worker process failed:\n{answer}")
        return answer

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.terminate()
        self.connection.close()

    def close(self) -> None:
        self.process.join(timeout=2)
        self.kill()

    @staticmethod
    def wait(workers: "Sequence[ProcessWorker]") -> "list[ProcessWorker]":
        ready = connection.wait([worker.connection for worker in workers])
        return [worker for worker in workers if worker.connection in ready]
