"""Digits: every image in one split only, pixels in order, the name last."""

import subprocess
import sys

import numpy as np
import pytest

from envs.tasks import digit_sequences
from envs.tasks.digits import N_CLASSES, SHADES, VOCABULARY

N_IMAGES = 1797


def images(tokens):
    return {row.tobytes() for row in tokens}


def test_train_and_test_share_no_image_and_hold_all_of_them():
    for seed in range(5):
        (train, _), (test, _) = (digit_sequences(seed, split=split) for split in ("train", "test"))
        assert not images(train) & images(test)
        assert len(train) + len(test) == N_IMAGES
        assert abs(len(test) / N_IMAGES - 0.2) < 0.01


def test_seeds_differ_in_the_images_they_hold_out():
    first, other = (digit_sequences(seed, split="test")[0] for seed in (0, 1))
    shared = len(images(first) & images(other)) / len(first)
    assert 0.1 < shared < 0.3


def test_a_sequence_is_the_image_row_by_row_and_its_name():
    from sklearn.datasets import load_digits

    data = load_digits()
    names = dict(zip((np.floor(x * 8 / 17).tobytes() for x in data.data), data.target, strict=True))
    tokens, counted = digit_sequences(3)
    assert tokens.shape[1] == 65 and tokens.max() < VOCABULARY == SHADES + N_CLASSES
    assert (tokens[:, :64] < SHADES).all()
    for row in tokens[:200]:
        assert names[row[:64].astype(float).tobytes()] == row[64] - SHADES
    assert counted[:, 63].all() and not counted[:, :63].any()


def test_more_sequences_than_images_come_in_whole_rounds_of_new_order():
    once, _ = digit_sequences(0)
    n = len(once)
    thrice, _ = digit_sequences(0, 3 * n)
    assert np.array_equal(thrice[:n], once)
    for start in (n, 2 * n):
        assert images(thrice[start : start + n]) == images(once)
        assert not np.array_equal(thrice[start : start + n], once)
    assert len(digit_sequences(0, 10)[0]) == 10


def test_the_name_can_be_told_from_the_shades():
    """By the nearest mean image, far above the chance of one in ten."""
    train, test = (digit_sequences(0, split=split)[0] for split in ("train", "test"))
    means = [train[train[:, -1] == SHADES + k, :64].mean(axis=0) for k in range(N_CLASSES)]
    distance = np.square(test[:, None, :64] - np.stack(means)).sum(axis=2)
    assert (distance.argmin(axis=1) + SHADES == test[:, -1]).mean() > 0.8


def test_the_same_seed_gives_the_same_tokens():
    first, again = digit_sequences(7, 50), digit_sequences(7, 50)
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert first[0].dtype == np.int64 and first[1].dtype == np.bool_


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"^The digits .*: pip install scikit-learn$"):
        digit_sequences(0)


def test_importing_the_tasks_does_not_import_scikit_learn():
    code = "import sys, envs.tasks; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
