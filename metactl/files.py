"""Writing files so that a kill at any moment leaves the old one or the new one, never half."""

import errno
import os
import stat
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Writes through a temporary file in the same folder, flushed to disk before the rename.

    A link stays a link, to what is new; a device or a pipe is written to.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        try:
            path.write_bytes(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        return
    if path.is_symlink():
        path = path.resolve()
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def require_place(path: Path) -> None:
    """Tries whether `write_atomically` has a place to write in; leaves nothing behind.

    Raises:
        OSError: If it has none.
    """
    if not path.exists() or path.is_file():
        temporary = _temporary(path.resolve())
        temporary.touch()
        temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def read_bytes(path: Path, limit: int) -> bytes:
    """Reads a plain file; never waits for a pipe, nor reads a device.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        OSError: If it cannot be read, is no plain file, or has more.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    about = os.fstat(descriptor)
    if stat.S_ISDIR(about.st_mode):
        os.close(descriptor)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    with os.fdopen(descriptor, "rb") as file:
        if about.st_size > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB", str(path))
        return file.read()


def sync_folder(path: Path) -> None:
    """Makes renames within a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
