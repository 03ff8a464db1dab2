"""Errors that more than one room must know, apart so that knowing them costs no import."""


class WorkerDied(RuntimeError):
    """What does the work is gone, or never came: a process, an actor, a cluster; a user can act."""
