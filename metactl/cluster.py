"""A Ray cluster for a while: one that exists, or one of this machine's cores."""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metactl.config import ConfigError
from metactl.errors import WorkerDied

_PATIENCE = 10.0  # seconds for a cluster to answer, or for a new folder to be locked
_SCRATCH = "metactl-ray-"
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[dict[str, float]]:
    """A Ray cluster for the block: the one at an address, or one of this machine's cores.

    Yields:
        Resources of the whole cluster, by Ray's names.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS")
    if address == "local":  # Ray's word for a cluster of this machine's own
        address = None
    if address:
        _require_answer(address)
    else:
        use_token()
    import ray

    with contextlib.nullcontext() if address else _short_folder() as scratch:
        own = {"include_dashboard": False, "_temp_dir": scratch}
        local: dict[str, Any] = own if scratch else {}
        try:
            try:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **local,
                )
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                where = f"cluster at {address!r}" if address else "local cluster"
                raise WorkerDied(f"No Ray {where}: {error}") from error
            yield ray.cluster_resources()
        finally:
            ray.shutdown()


def use_token() -> None:
    """Nobody but this process and its children may use the cluster that it starts.

    Ray reads the token once per process, and would keep one in the user's home otherwise.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _require_answer(address: str) -> None:
    """Refuses a HOST:PORT where nobody listens; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto" and the like, which Ray looks up
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"No Ray cluster at {address!r}: {error}") from error


@contextlib.contextmanager
def _short_folder() -> Iterator[str]:
    """Where Ray keeps sockets, whose paths may have 107 bytes; gone after the block.

    Who is killed leaves it behind; the next one knows by its lock, and takes it away.
    """
    root = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    for left in root.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # it may go at this moment, or be somebody else's
            _remove_if_left(left)
    folder = tempfile.mkdtemp(prefix=_SCRATCH, dir=root)
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_if_left(folder: Path) -> None:
    if time.time() - folder.lstat().st_mtime < _PATIENCE:
        return
    lock = _lock(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: str | Path) -> int | None:
    """What keeps a folder until it is closed; None where somebody else has it, or without locks."""
    try:
        import fcntl
    except ImportError:  # a system that has none
        return None
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def check_resources(what: str, cpu: float, gpu: float, available: dict[str, float]) -> None:
    """Refuses what the cluster will never have room for."""
    for name, amount in (("CPU", cpu), ("GPU", gpu)):
        if amount > available.get(name, 0.0):
            raise ConfigError(
                f"{what} needs {amount:g} {name}, the whole cluster has "
                f"{available.get(name, 0.0):g}"
            )
