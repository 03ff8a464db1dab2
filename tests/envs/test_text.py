"""Text tasks: splits that share no byte, drawn by seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks import Corpus, TextFamily
from envs.tasks.family import TaskFamily
from envs.tasks.text import PROBE_SEQUENCES, TEST_SEQUENCES


def family(size=40_000, context=16, unique_bytes=(300, 5_000), name="some/corpus.txt"):
    corpus = Corpus(name, np.zeros(size, dtype=np.uint8), int(0.75 * size))
    return TextFamily(corpus, context, unique_bytes)


def bytes_of(starts, window):
    return {byte for start in starts.tolist() for byte in range(start, start + window)}


@settings(max_examples=20, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(2_000, 50_000),
    context=st.integers(1, 60),
    low=st.integers(1, 3_000),
    more=st.integers(0, 100_000),
    split=st.sampled_from(["meta_train", "meta_test", "all"]),
)
def test_training_data_probe_and_test_share_no_byte_and_stay_in_their_part(
    seed, size, context, low, more, split
):
    tasks = family(size, context, (low, low + more))
    task = tasks.sample(seed, split)
    first, end = tasks.corpus.bounds(split)
    train = set(range(task.train_start, task.train_start + task.train_tokens))
    probe, test = (bytes_of(starts, context + 1) for starts in (task.probe, task.test))
    assert len(task.probe) == PROBE_SEQUENCES and len(task.test) == TEST_SEQUENCES
    assert not train & probe and not train & test and not probe & test
    assert all(first <= byte < end for byte in train | probe | test)
    assert len(train) >= context + 1


def test_tasks_of_the_two_parts_share_no_byte():
    tasks = family()
    boundary = tasks.corpus.n_meta_train
    for seed in range(20):
        train, test = tasks.sample(seed, "meta_train"), tasks.sample(seed, "meta_test")
        assert max(train.probe.max(), train.test.max()) + 17 <= boundary <= test.train_start


def test_a_task_depends_on_its_seed_alone():
    first, again, other = (family().sample(seed, "meta_train") for seed in (5, 5, 6))
    assert (first.train_start, first.train_tokens) == (again.train_start, again.train_tokens)
    assert np.array_equal(first.probe, again.probe) and np.array_equal(first.test, again.test)
    assert (first.train_start, first.train_tokens) != (other.train_start, other.train_tokens)


@pytest.mark.parametrize("first", [0, 17, 2**31 - 40])
def test_consecutive_seeds_spread_their_sizes_evenly(first):
    """Any 8 in a row: at least one in each quarter of the (logarithmic) range."""
    tasks = family(size=4_000_000, unique_bytes=(100, 1_000_000))
    for start in range(first, first + 30):
        sizes = [tasks.sample(start + i, "meta_train").train_tokens for i in range(8)]
        quarters = {int(np.log10(size / 100.001) + 1e-9) for size in sizes}
        assert quarters == {0, 1, 2, 3}


def test_sizes_are_log_uniform_over_the_range():
    tasks = family(size=4_000_000, unique_bytes=(100, 1_000_000))
    sizes = np.array([tasks.sample(seed, "meta_train").train_tokens for seed in range(400)])
    assert 100 <= sizes.min() and sizes.max() <= 1_000_000
    shares = np.histogram(np.log10(sizes), bins=4, range=(2, 6))[0] / 400
    assert np.all(np.abs(shares - 0.25) < 0.1)


def test_a_range_of_one_size_gives_that_size():
    tasks = family(unique_bytes=(1_500, 1_500))
    assert {tasks.sample(seed, "meta_train").train_tokens for seed in range(20)} == {1_500}


def test_a_corpus_of_less_than_the_range_gives_what_it_has():
    tasks = family(size=4_000, unique_bytes=(10**6, 10**7))
    task = tasks.sample(0, "meta_train")
    assert task.train_tokens == 3_000 - 900


@pytest.mark.parametrize("split", ["meta_train", "meta_test", "all"])
def test_too_short_data_is_refused_with_its_path_and_what_is_needed(split):
    with pytest.raises(ValueError, match=rf"corpus\.txt.*too short.*{split}.*context of 64"):
        family(size=200, context=64).sample(0, split)


def test_the_length_asked_for_in_the_refusal_is_enough():
    needed = None
    try:
        family(size=100, context=16).sample(0, "all")
    except ValueError as error:
        needed = int(str(error).rsplit(" ", 1)[-1])
    assert needed is not None
    family(size=needed, context=16).sample(0, "all")


@pytest.mark.parametrize("unique_bytes", [(0, 10), (10, 5), (-3, 5)])
def test_a_senseless_range_of_sizes_is_refused_with_its_numbers(unique_bytes):
    with pytest.raises(ValueError, match=rf"unique_bytes.*{unique_bytes[0]}, {unique_bytes[1]}"):
        family(unique_bytes=unique_bytes)


def test_after_a_switch_nothing_is_judged_that_was_learned_before():
    tasks = family(400_000, 16, (2_000, 30_000))
    overlapping = 0
    for seed in range(60):
        task = tasks.sample(seed, "meta_test")
        train = set(range(task.train_start, task.train_start + task.train_tokens))
        later = tasks.unlike(task, seed)
        assert not train & bytes_of(np.concatenate((later.probe, later.test)), 17)
        first = TaskFamily.unlike(tasks, task, seed)
        overlapping += bool(train & bytes_of(np.concatenate((first.probe, first.test)), 17))
    assert overlapping > 5  # there was something to avoid
