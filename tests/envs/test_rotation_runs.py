"""The environment's contract holds with every rotation variant."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from envs.transformer_run import build_run
from models.rotary import rotation_names

NAMES = [*rotation_names(), "block+conditional+t5", "nope+alibi"]
TINY = {
    "d_model": 16,
    "n_layers": 2,
    "context": 16,
    "batch_size": 2,
    "horizon": 12,
    "dtype": "float64",
    "unique_bytes": (500, 5_000),
}
SEEDS = [11, 22, 33]
KNOBS = {
    "rope_base": [50.0, 10_000.0, 700.0],
    "attention_span": [4.0, 16.0, 9.5],
    "embedding_width": [0.5, 1.0, 0.25],
    "dropout": [0.1, 0.3, 0.0],
}


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    """A small text for all: the standard library takes long to read so often."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = "a turn of the wheel tells where each word of the text stands".split()
    path.write_text(" ".join(np.random.default_rng(0).choice(words, 5_000)))
    TINY["data"] = str(path)


def start(seeds, rotation, **options):
    run = build_run(len(seeds), {**TINY, "rotation": rotation, **options})
    run.reset(range(len(seeds)), [run.sample_task(s) for s in seeds], seeds)
    run.apply(knobs_for(run, seeds))
    return run


def defect_of(run):
    return run.model.rotation.penalty(torch.ones(run.n_runs, 4)).detach()


def knobs_for(run, seeds):
    return {
        knob.name: np.array([KNOBS[knob.name][SEEDS.index(seed)] for seed in seeds])
        for knob in run.knobs
    }


@pytest.mark.parametrize("rotation", NAMES)
def test_a_run_depends_on_neither_its_row_nor_its_neighbours_and_resumes_exactly(rotation):
    together, alone = start(SEEDS, rotation), start([22], rotation)
    measured = [run.advance(6) for run in (together, alone)]
    left, right = measured[0].probe_loss[1], measured[1].probe_loss[0]
    assert left == pytest.approx(right, abs=1e-9)
    together.copy_rows([1], [2])  # row 2 now goes on as row 1 does
    later = together.advance(6)
    assert later.probe_loss[2] == later.probe_loss[1]
    assert later.probe_loss[1] == pytest.approx(alone.advance(6).probe_loss[0], abs=1e-9)


@pytest.mark.parametrize("rotation", NAMES)
def test_a_diverged_run_leaves_its_neighbours_bit_identical(rotation):
    runs = [start(SEEDS, rotation, dtype="float32") for _ in range(2)]
    for run in runs:
        run.advance(2)
    with torch.no_grad():
        for parameter in runs[1].model.parameters():
            parameter[1] = torch.nan
    whole, hurt = (run.advance(3) for run in runs)
    assert hurt.diverged.tolist() == [False, True, False]
    for row in (0, 2):
        assert hurt.probe_loss[row] == whole.probe_loss[row]
        mine, theirs = (run.state_dict([row])["values"] for run in runs)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rotation", NAMES)
def test_an_exported_model_has_the_logits_of_its_row_and_writes_text(rotation):
    run = start(SEEDS, rotation)
    run.advance(3)
    tokens = run._reader.read(run._rows["test"][:, :3])[0][..., :-1]
    with torch.no_grad():
        exported = run.export(0)(tokens[:1])[0]
        torch.testing.assert_close(exported, run.model(tokens)[0], atol=1e-10, rtol=0)
    text = run.sample(0, 20)
    assert text == run.sample(0, 20)
    assert len(text.encode("utf-8", "replace")) >= 20


@pytest.mark.parametrize("rotation", NAMES)
def test_the_environment_takes_the_rotation_by_name(rotation):
    options = {**TINY, "n_control_steps": 4, "rotation": rotation}
    single = gymnasium.make("envs:AdaptiveTransformer-v0", **options)
    several = gymnasium.make_vec("envs:AdaptiveTransformer-v0", num_envs=2, **options)
    observation, _ = single.reset(seed=5)
    observations, _ = several.reset(seed=[9, 5])
    np.testing.assert_allclose(observation, observations[1], atol=1e-6)
    action = np.full(single.action_space.shape, 0.4, dtype=np.float32)
    observation, reward, *_ = single.step(action)
    observations, rewards, *_ = several.step(np.stack((-action, action)))
    np.testing.assert_allclose(observation, observations[1], atol=1e-6)
    assert reward == pytest.approx(rewards[1], abs=1e-9)
    single.close(), several.close()


