"""Tasks drawn from pools of sequences: splits that share none, classes, sizes, reading."""

import numpy as np
import pytest
import torch

from envs.reader import Reader
from envs.tasks import build_family

CONTEXTS = {"recall": 32, "waves": 24, "digits": 64}


@pytest.fixture(scope="module", params=sorted(CONTEXTS))
def family(request):
    return build_family(request.param, None, CONTEXTS[request.param], (300, 200_000))


def sequences_of(family, starts):
    return {tuple(family.data[s : s + family.stride].tolist()) for s in starts}


def training_starts(family, task):
    return range(task.train_start, task.train_start + task.train_tokens, family.stride)


@pytest.mark.parametrize("part", ["meta_train", "meta_test"])
def test_training_data_probe_and_test_share_no_place(family, part):
    for seed in range(30):
        task = family.sample(seed, part)
        places = [set(training_starts(family, task)), set(task.probe), set(task.test)]
        assert len(task.probe) == 16 and len(task.test) == 48
        assert not places[0] & places[1] and not places[0] & places[2] and not places[1] & places[2]
        assert all(place % family.stride == 0 for group in places for place in group)


def test_the_two_parts_share_no_sequence(family):
    seen = {}
    for part in ("meta_train", "meta_test"):
        tasks = [family.sample(seed, part) for seed in range(20)]
        seen[part] = set().union(
            *(sequences_of(family, [*training_starts(family, t), *t.probe, *t.test]) for t in tasks)
        )
    assert not seen["meta_train"] & seen["meta_test"]


def test_a_task_depends_on_its_seed_alone(family):
    first, again, other = (family.sample(seed, "meta_train") for seed in (7, 7, 7 + 40))
    assert first.train_start == again.train_start and np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


def test_consecutive_seeds_go_through_all_classes_and_sizes(family):
    n = 8 * family.n_classes
    tasks = [family.sample(100 + i, "meta_train") for i in range(n)]
    assert {task.label for task in tasks} == set(range(family.n_classes))
    for label in range(family.n_classes):
        sizes = [task.train_tokens for task in tasks if task.label == label]
        assert min(sizes) < 1_500 and max(sizes) > 20_000


def test_an_unlike_task_is_of_another_class_of_the_same_part(family):
    for seed in range(12):
        task = family.sample(seed, "meta_test")
        other = family.unlike(task, seed)
        assert other.part == "meta_test"
        assert (other.label != task.label) == (family.n_classes > 1)
        assert not np.array_equal(other.test, task.test)


def test_a_reader_gives_whole_sequences_and_what_counts_of_them(family):
    reader = Reader(family, family.context, torch.device("cpu"))
    tasks = [family.sample(seed, "meta_train") for seed in (3, 4)]
    first = torch.tensor([task.train_start for task in tasks])
    n_tokens = torch.tensor([task.train_tokens for task in tasks])
    starts = reader.draw(first, n_tokens, torch.tensor([[1], [2]]), torch.arange(400))
    for row, task in enumerate(tasks):
        drawn, wanted = set(starts[row].tolist()), set(training_starts(family, task))
        assert drawn <= wanted and len(drawn) > 0.5 * min(len(wanted), 400)
    tokens, counted = reader.read(starts)
    assert tokens.shape == (2, 400, family.stride) and counted.shape == (2, 400, family.context)
    place = int(starts[1, 5])
    assert tokens[1, 5].tolist() == family.data[place : place + family.stride].tolist()
    assert counted[1, 5].tolist() == family.counted[place + 1 : place + family.stride].tolist()
    assert counted.any(dim=2).float().mean() > 0.9 and int(tokens.max()) < family.vocabulary


def test_the_classes_of_recall_have_their_own_gaps_up_to_the_context():
    gaps = build_family("recall", None, 32, (300, 3_000)).gaps
    assert gaps == [(6, 12), (12, 24), (24, 30)]
    longer = build_family("recall", None, 64, (300, 3_000)).gaps
    assert longer == [(6, 12), (12, 24), (24, 48), (48, 62)]


@pytest.mark.parametrize("context", [28, 52, 60, 100, 102, 104, 108])
def test_recall_goes_with_a_context_whose_last_class_would_be_narrow(context):
    family = build_family("recall", None, context, (300, 3_000))
    assert family.gaps[-1][1] == context - 2
    for seed in range(2 * family.n_classes):
        family.sample(seed, "meta_train")


def test_the_classes_of_waves_differ_in_their_noise():
    family = build_family("waves", None, 24, (90_000, 90_000))
    changes = []
    for seed in range(4):
        task = family.sample(seed, "meta_train")
        tokens = family.data[task.train_start :][: task.train_tokens].reshape(-1, 25).astype(int)
        changes.append(np.abs(np.diff(tokens, n=2)).mean())
    assert changes[1:] == sorted(changes[1:]) and changes[3] > 1.3 * changes[0]


@pytest.mark.parametrize(
    ("task", "context", "words"),
    [
        ("recall", 8, "recall.*at least 14 tokens, got 8"),
        ("digits", 32, "digits.*64 tokens.*got 32"),
        ("waves", 8, "above 8 tokens, got 8"),
    ],
)
def test_a_context_that_does_not_go_with_a_task_is_refused_in_words(task, context, words):
    with pytest.raises(ValueError, match=words):
        build_family(task, None, context, (300, 3_000))


def test_an_unknown_part_is_refused(family):
    with pytest.raises(ValueError, match=r"Unknown split 'all'\. Known: meta_train, meta_test"):
        family.sample(0, "all")
