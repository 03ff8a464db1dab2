"""Random generators for training and for test data that never coincide."""

import numpy as np

from metactl.errors import unknown_name

SPLITS = ("train", "test")


def split_generator(seed: int, split: str, family: int) -> np.random.Generator:
    """A generator of a seed's own for each split and each family of tasks.

    Args:
        seed: Of the task.
        split: `"train"` or `"test"`.
        family: A number that tells one family of tasks from another.

    Raises:
        ValueError: For an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(unknown_name("split", split, tuple(SPLITS)))
    return np.random.default_rng([seed, family, SPLITS.index(split)])
