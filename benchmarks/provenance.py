"""Where figures come from, the commit and the machine, and where they go."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from metactl.files import write_atomically
from metactl.shards import default_workers


def commit() -> str:
    """What the variable COMMIT says (of a copy that is not checked out), or of the repository."""
    if named := os.environ.get("COMMIT"):
        return named
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def machine(device: str = "cpu") -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    about = {"processor": model, "cores": default_workers(), "torch": torch.__version__}
    return about | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def write(path: Path, figures: dict[str, Any], device: str = "cpu") -> None:
    """Writes figures as JSON, with the machine and the commit that they are of."""
    figures = {**figures, "machine": machine(device), "commit": commit()}
    write_atomically(path, (json.dumps(figures, indent=2) + "\n").encode())
