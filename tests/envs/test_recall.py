"""Recall and induction: every answer that counts stands earlier, at a gap within the range."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks import associative_recall, induction, recall_sequences
from envs.tasks.recall import N_FILLERS, N_KEYS, N_VALUES, VOCABULARY

KEYS = range(N_KEYS)
VALUES = range(N_KEYS, N_KEYS + N_VALUES)
FILLERS = range(N_KEYS + N_VALUES, VOCABULARY)


def counted_places(counted):
    return zip(*np.nonzero(counted), strict=True)


def gap_to_the_same_token(row, place):
    """Tokens back to where the token at a place stood last."""
    before = np.flatnonzero(row[:place] == row[place])
    assert len(before), "never seen before"
    return place - before[-1]


@settings(max_examples=40, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32),
    seq=st.integers(24, 80),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    split=st.sampled_from(["train", "test"]),
)
def test_every_answer_follows_its_key_in_an_earlier_pair_at_a_gap_of_the_range(
    seed, seq, ends, split
):
    low, high = (2 + 2 * round(end * (seq // 2 - 4)) for end in sorted(ends))
    tokens, counted = associative_recall(seed, 5, seq, (low, high), n_pairs=2, split=split)
    assert counted.sum() == 5 * 2
    for row, place in counted_places(counted):
        key, answer = tokens[row, place : place + 2]
        assert key in KEYS and answer in VALUES
        gap = gap_to_the_same_token(tokens[row], place)
        assert low <= gap <= high
        assert tokens[row, place - gap + 1] == answer
        assert (tokens[row] == key).sum() == 2


def test_what_is_neither_pair_nor_query_is_filler():
    tokens, counted = associative_recall(0, 50, 64, (2, 62), n_pairs=4)
    held = np.zeros_like(tokens, dtype=bool)
    for row, place in counted_places(counted):
        first = place - gap_to_the_same_token(tokens[row], place)
        held[row, [place, place + 1, first, first + 1]] = True
    assert held.sum() == 50 * 4 * 4
    assert set(tokens[~held]) == set(FILLERS) and len(FILLERS) == N_FILLERS
    assert not set(tokens[held]) & set(FILLERS)


def test_all_even_gaps_of_the_range_occur_about_equally_often():
    tokens, counted = associative_recall(3, 2000, 96, (4, 22), n_pairs=2)
    gaps = [gap_to_the_same_token(tokens[row], place) for row, place in counted_places(counted)]
    values, counts = np.unique(gaps, return_counts=True)
    assert values.tolist() == list(range(4, 23, 2))
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_gaps_at_test_can_all_be_longer_than_any_in_training():
    tokens, counted = associative_recall(0, 200, 96, (48, 94), split="test")
    gaps = [gap_to_the_same_token(tokens[row], place) for row, place in counted_places(counted)]
    assert min(gaps) >= 48 and counted.sum() == 200 * 4


def test_the_value_cannot_be_told_from_the_key_without_the_pair():
    tokens, counted = associative_recall(0, 3000, 24, (2, 22))
    rows, places = np.nonzero(counted)
    table = np.zeros((N_KEYS, VOCABULARY))
    np.add.at(table, (tokens[rows, places], tokens[rows, places + 1]), 1)
    shares = table[:, list(VALUES)] / table.sum(axis=1, keepdims=True)
    assert np.abs(shares - 1 / N_VALUES).max() < 0.04


@settings(max_examples=40, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32),
    seq=st.integers(3, 80),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_induction_counts_what_follows_the_only_such_token_one_period_back(seed, seq, ends):
    low, high = (1 + round(end * (seq - 2)) for end in sorted(ends))
    tokens, counted = induction(seed, 5, seq, (low, high))
    for row, place in counted_places(counted):
        before = np.flatnonzero(tokens[row, :place] == tokens[row, place])
        gap = place - before[-1]
        assert low <= gap <= high
        assert set(tokens[row, before + 1]) == {tokens[row, place + 1]}
        assert np.array_equal(tokens[row, gap:], tokens[row, :-gap])
        assert not counted[row, :gap].any()
    assert not np.isin(tokens, FILLERS).any()


def test_induction_counts_something_in_every_sequence():
    _, counted = induction(0, 500, 24, (2, 22))
    assert counted.any(axis=1).all()
    assert counted.mean() > 0.2


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_mixture_holds_its_share_of_induction(share):
    tokens, counted = recall_sequences(1, 2000, 32, (2, 30), induction_share=share)
    pure = np.isin(tokens, FILLERS).any(axis=1)  # fillers mark associative recall
    assert abs((1 - pure.mean()) - share) < 0.04
    assert (counted[pure].sum(axis=1) == 4).all()


@pytest.mark.parametrize("draw", [associative_recall, induction, recall_sequences])
def test_the_same_seed_gives_the_same_tokens_and_another_others(draw):
    first, again, other = (draw(seed, 20, 32, (2, 30)) for seed in (5, 5, 6))
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert first[0].dtype == np.int64 and first[1].dtype == np.bool_
    assert first[0].shape == (20, 33) and first[1].shape == (20, 32)


@pytest.mark.parametrize("draw", [associative_recall, induction, recall_sequences])
def test_training_and_test_share_no_sequence(draw):
    train, test = (draw(0, 2000, 32, (16, 30), split=split)[0] for split in ("train", "test"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


@pytest.mark.parametrize("draw", [associative_recall, induction])
@pytest.mark.parametrize("gaps", [(0, 10), (6, 4), (2, 33)])
def test_gaps_that_no_sequence_can_hold_are_refused_with_their_numbers(draw, gaps):
    with pytest.raises(ValueError, match=rf"gaps must .*{gaps[0]}, {gaps[1]}"):
        draw(0, 2, 32, gaps)


def test_pairs_without_room_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"leave no room .*Ask for fewer pairs"):
        associative_recall(0, 2, 24, (20, 22), n_pairs=4)
    with pytest.raises(ValueError, match=r"n_pairs must be from 1 to .*got 9"):
        associative_recall(0, 2, 24, (2, 22), n_pairs=9)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown split 'probe'\. Known: train, test"):
        induction(0, 2, 8, (2, 4), split="probe")


def test_induction_counts_something_also_where_periods_are_long():
    tokens, counted = induction(0, 300, 256, (192, 254))
    assert counted.any(axis=1).all()
    for row, place in counted_places(counted):
        before = np.flatnonzero(tokens[row, :place] == tokens[row, place])
        assert 192 <= place - before[-1] <= 254
        assert set(tokens[row, before + 1]) == {tokens[row, place + 1]}
    assert not np.isin(tokens, FILLERS).any()
