"""What befalls runs: when, how much, and that all else is as in the undisturbed twin."""

import numpy as np
import pytest
import torch

from envs.disturbances import KINDS, Disturbances
from envs.transformer_run import build_run
from metactl.env import ControlLoop
from metactl.episodes import ControlConfig

TINY = {
    "task": "recall",
    "d_model": 16,
    "n_layers": 1,
    "context": 24,
    "batch_size": 4,
    "horizon": 60,
    "unique_bytes": (2_000, 60_000),
    "dtype": "float64",
}
SEEDS = [3, 4, 5]


def start(seeds=SEEDS, **options):
    run = build_run(len(seeds), {**TINY, **options})
    run.reset(range(len(seeds)), [run.sample_task(s) for s in seeds], seeds)
    return run


def disturbed(kind, seeds=SEEDS):
    return start(seeds, disturb=1.0, disturbances=[kind])


def begins(run):
    return run._rows["disturbance_begins"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_until_it_begins_a_run_is_bit_identical_to_its_twin_and_then_it_is_not(kind):
    run, twin = disturbed(kind), start()
    when = min(begins(run))
    row = begins(run).index(when)
    before, wanted = run.advance(when), twin.advance(when)
    assert before.train_loss.tolist() == wanted.train_loss.tolist()
    assert before.probe_loss.tolist() == wanted.probe_loss.tolist()
    after, wanted = run.advance(2), twin.advance(2)
    assert after.probe_loss[row] != wanted.probe_loss[row]
    for other in set(range(3)) - {row}:
        if begins(run)[other] >= when + 2:
            assert after.probe_loss[other] == wanted.probe_loss[other]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disturbed_run_depends_on_neither_its_row_nor_its_neighbours(kind):
    together, alone = disturbed(kind), disturbed(kind, [4])
    left, right = (run.advance(60) for run in (together, alone))
    assert left.probe_loss[1] == pytest.approx(right.probe_loss[0], abs=1e-9)
    assert together.evaluate("test")[1] == pytest.approx(alone.evaluate("test")[0], abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_saved_in_the_middle_of_it_goes_on_bit_for_bit(kind):
    run = disturbed(kind)
    run.advance(min(begins(run)) + 1)
    state = run.state_dict(range(3))
    resumed = disturbed(kind, [70, 71, 72])
    resumed.load_state_dict(range(3), state)
    left, right = run.advance(30), resumed.advance(30)
    assert left.probe_loss.tolist() == right.probe_loss.tolist()


def test_a_higher_rate_is_over_when_its_time_is_over():
    run = disturbed("learning_rate", [3])
    rows = run._rows
    first, end = (int(rows[f"disturbance_{name}"]) for name in ("begins", "ends"))
    plain = start([3])
    factors = []
    for step in range(60):
        for each in (run, plain):
            each._rows["step"][:] = step
        factors.append(float(run._learning_rate() / plain._learning_rate()))
    assert factors[:first] == [1.0] * first and factors[end:] == [1.0] * (60 - end)
    assert all(5 <= factor <= 10 for factor in factors[first:end]) and end > first


def test_the_share_of_spoilt_targets_is_the_size_and_only_in_its_time():
    drawn = Disturbances(("labels",), 1.0, 2, torch.device("cpu"))
    assert drawn.draw([0, 1], [1, 2], 100) == []
    targets = torch.full((2, 50, 40), 999)
    seeds = torch.tensor([1, 2])
    now = drawn.rows["disturbance_begins"]
    spoilt = drawn.spoil(targets, now, seeds, 10)
    changed = (spoilt != 999).double().mean((1, 2))
    torch.testing.assert_close(changed, drawn.rows["disturbance_size"], atol=0.05, rtol=0)
    values, counts = spoilt[0][spoilt[0] != 999].unique(return_counts=True)
    assert values.tolist() == list(range(10)) and counts.max() < 1.5 * counts.min()
    assert torch.equal(drawn.spoil(targets, now - 1, seeds, 10), targets)
    assert torch.equal(drawn.spoil(targets, drawn.rows["disturbance_ends"], seeds, 10), targets)


def test_after_a_switch_a_run_reads_and_is_judged_by_the_other_task():
    run = disturbed("switch", [3])
    task = run.sample_task(3)
    other = run.family.unlike(task, 3)
    assert other.label != task.label
    run.advance(begins(run)[0])
    assert run._rows["train_start"].tolist() == [task.train_start]
    run.advance(1)
    for name in ("train_start", "train_tokens"):
        assert run._rows[name].tolist() == [getattr(other, name)]
    for name in ("probe", "test"):
        assert run._rows[name].tolist() == [getattr(other, name).tolist()]


def test_text_may_switch_to_another_text(tmp_path):
    here, there = tmp_path / "here.txt", tmp_path / "there.txt"
    here.write_bytes(b"ab" * 2_000)
    there.write_bytes(b"yz" * 1_500)
    text = {"task": "text", "unique_bytes": (500, 900), "context": 16}
    run = start(
        [3], **text, data=str(here), other_data=str(there), disturbances=("switch",), disturb=1.0
    )
    read = []
    for n_steps in (begins(run)[0], 1):
        run.advance(n_steps)
        of_training = run._reader.read(run._starts())[0]
        of_test = run._reader.read(run._rows["test"])[0]
        read.append({bytes(t.flatten().unique().tolist()) for t in (of_training, of_test)})
    assert read == [{b"ab"}, {b"yz"}]
    others = {
        part: [run.family.unlike(run.sample_task(seed, part), seed) for seed in range(20)]
        for part in ("meta_train", "meta_test")
    }
    edge = len(run.family.corpus.data) + run.family.other.n_meta_train
    assert all(max(task.test) + 17 <= edge for task in others["meta_train"])
    assert all(task.train_start >= edge for task in others["meta_test"])
    there.write_bytes(b"yz")
    with pytest.raises(ValueError, match=r"there.txt' is too short"):
        build_run(1, {**TINY, **text, "data": str(here), "other_data": str(there)})
    with pytest.raises(ValueError, match="data is for task 'text'"):
        build_run(1, {**TINY, "other_data": str(here)})


def test_a_kick_shakes_the_weights_once():
    run = disturbed("kick", [3])
    run.advance(begins(run)[0])
    before = run.optimizer.values.clone()
    run._befall()
    change = (run.optimizer.values / before - 1)[before != 0]
    assert float(change.std()) == pytest.approx(float(run._rows["disturbance_size"]), rel=0.1)
    run._rows["step"] += 1
    kicked = run.optimizer.values.clone()
    run._befall()
    assert torch.equal(run.optimizer.values, kicked)


def test_what_is_due_is_due_where_it_begins():
    drawn = Disturbances(KINDS, 1.0, 200, torch.device("cpu"))
    drawn.draw(range(200), range(200), 400)
    once = torch.isin(drawn.rows["disturbance"], torch.tensor([2, 3]))
    step = torch.arange(200)
    ahead = (drawn.rows["disturbance_begins"] - step)[once].tolist()
    assert drawn.due(step, 30) == {each for each in ahead if 0 <= each < 30} != set()
    assert drawn.due(step + 400, 30) == set()


def test_the_share_of_disturbed_runs_and_of_kinds_is_what_was_asked_for():
    drawn = Disturbances(KINDS, 0.6, 1000, torch.device("cpu"))
    switching = drawn.draw(range(1000), range(1000), 400)
    kinds = drawn.rows["disturbance"].numpy()
    assert switching == np.flatnonzero(kinds == KINDS.index("switch")).tolist()
    assert np.mean(kinds >= 0) == pytest.approx(0.6, abs=0.05)
    assert np.bincount(kinds[kinds >= 0]) / 600 == pytest.approx([0.25] * 4, abs=0.06)
    first = drawn.rows["disturbance_begins"].numpy()
    assert first.min() >= 100 and first.max() <= 280


def test_the_environment_draws_disturbances_from_the_seed_of_the_episode():
    options = {**TINY, "disturb": 0.5, "horizon": 40}
    loop = ControlLoop(build_run(8, options), ControlConfig(n_control_steps=4))
    episodes = [loop.draw_episode(seed, 0) for seed in range(8)]
    loop.reset(range(8), episodes)
    kinds = loop.run._rows["disturbance"].tolist()
    loop.reset([2], [episodes[5]])
    assert loop.run._rows["disturbance"].tolist()[2] == kinds[5] and -1 in kinds and max(kinds) >= 0


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"disturb": 1.5}, "disturb must be in"),
        ({"disturbances": []}, "must name some of learning_rate"),
        ({"disturbances": ["kik"]}, "kik.*Did you mean 'kick'"),
        ({"task": "recal"}, "recal.*Did you mean 'recall'"),
        ({"data": "x.txt"}, "data is for task 'text'"),
    ],
)
def test_bad_options_are_refused_in_words(option, words):
    with pytest.raises(ValueError, match=words):
        build_run(1, {**TINY, **option})
