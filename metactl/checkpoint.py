"""Checkpoints that survive a kill at any moment: atomic, checksummed, without pickle.

A checkpoint is a folder `step-N` with `state.safetensors` and `state.json`; the JSON holds the
checksum of the tensors. It is written beside its place and renamed; the newest intact one counts.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from metactl.files import read_bytes, sync_folder, write_atomically

logger = logging.getLogger(__name__)
KEEP = 3
_ARRAY = "array/"  # before the names of what was an array, and will be one again
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError, MemoryError)
_LARGEST = 1 << 40  # bytes


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> Path:
    """Writes a checkpoint and drops all but the newest three up to it.

    Damaged ones of later steps go, too: a run that begins anew would find them at every start.

    Args:
        folder: Holds the checkpoints of one run.
        step: What the run has done so far; names the checkpoint.
        tensors: State as tensors.
        scalars: State as JSON values.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{step:012d}"
    draft = folder / f".{final.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    blob = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomically(draft / "state.safetensors", blob)
    body = json.dumps(dict(scalars), allow_nan=False, sort_keys=True)
    manifest = {
        "scalars": body,
        "scalars_sha256": hashlib.sha256(body.encode()).hexdigest(),
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
    }
    write_atomically(draft / "state.json", json.dumps(manifest).encode())
    if final.is_dir() and not final.is_symlink():
        shutil.rmtree(final)
    else:
        final.unlink(missing_ok=True)
    draft.rename(final)
    sync_folder(folder)
    found = _checkpoints(folder)
    later = [path for path in found if _step(path) > step]
    damaged = [path for path in later if _is_damaged(path)]
    for gone in (*damaged, *found[len(later) + KEEP :]):
        shutil.rmtree(gone, ignore_errors=True)
    return final


def load_newest_checkpoint(
    folder: Path, at_most: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """State of the newest intact checkpoint; damaged ones are passed over with a warning.

    Args:
        folder: Holds the checkpoints of one run.
        at_most: Pass over those of later steps, too.
    """
    for checkpoint in _checkpoints(folder):
        if at_most is not None and _step(checkpoint) > at_most:
            continue
        try:
            return _load(checkpoint)
        except _DAMAGE as error:
            logger.warning("Checkpoint %s is damaged, trying an older one: %s", checkpoint, error)
    return None


def to_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of an environment, arrays and tensors by name, as `save_checkpoint` takes it."""
    return {
        name if isinstance(value, Tensor) else _ARRAY + name: value
        if isinstance(value, Tensor)
        else torch.from_numpy(np.array(value))
        for name, value in state.items()
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The reverse of `to_tensors`."""
    return {
        name.removeprefix(_ARRAY): value.numpy() if name.startswith(_ARRAY) else value
        for name, value in tensors.items()
    }


def intact_steps(folder: Path) -> set[int]:
    """Of the checkpoints that can be loaded."""
    found = set()
    for checkpoint in _checkpoints(folder):
        with contextlib.suppress(*_DAMAGE):
            _load(checkpoint)
            found.add(_step(checkpoint))
    return found


def _is_damaged(checkpoint: Path) -> bool:
    """For good: what cannot be read just now may be whole."""
    try:
        _load(checkpoint)
    except (OSError, MemoryError):
        return False
    except _DAMAGE:
        return True
    return False


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{12}", path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    manifest = json.loads(read_bytes(checkpoint / "state.json", _LARGEST))
    blob = read_bytes(checkpoint / "state.safetensors", _LARGEST)
    body = manifest["scalars"]
    if not isinstance(body, str):
        raise ValueError("state.json has no scalars")
    for data, name in ((blob, "tensors"), (body.encode(), "scalars")):
        if hashlib.sha256(data).hexdigest() != manifest[f"{name}_sha256"]:
            raise ValueError(f"the checksum of the {name} does not match")
    return load_tensors(blob), json.loads(body)
