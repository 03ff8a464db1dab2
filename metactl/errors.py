"""Errors that more than one room must know, apart so that knowing them costs no import."""

import difflib
from collections.abc import Sequence


class WorkerDied(RuntimeError):
    """What does the work is gone, or never came: a process, an actor, a cluster; a user can act."""


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """`Unknown knob 'dropuot'. Known: dropout, width. Did you mean 'dropout'?`"""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}. Known: {', '.join(known)}.{hint}"
