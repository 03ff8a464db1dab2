"""What a finished trial leaves in its folder."""

import json
from pathlib import Path
from typing import Any

from metactl.files import write_atomically

RESULT = "result.json"
STOPPED = "stopped.txt"  # in the folder of a trial that the scheduler gave up


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Marks a trial as finished, by what it came to."""
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / RESULT, text.encode())


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished trial left, if it is intact."""
    try:
        result = json.loads((folder / RESULT).read_text())
        return dict(result) if isinstance(result["score"], float) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merit(result: dict[str, Any]) -> float:
    """By what trials are compared; where losses on probes are known, not by those on tests."""
    return float(result.get("merit", result["score"]))
