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


_LONGEST = 2000  # characters of a message
_SIZES = ("can't allocate memory", "out of memory", "not enough memory")  # torch's words


def harmless(text: str) -> str:
    """A message as one line of bounded length that no terminal obeys."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def is_of_size(error: Exception) -> bool:
    """Whether something was too large: for the memory, or for a number."""
    if isinstance(error, MemoryError | OverflowError):
        return True
    return any(words in str(error) for words in _SIZES)
