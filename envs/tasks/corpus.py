"""Byte corpora with two disjoint parts: one for meta-training, one for meta-testing."""

import hashlib
import logging
import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metactl.errors import unknown_name

logger = logging.getLogger(__name__)

META_TEST_SHARE = 0.25
PARTS = ("meta_train", "meta_test")
_MAX_BYTES = 256 << 20
_SKIPPED_FOLDERS = frozenset(
    "test tests site-packages dist-packages idlelib lib2to3 turtledemo tkinter encodings "
    "pydoc_data __pycache__ ensurepip msilib".split()
)


@dataclass(frozen=True)
class Corpus:
    """Bytes in two disjoint parts, from different files (or the two ends of one file).

    Args:
        name: What it is, for reports.
        data: All bytes, the meta-training part first.
        n_meta_train: Length of the meta-training part; the rest only evaluation and new runs see.
    """

    name: str
    data: NDArray[np.uint8]
    n_meta_train: int

    def bounds(self, split: str) -> tuple[int, int]:
        """First byte and end of `"meta_train"`, `"meta_test"`, or `"all"` of it."""
        bounds = {
            "meta_train": (0, self.n_meta_train),
            "meta_test": (self.n_meta_train, len(self.data)),
            "all": (0, len(self.data)),
        }
        if split not in bounds:
            raise ValueError(unknown_name("split", split, tuple(bounds)))
        return bounds[split]


@cache
def standard_library() -> Corpus:
    """The Python standard library's own sources: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return _from_files("Python standard library", root, sorted(files))


def load_corpus(path: str | Path | None) -> Corpus:
    """A corpus from a user's file or folder; the standard library without one.

    A file may hold any bytes. From a folder all files that are UTF-8 text are taken, except
    hidden ones.

    Raises:
        ValueError: If there is nothing to read; the message names the path.
    """
    if path is None:
        return standard_library()
    path = Path(path)
    if not path.exists():
        raise ValueError(f"Data {str(path)!r} does not exist")
    if path.is_dir():
        try:
            files = [
                file
                for file in sorted(path.rglob("*"))
                if file.is_file()
                and not any(p.startswith(".") for p in file.relative_to(path).parts)
            ]
        except OSError as error:  # such as a folder that changes while it is read
            raise ValueError(f"Data {str(path)!r} cannot be read: {error.strerror}") from error
        return _from_files(str(path), path, [file for file in files if _is_text(file)])
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"Data {str(path)!r} is neither a file nor a folder")
    data = _read(path)
    if len(data) == 0:
        raise ValueError(f"Data {str(path)!r} is empty")
    return Corpus(str(path), data, int(len(data) * (1 - META_TEST_SHARE)))


def _from_files(name: str, root: Path, files: list[Path]) -> Corpus:
    """Assigns whole files to a part by a hash of their names, so that adding files moves none."""
    parts: dict[str, list[NDArray[np.uint8]]] = {part: [] for part in PARTS}
    left = _MAX_BYTES
    for file in files:
        place = file.relative_to(root).as_posix()
        digest = hashlib.sha256(place.encode("utf-8", "surrogateescape")).digest()
        held_out = int.from_bytes(digest[:4], "big") < META_TEST_SHARE * 2**32
        parts["meta_test" if held_out else "meta_train"].append(_read(file))
        left -= len(parts["meta_test" if held_out else "meta_train"][-1])
        if left < 0:
            logger.warning("Of data %r about the first %d MiB are used", name, _MAX_BYTES >> 20)
            break
    sizes = {part: sum(map(len, pieces)) for part, pieces in parts.items()}
    total = sum(sizes.values())
    if total == 0:
        raise ValueError(f"Data folder {name!r} holds no text (no non-empty UTF-8 files)")
    data = np.concatenate([piece for part in PARTS for piece in parts[part]])
    if min(sizes.values()) < 0.05 * total:  # too few files to split by name: split the bytes
        return Corpus(name, data, int(total * (1 - META_TEST_SHARE)))
    return Corpus(name, data, sizes["meta_train"])


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        with path.open("rb") as file:
            data = np.frombuffer(file.read(_MAX_BYTES), dtype=np.uint8)
            if file.read(1):
                megabytes = _MAX_BYTES >> 20
                logger.warning("Of data %r the first %d MiB are used", str(path), megabytes)
            return data
    except OSError as error:
        raise ValueError(f"Data {str(path)!r} cannot be read: {error.strerror}") from error


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
    except OSError:
        return False
    if b"\0" in start:
        return False
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(start) - error.start < 4 and len(start) == 1 << 16  # a cut character
    return len(start) > 0
