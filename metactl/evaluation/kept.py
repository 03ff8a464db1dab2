"""What an evaluation played is kept, so that one that was stopped goes on where it was.

A file holds the results of the runs of one population: a checksum of its name and of what follows,
then plain arrays. Its name is a
hash of all that determines them: environment, options, tasks, controllers, and the source of what
plays them here. Code outside of the library (a plant, a model) is not in the name; so the first
population that is found is played again, and must come out the same.
"""

import ast
import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from metactl.config import ConfigError
from metactl.files import read_bytes, write_atomically
from metactl.rollout import Between, PlannedRun, PlayedRun
from metactl.shards import ShardRow

_LIBRARY = "metactl"
_PLAYS = (
    "metactl.shards",
    "metactl.controllers",
    "metactl.evaluation.pbt",
    "metactl.adapters.optimizer",  # knobs of our environments are made of it
)
_VALUES = "values/"
_CHECKSUM = 32  # bytes, in front
_LARGEST = 1 << 32  # bytes of a file


class KeepingRow(ShardRow):
    """A row of shards that keeps what it played in a folder, and plays nothing twice.

    A controller that has been at work in this process is another one: it has a memory.

    Args:
        folder: Where; it exists. Several rows, also of unlike environments, may share it.
        env_id: As for any row, like the rest.
        n_envs: Runs per shard.
        options: Keyword arguments of the environment.
        n_workers: Worker processes.
    """

    def __init__(
        self, folder: Path, env_id: str, n_envs: int, options: Mapping[str, Any], n_workers: int
    ) -> None:
        super().__init__(env_id, n_envs, options, n_workers)
        self._folder, self._trusted = folder, False
        about = json.dumps([env_id, n_envs, options, _source()], sort_keys=True, default=str)
        self._stem = about.encode()

    def play_chunks(
        self, chunks: Sequence[Sequence[PlannedRun]], between: Between | None
    ) -> Iterator[tuple[int, list[PlayedRun]]]:
        """Raises `ConfigError` if what was kept does not come out again."""
        paths = [self._path(chunk, between) for chunk in chunks]
        kept = {i: found for i, path in enumerate(paths) if (found := _read(path)) is not None}
        if kept and not self._trusted:
            self._require_repeatable(paths, chunks, kept, between)
            self._trusted = True
        yield from kept.items()
        left = [i for i in range(len(chunks)) if i not in kept]
        for place, results in super().play_chunks([chunks[i] for i in left], between):
            packed = _packed(results)
            _keep(paths[left[place]], packed)
            yield left[place], _unpacked(packed)  # in memory too as it is read again

    def _path(self, chunk: Sequence[PlannedRun], between: Between | None) -> Path:
        determined = self._stem + pickle.dumps((list(chunk), between))
        return self._folder / f"{hashlib.sha256(determined).hexdigest()[:32]}.played"

    def _require_repeatable(
        self,
        paths: Sequence[Path],
        chunks: Sequence[Sequence[PlannedRun]],
        kept: Mapping[int, list[PlayedRun]],
        between: Between | None,
    ) -> None:
        first = min(kept)
        ((_, again),) = super().play_chunks([chunks[first]], between)
        if _packed(again) != _packed(kept[first]):
            raise ConfigError(
                f"{str(self._folder)!r} holds runs that come out otherwise now: of other code, or "
                f"of another machine ({paths[first].name}); give a new directory"
            )


@cache
def _source() -> str:
    """Hash of the library's code that plays runs."""
    found = hashlib.sha256()
    for name, text in sorted(sources_that_play().items()):
        found.update(name.encode() + text)
    return found.hexdigest()


def sources_that_play() -> dict[str, bytes]:
    """By module: the source of shards, controllers, populations, and of all that they import here.

    What only reports on runs is not among them: it can change, and runs are found again.
    """
    found: dict[str, bytes] = {}
    waiting = list(_PLAYS)
    while waiting:
        name = waiting.pop()
        spec = find_spec(name) if name not in found else None
        if spec is not None and spec.origin is not None:
            found[name] = Path(spec.origin).read_bytes()
            waiting += [other for other in _imports(found[name]) if other not in found]
    return found


def _imports(source: bytes) -> list[str]:
    """Modules of the library that a source names in its imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.partition(".")[0] == _LIBRARY and name != _LIBRARY]


def _packed(results: Sequence[PlayedRun]) -> bytes:
    columns: dict[str, np.ndarray] = {}
    for entry in fields(PlayedRun):
        if entry.name != "values":
            columns[entry.name] = np.stack([getattr(result, entry.name) for result in results])
    for knob in results[0].values:
        columns[_VALUES + knob] = np.stack([result.values[knob] for result in results])
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    return buffer.getvalue()


def _keep(path: Path, packed: bytes) -> None:
    if path.is_fifo():  # it would wait for somebody who reads
        path.unlink()
    write_atomically(path, _checksum(path, packed) + packed)


def _read(path: Path) -> list[PlayedRun] | None:
    """The results of a file, unless it is missing, damaged, or under another's name."""
    try:
        held = read_bytes(path, _LARGEST)
        checksum, packed = held[:_CHECKSUM], held[_CHECKSUM:]
        return _unpacked(packed) if _checksum(path, packed) == checksum else None
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile, MemoryError):
        return None


def _checksum(path: Path, packed: bytes) -> bytes:
    return hashlib.sha256(path.stem.encode() + packed).digest()


def _unpacked(packed: bytes) -> list[PlayedRun]:
    with np.load(io.BytesIO(packed), allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    knobs = [name for name in columns if name.startswith(_VALUES)]
    values = {name.removeprefix(_VALUES): columns.pop(name) for name in knobs}
    return [
        PlayedRun(
            **{name: _plain(column[i]) for name, column in columns.items()},
            values={name: column[i] for name, column in values.items()},
        )
        for i in range(len(columns["arm"]))
    ]


def _plain(value: Any) -> Any:
    """A number or word as Python's own."""
    return value.item() if np.ndim(value) == 0 else value
