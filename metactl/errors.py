"""Errors that more than one room must know, apart so that knowing them costs no import."""


class WorkerDied(RuntimeError):
    """A worker process was killed or ran out of memory: a user can act on it."""
