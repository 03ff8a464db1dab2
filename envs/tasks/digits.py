"""The task `digits`: handwritten digits read pixel by pixel, then named."""

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray as Array

from envs.tasks.splits import split_generator

N_CLASSES, N_PIXELS = 10, 64
SHADES = 8
VOCABULARY = SHADES + N_CLASSES
TEST_SHARE = 0.2
_SCANNED_SHADES = 17
_IMAGES, _ORDER = 0xD16, 0x0DE


def digit_sequences(
    seed: int, n: int | None = None, *, split: str = "train"
) -> tuple[Int64[Array, "n 65"], Bool[Array, "n 64"]]:
    """The 1797 images of 8 x 8 pixels that come with scikit-learn, row by row.

    A sequence is 64 shades of grey and, last, the digit's name (a token of its own). Only the
    name counts. A fifth of the images, drawn by the seed, is for the test.

    Args:
        seed: Which images are for the test, and the order.
        n: Sequences; the images of the split come again in a new order as often as needed.
            `None` is each image once.
        split: `"train"` or `"test"`.

    Returns:
        Tokens, and whether the token after each position counts.

    Raises:
        ModuleNotFoundError: Without scikit-learn; the message says what to install.
    """
    pixels, names = _load()
    images = _images_of(seed, split, len(pixels))
    rng = split_generator(seed, split, _ORDER)
    wanted = len(images) if n is None else n
    rounds = [rng.permutation(images) for _ in range(-(-wanted // len(images)))]
    order = np.concatenate([*rounds, np.zeros(0, dtype=np.int64)])[:wanted]
    tokens = np.concatenate((pixels[order], SHADES + names[order, None]), axis=1)
    counted = np.zeros((wanted, N_PIXELS), dtype=bool)
    counted[:, -1] = True
    return tokens, counted


def _images_of(seed: int, split: str, n_images: int) -> Int64[Array, " image"]:
    shuffled = split_generator(seed, "train", _IMAGES).permutation(n_images)
    n_test = round(TEST_SHARE * n_images)
    return shuffled[:n_test] if split == "test" else shuffled[n_test:]


def _load() -> tuple[Int64[Array, "image 64"], Int64[Array, " image"]]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sklearn":
            raise
        raise ModuleNotFoundError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn",
            name="sklearn",
        ) from None
    data = load_digits()
    shades = data.data.astype(np.int64) * SHADES // _SCANNED_SHADES
    return shades, data.target.astype(np.int64)
