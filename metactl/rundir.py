"""The run directory: where a command keeps its results, and what protects them."""

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from metactl.config import ConfigError, EnvironmentConfig
from metactl.files import read_bytes, require_place, write_atomically
from metactl.yaml_values import UNREADABLE

_PICTURES = (".png", ".pdf", ".svg")
LOCK = ".lock"
_locks: dict[tuple[int, int], int] = {}  # by lock file: what keeps it, until this process ends
_EMPTY = ("config.yaml", "tb", LOCK)
_LARGEST = 1 << 22  # bytes of a record
_DAMAGE = (OSError, *UNREADABLE, LookupError)  # of a record
_PACKAGES = ("metactl", "torch", "gymnasium", "stable-baselines3", "numpy")


class RunDirectoryError(ValueError):
    """A run directory that cannot be used; the message says why."""


def versions() -> dict[str, str]:
    """Versions of the packages that determine a result."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def open_run_directory(
    path: str | Path, kind: str, config: Mapping[str, Any], *, resume: bool = False
) -> Path:
    """Creates a run directory, or finds one again.

    Args:
        path: The directory.
        kind: The command it belongs to.
        config: The resolved configuration, written to `config.yaml`.
        resume: Go on in a directory that holds the same run.

    Raises:
        RunDirectoryError: If it holds something else, or cannot be written.
    """
    path = resolved(path, "Run directory")
    record = path / "config.yaml"
    try:
        held = record.exists()
    except OSError as error:
        raise RunDirectoryError(
            f"Run directory {str(path)!r} cannot be written: {error.strerror}"
        ) from error
    if held:
        if not resume:
            raise RunDirectoryError(
                f"Run directory {str(path)!r} already holds a run; choose another"
                + ", or go on with --resume" * (kind == "train")
            )
        _require_same(record, kind, config)
        lock(path)
        return path
    if resume:
        raise RunDirectoryError(f"Run directory {str(path)!r} holds no run to resume")
    if path.exists() and (not path.is_dir() or any(not is_trace(p) for p in path.iterdir())):
        raise RunDirectoryError(f"Run directory {str(path)!r} exists and is not empty")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock(path)
        for trace in path.glob(".*.tmp"):
            trace.unlink(missing_ok=True)
        if record.exists():  # of another process that was quicker, and is gone
            raise RunDirectoryError(f"Run directory {str(path)!r} already holds a run")
        write_atomically(record, _record(kind, config).encode())
    except OSError as error:
        raise RunDirectoryError(
            f"Run directory {str(path)!r} cannot be written: {error.strerror or error}"
        ) from error
    return path


def is_trace(path: Path) -> bool:
    """Whether a file is all that is left of a run that was killed before it kept anything."""
    return path.name == LOCK or (path.name.startswith(".config.yaml.") and path.suffix == ".tmp")


def lock(run_dir: Path) -> None:
    """Keeps others out of a run directory as long as this process lives.

    Raises:
        RunDirectoryError: If another process is at work there.
    """
    file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    place = os.fstat(file)
    key = (place.st_dev, place.st_ino)
    if key in _locks:
        os.close(file)
        return
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise RunDirectoryError(
            f"Run directory {str(run_dir)!r} is in use by another process"
        ) from error
    except (ImportError, OSError):  # a system, or a file system, that has no locks
        os.close(file)
        return
    _locks[key] = file


@contextlib.contextmanager
def discard_if_refused(run_dir: Path, *, resume: bool = False) -> Iterator[None]:
    """Takes a new run directory back when the run is refused before it kept anything."""
    begun = any(path.name not in _EMPTY for path in run_dir.iterdir())
    try:
        yield
    except Exception:
        if not begun and not resume and all(path.name in _EMPTY for path in run_dir.iterdir()):
            for path in run_dir.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not run_dir.samefile(Path.cwd()):  # where somebody stands
                run_dir.rmdir()
        raise


def _record(kind: str, config: Mapping[str, Any]) -> str:
    # Lists for tuples: PyYAML's safe dumper has no tuples.
    header = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "directory": os.getcwd(),
        "versions": versions(),
        "kind": kind,
    }
    return yaml.safe_dump({**header, "config": dict(config)}, sort_keys=False)


def kind_of(record: Path) -> str | None:
    """The command whose record a file is; None if it is none."""
    try:
        return _read_record(record)[0]
    except _DAMAGE:
        return None


def _read_record(record: Path) -> tuple[str, Any]:
    held = yaml.safe_load(read_bytes(record, _LARGEST))
    held["versions"]  # which a foreign file of that name has not
    if not isinstance(held["config"], Mapping):
        raise ValueError("config holds no keys")
    return str(held["kind"]), held["config"]


def _require_same(record: Path, kind: str, config: Mapping[str, Any]) -> None:
    try:
        held_kind, held_config = _read_record(record)
    except _DAMAGE as error:
        raise RunDirectoryError(f"{str(record)!r} is damaged and cannot be resumed") from error
    if held_kind != kind:
        raise RunDirectoryError(
            f"{str(record.parent)!r} holds a run of {held_kind!r}, not of {kind!r}"
        )
    wanted = yaml.safe_load(yaml.safe_dump(dict(config)))
    differing = sorted(differences(held_config, wanted))
    if differing:
        raise RunDirectoryError(
            f"{str(record.parent)!r} holds a run with another configuration: "
            f"{', '.join(differing[:4])} differ"
        )


def differences(left: Any, right: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two nested mappings differ."""
    if not (isinstance(left, Mapping) and isinstance(right, Mapping)):
        return [] if left == right else [prefix.rstrip(".")]
    keys = list(left) + [key for key in right if key not in left]
    return [
        found
        for key in keys
        for found in differences(left.get(key), right.get(key), f"{prefix}{key}.")
    ]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a report, with the versions that made it."""
    body = {**values, "versions": versions()}
    write_atomically(path, (json.dumps(body, indent=2, allow_nan=False) + "\n").encode())


def writable(file: Path | None, *, picture: bool = False) -> Path | None:
    """Where a file is to be written, its folder made; refuses what cannot be, before the work.

    Raises:
        ConfigError: With the file, and why.
    """
    if file is None:
        return None
    if picture and file.suffix.lower() not in _PICTURES:
        raise ConfigError(f"A picture must end in {', '.join(_PICTURES)}, got {file.name!r}")
    resolved(file, "File")
    path = Path(os.path.abspath(file.expanduser()))  # a link stays one
    what = f"File {str(file)!r} cannot be written"
    if path.is_dir():
        raise ConfigError(f"{what}: it is a directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_place(path)
    except FileExistsError as error:
        raise ConfigError(f"{what}: {str(path.parent)!r} is no folder") from error
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}") from error
    return path


def resolved(path: str | Path, what: str) -> Path:
    """An absolute path, with `~` spelt out.

    Raises:
        ConfigError: If it is none; the message begins with `what` it is.
    """
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, TypeError, ValueError) as error:  # such as a loop of links, a null byte
        raise ConfigError(f"{what} {str(path)!r} is no path: {error}") from error


def resolve_data(options: dict[str, Any]) -> dict[str, Any]:
    """The options with absolute paths of data, checked before anything starts."""
    absolute = dict(options)
    for name in ("data", "other_data"):
        data = options.get(name)
        if data is None:
            continue
        path = resolved(data, "Data")
        if not path.exists():
            raise ConfigError(f"Data {str(data)!r} does not exist")
        absolute[name] = str(path)
    return absolute


def resolve_data_of(environment: EnvironmentConfig) -> dict[str, Any]:
    """Changes of a configuration that make all paths of its data absolute, also in variants."""
    return {
        "environment.options": resolve_data(environment.options),
        "environment.variants": [resolve_data(variant) for variant in environment.variants],
    }
