"""Waves: within the vocabulary, and the further one looks back the better one foretells."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks import wave_sequences
from envs.tasks.waves import DRIFT, LEVELS, NOISE, VOCABULARY


def error_of_the_best_linear_rule(lags, seq=48):
    """Mean absolute error on test sequences, in levels; without lags the mean is foretold."""

    def table(split):
        tokens, counted = wave_sequences(0, 300, seq, split=split)
        rows, places = np.nonzero(counted & (np.arange(seq) >= 16))
        past = [tokens[rows, places - lag] for lag in range(lags)]
        return np.stack([*past, np.ones(len(rows))], axis=1), tokens[rows, places + 1]

    (inputs, targets), (new_inputs, new_targets) = table("train"), table("test")
    rule = np.linalg.lstsq(inputs.astype(float), targets.astype(float), rcond=None)[0]
    return np.abs(new_inputs @ rule - new_targets).mean()


def test_longer_memory_foretells_better_and_any_beats_the_mean():
    errors = [error_of_the_best_linear_rule(lags) for lags in (0, 1, 2, 4, 16)]
    for shorter, longer in pairwise(errors):
        assert longer < 0.9 * shorter, errors


@settings(max_examples=30, deadline=None, database=None)
@given(seed=st.integers(0, 2**32), seq=st.integers(9, 200), noise=st.floats(0, 3))
def test_all_levels_are_within_the_vocabulary(seed, seq, noise):
    tokens, counted = wave_sequences(seed, 4, seq, noise=noise)
    assert tokens.min() >= 0 and tokens.max() < VOCABULARY == LEVELS
    assert tokens.shape == (4, seq + 1) and counted.shape == (4, seq)


def test_without_noise_no_value_is_cut_off_and_most_levels_are_used():
    tokens, _ = wave_sequences(0, 3000, 48, noise=0.0)
    assert tokens.min() > 0 and tokens.max() < LEVELS - 1
    assert len(np.unique(tokens)) > 0.8 * LEVELS


def test_noise_is_that_of_the_stated_deviation():
    quiet, _ = wave_sequences(0, 500, 64, noise=0.0)
    loud, _ = wave_sequences(0, 500, 64, noise=0.2)
    level = 2 * (3 + DRIFT / 2) / LEVELS
    assert abs((loud - quiet).std() * level / 0.2 - 1) < 0.05
    assert NOISE < level  # so the next value can be told to about a level


def test_what_has_too_little_past_does_not_count():
    _, counted = wave_sequences(0, 10, 32)
    assert not counted[:, :8].any() and counted[:, 8:].all()


def test_every_sequence_has_waves_of_its_own():
    tokens, _ = wave_sequences(0, 200, 64)
    assert len({row.tobytes() for row in tokens}) == 200
    spectra = np.abs(np.fft.rfft(tokens - tokens.mean(axis=1, keepdims=True)))
    assert len(np.unique(spectra.argmax(axis=1))) > 5


def test_the_same_seed_gives_the_same_tokens_and_another_others():
    first, again, other = (wave_sequences(seed, 20, 48) for seed in (5, 5, 6))
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert first[0].dtype == np.int64 and first[1].dtype == np.bool_


def test_training_and_test_share_no_sequence():
    train, test = (wave_sequences(0, 2000, 24, split=split)[0] for split in ("train", "test"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


@pytest.mark.parametrize(
    ("seq", "noise", "message"), [(8, 0.1, "above 8 tokens, got 8"), (32, -0.1, "noise.*got -0.1")]
)
def test_a_senseless_request_is_refused_with_its_number(seq, noise, message):
    with pytest.raises(ValueError, match=message):
        wave_sequences(0, 2, seq, noise=noise)
