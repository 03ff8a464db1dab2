"""What a finished trial leaves in its folder."""

import json
from pathlib import Path
from typing import Any

RESULT = "result.json"
STOPPED = "stopped.txt"  # in the folder of a trial that the scheduler gave up


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished trial left, if it is intact."""
    try:
        result = json.loads((folder / RESULT).read_text())
        return dict(result) if isinstance(result["score"], float) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