@pytest.mark.parametrize("rotation", NAMES)
@pytest.mark.parametrize("check", [gymnasium_check, sb3_check], ids=["gymnasium", "sb3"])
def test_the_environment_passes_both_checkers(rotation, check):
    options = {**TINY, "n_layers": 1, "horizon": 4, "n_control_steps": 2, "rotation": rotation}
    env = gymnasium.make("envs:AdaptiveTransformer-v0", **options).unwrapped
    check(env)  # a warning is an error here
    env.close()


def test_where_nothing_turns_there_is_no_base_to_move():
    names = [knob.name for knob in build_run(1, {**TINY, "rotation": "nope"}).knobs]
    assert names == ["attention_span", "embedding_width", "dropout"]


def test_a_controller_can_move_the_rotation_itself():
    knobs = ["rotation_strength", "position_scale", "orthogonality_weight", "dropout"]
    run = build_run(2, {**TINY, "rotation": "block", "knobs": knobs})
    assert [knob.name for knob in run.knobs] == knobs
    run.reset([0, 1], [run.sample_task(1)] * 2, [1, 1])
    still = {knob.name: np.full(2, knob.default) for knob in run.knobs}
    still["dropout"] = np.zeros(2)
    run.apply(still)
    run.advance(3)
    losses = run.evaluate("probe")
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    for name, value in (("rotation_strength", 0.2), ("position_scale", 0.3)):
        run.apply({**still, name: np.array([still[name][0], value])})
        moved = run.evaluate("probe")
        assert moved[0] == pytest.approx(losses[0], abs=1e-12)
        assert abs(moved[1] - losses[1]) > 1e-6, name
        run.apply(still)
        assert run.evaluate("probe") == pytest.approx(losses, abs=1e-12)
    run.apply({**still, "orthogonality_weight": np.array([0.1, 10.0])})
    run.advance(6)
    defect = defect_of(run)
    assert defect[1] < 0.7 * defect[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"knobs": ["dropuot"]}, "Unknown knob 'dropuot'.*Did you mean 'dropout'"),
        ({"knobs": ["rotation_strength"]}, "needs a rotation with Givens angles, and rotation"),
        ({"knobs": ["orthogonality_weight"], "rotation": "cayley"}, "needs a free matrix"),
        ({"knobs": ["position_scale"], "rotation": "nope"}, "needs positions that turn"),
    ],
)
def test_a_knob_that_would_move_nothing_is_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        build_run(1, {**TINY, **options})


def test_the_orthogonality_weight_pulls_a_free_matrix_back():
    defects = []
    for weight in (0.0, 3.0):
        run = start(SEEDS, {"variant": "free", "orthogonality_weight": weight}, horizon=60)
        run.advance(60)
        defects.append(defect_of(run))
    assert (defects[1] < 0.5 * defects[0]).all()


@pytest.mark.parametrize("rotation", ["givens", "t5", "frequencies"])
def test_parameters_that_start_at_zero_leave_the_update_ratios_finite(rotation):
    knobs = ("rotation_strength",) if rotation == "givens" else ("dropout",)
    run = build_run(1, {**TINY, "rotation": rotation, "knobs": knobs, "default_dropout": 0.2})
    run.reset([0], [run.sample_task(1)], [1])
    assert run.model.knobs.dropout.item() == pytest.approx(0.2)  # whoever controls it or not
    run.apply({knobs[0]: np.zeros(1)})
    measured = run.advance(1)
    assert 0 < measured.update_ratio_median[0] <= measured.update_ratio_max[0] < 10


def test_rotation_parameters_are_not_decayed():
    run = start(SEEDS, "givens", weight_decay=0.5)
    with torch.no_grad():
        run.model.rotation.givens.angles.fill_(0.3)
        run.model.knobs.rotation_strength.zero_()  # no gradient reaches the angles
    run.advance(4)
    assert (run.model.rotation.givens.angles == 0.3).all()
    assert (run.model.blocks[0]["qkv"] != 0).any()
