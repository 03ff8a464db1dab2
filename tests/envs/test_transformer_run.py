"""Training runs of adaptive transformers: each a matter of its own task, seed and knobs."""

import math

import numpy as np
import pytest
import torch

from envs.transformer_run import RunConfig, build_run
from metactl.config import ConfigError
from metactl.env import ControlLoop
from metactl.episodes import ControlConfig
from metactl.knobs import KnobSet
from metactl.signals import INTERNAL_NAMES

WORDS = "the run of a knob is not an end but the way to learn what none of us was told ".split()
TINY = {
    "d_model": 16,
    "n_layers": 1,
    "context": 16,
    "batch_size": 4,
    "horizon": 20,
    "unique_bytes": (500, 5_000),
}
ROW_KNOBS = {  # one entry per seed
    "rope_base": [50.0, 10_000.0, 700.0],
    "attention_span": [4.0, 16.0, 9.5],
    "embedding_width": [0.5, 1.0, 0.25],
    "dropout": [0.1, 0.3, 0.0],
}
SEEDS = [11, 22, 33]
NOISE = "gradient_noise_scale"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(WORDS, 10_000)))
    return str(path)


@pytest.fixture
def start(text):
    """Builds a run with one row per seed, each at its own task."""

    def build(seeds, **options):
        run = build_run(len(seeds), {**TINY, "data": text, **options})
        run.reset(range(len(seeds)), [run.sample_task(s) for s in seeds], seeds)
        return run

    return build


def knobs_for(seeds):
    return {
        name: np.array([values[SEEDS.index(seed)] for seed in seeds])
        for name, values in ROW_KNOBS.items()
    }


def same_state(run, other, row, other_row=None):
    mine, theirs = (
        run.state_dict([row]),
        other.state_dict([row if other_row is None else other_row]),
    )
    return [n for n in mine if not torch.equal(mine[n].nan_to_num(7), theirs[n].nan_to_num(7))]


# Independence ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"feed_forward": "gelu"}, {"feed_forward": "swiglu"}, {"budget": "flops"}]
)
def test_a_run_depends_on_neither_its_row_nor_the_number_of_runs(start, options):
    options = {"dtype": "float64", **options}

    def train(seeds):
        run = start(seeds, **options)
        run.apply(knobs_for(seeds))
        run.advance(10)
        moved = knobs_for(seeds)
        moved["embedding_width"] = 1.25 - moved["embedding_width"]  # gates in motion
        run.apply(moved)
        measured = run.advance(10)
        return run, measured, run.evaluate("test")

    together, measured, test = train(SEEDS)
    for seeds in ([33, 11, 22], [22], [11], [33], [33, 33]):
        other, other_measured, other_test = train(seeds)
        for row, seed in enumerate(seeds):
            home = SEEDS.index(seed)
            assert other_test[row] == pytest.approx(test[home], abs=1e-9)
            for name, column in other_measured.arrays().items():
                wanted = measured.arrays()[name][home]
                assert column[row] == pytest.approx(wanted, rel=1e-9, abs=1e-9), name
            for name in ("values", "moment1"):
                torch.testing.assert_close(
                    other.optimizer.tensors()[name][row],
                    together.optimizer.tensors()[name][home],
                    atol=1e-9,
                    rtol=0,
                )


def test_a_reset_in_mid_training_leaves_the_neighbours_bit_identical(start):
    left, touched = start(SEEDS), start(SEEDS)
    for run in (left, touched):
        run.apply(knobs_for(SEEDS))
        run.advance(5)
    touched.reset([1], [touched.sample_task(99)], [99])
    for run in (left, touched):
        run.advance(5)
    assert same_state(touched, left, 0) == [] and same_state(touched, left, 2) == []
    assert same_state(touched, left, 1) != []


def test_a_reset_row_starts_as_a_fresh_run_does(start):
    used, fresh = start(SEEDS, dtype="float64"), start([99, 22, 33], dtype="float64")
    used.apply(knobs_for(SEEDS))
    used.advance(7)
    used.reset([0], [used.sample_task(99)], [99])
    assert same_state(used, fresh, 0) == []
    for run in (used, fresh):
        run.advance(7)
    a, b = used.state_dict([0]), fresh.state_dict([0])
    assert all(torch.allclose(a[n].double(), b[n].double(), atol=1e-9) for n in a)


def test_a_reset_of_no_rows_changes_nothing(start):
    run, other = start(SEEDS), start(SEEDS)
    run.reset([], [], [])
    assert all(same_state(run, other, row) == [] for row in range(3))


def test_a_diverging_run_is_flagged_and_its_neighbours_are_bit_identical(start):
    clean, spoiled = start(SEEDS), start(SEEDS)
    for run in (clean, spoiled):
        run.apply(knobs_for(SEEDS))
        run.advance(3)
    with torch.no_grad():
        spoiled.model.blocks[0]["ffn_out"][1, 0, 0] = torch.nan
    wanted, found = clean.advance(5), spoiled.advance(5)
    assert wanted.diverged.tolist() == [False, False, False]
    assert found.diverged.tolist() == [False, True, False]
    for row in (0, 2):
        assert same_state(spoiled, clean, row) == []
        for name, column in found.arrays().items():
            assert column[row] == wanted.arrays()[name][row], name
    spoiled.reset([1], [spoiled.sample_task(5)], [5])
    assert spoiled.advance(2).diverged.tolist() == [False, False, False]


def test_one_non_finite_loss_in_the_middle_stays_flagged(start):
    run = start(SEEDS[:1])
    run.optimizer.values[0, 0] = torch.inf
    assert run.advance(1).diverged.tolist() == [True]
    run.optimizer.values.fill_(0.01)
    run.optimizer.moment1.zero_()
    run.optimizer.moment2.zero_()
    assert run.advance(1).diverged.tolist() == [True]


# State ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["steps", "flops"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_loaded_state_resumes_bit_identically_with_gates_in_motion(start, n, budget):
    seeds = SEEDS[:n]
    run = start(seeds, budget=budget)
    run.apply(knobs_for(seeds))
    run.advance(4)
    run.apply({"embedding_width": np.full(n, 0.75)})
    run.model.knobs.step_gates(0.3)
    state = run.state_dict(range(n))
    resumed = start([77] * n, budget=budget)
    resumed.load_state_dict(range(n), state)
    results = [r.advance(6) for r in (run, resumed)]
    for row in range(n):
        assert same_state(resumed, run, row) == []
    assert results[0].train_loss.tolist() == results[1].train_loss.tolist()
    assert results[0].flops.tolist() == results[1].flops.tolist()
    assert run.evaluate("test").tolist() == resumed.evaluate("test").tolist()


def test_a_state_is_a_copy_that_training_does_not_change(start):
    run = start(SEEDS)
    state = run.state_dict([0, 2])
    before = {name: tensor.clone() for name, tensor in state.items()}
    run.advance(2)
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert all(len(tensor) == 2 for tensor in state.values())


def test_copied_rows_go_on_exactly_as_their_sources(start):
    run = start(SEEDS)
    run.apply(knobs_for(SEEDS))
    run.advance(4)
    run.copy_rows([0], [2])
    assert same_state(run, run, 0, 2) == [] and same_state(run, run, 0, 1) != []
    run.advance(4)
    assert same_state(run, run, 0, 2) == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_exported_row_is_a_single_model_with_the_same_logits(start, dtype):
    run = start(SEEDS, dtype=dtype)
    run.apply(knobs_for(SEEDS))
    run.advance(3)
    run.apply({"embedding_width": np.full(3, 0.75)})
    run.model.knobs.step_gates(0.4)
    tokens = run._reader.read(run._rows["test"][:, :5])[0][..., :-1]
    with torch.no_grad():
        logits = run.model(tokens)
        for row in range(3):
            model = run.export(row)
            assert model.n_replicas == 1 and model.sliced
            tolerance = 1e-5 if dtype == "float32" else 1e-10
            found = model(tokens[row : row + 1])[0]
            torch.testing.assert_close(found, logits[row], atol=tolerance, rtol=tolerance)


def test_an_exported_model_is_apart_from_the_run(start):
    run = start(SEEDS)
    before = run.state_dict([0])["values"]
    model = run.export(0)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(9.0)
    assert torch.equal(run.state_dict([0])["values"], before)


# Data and evaluation -----------------------------------------------------------------------------


def test_batches_come_from_the_rows_own_training_bytes_and_never_from_probe_or_test(start):
    run = start(SEEDS)
    tasks = [run.sample_task(seed) for seed in SEEDS]
    seen = [set(), set(), set()]
    for _ in range(60):
        for row, starts in enumerate(run._batch().tolist()):
            seen[row] |= {start + i for start in starts for i in range(17)}
        run._rows["step"] += 1
    for places, task in zip(seen, tasks, strict=True):
        end = task.train_start + task.train_tokens
        assert min(places) >= task.train_start and max(places) < end
        held_out = {s + i for s in (*task.probe, *task.test) for i in range(17)}
        assert not places & held_out and len(places) > 0.5 * min(task.train_tokens, 4_000)


def test_evaluation_changes_no_state_and_ignores_dropout(start):
    run = start(SEEDS)
    run.apply(knobs_for(SEEDS))
    run.advance(3)
    before = run.state_dict(range(3))
    losses = [run.evaluate(split) for split in ("probe", "test", "probe", "test")]
    assert all(torch.equal(t, before[n]) for n, t in run.state_dict(range(3)).items())
    assert np.array_equal(losses[0], losses[2]) and np.array_equal(losses[1], losses[3])
    assert not np.array_equal(losses[0], losses[1])
    run.apply({"dropout": np.full(3, 0.5)})
    assert np.array_equal(run.evaluate("probe"), losses[0])
    assert np.array_equal(run.evaluate("probe", [2, 0]), losses[0][[2, 0]])


def test_evaluation_equals_cross_entropy_over_the_tasks_windows(start):
    run = start(SEEDS, dtype="float64")
    data = run.family.corpus.data
    for split in ("probe", "test"):
        losses = run.evaluate(split)
        for row, seed in enumerate(SEEDS):
            starts = getattr(run.sample_task(seed), split)
            windows = torch.from_numpy(np.stack([data[s : s + 17] for s in starts])).long()
            with torch.no_grad():
                logits = run.export(row)(windows[None, :, :-1])[0]
            wanted = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), windows[:, 1:].flatten()
            )
            assert losses[row] == pytest.approx(wanted.item(), abs=1e-9)


def test_an_unknown_split_is_refused_with_the_known_ones(start):
    with pytest.raises(ValueError, match=r"'train'.*probe, test"):
        start([1]).evaluate("train")


# Training ------------------------------------------------------------------------------------


def test_a_tiny_model_learns(start):
    run = start([1, 2], horizon=100, learning_rate=1e-2)
    first = run.advance(1)
    measured = [run.advance(33) for _ in range(3)][-1]
    assert np.all(np.abs(first.train_loss - math.log(256)) < 1.5)
    assert np.all(measured.train_loss < 0.5 * math.log(256))
    assert np.all(measured.probe_loss < 0.5 * math.log(256))


def test_the_learning_rate_warms_up_linearly_then_falls_as_a_cosine(start):
    run = start([1], horizon=200, learning_rate=0.5, warmup=0.1, final_learning_rate=0.2)

    def rate(step):
        run._rows["step"][:] = step
        return run._learning_rate().item()

    assert [rate(s) for s in range(20)] == pytest.approx([0.5 * (s + 1) / 20 for s in range(20)])
    assert rate(20) == pytest.approx(0.5)
    assert rate(110) == pytest.approx(0.5 * (1 + 0.2) / 2)  # half-way down
    assert rate(65) == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(200) == pytest.approx(0.1) and rate(1_000) == pytest.approx(0.1)
    falling = [rate(s) for s in range(20, 201)]
    assert falling == sorted(falling, reverse=True)


def test_products_are_as_exact_as_asked_while_training_only(start, monkeypatch):
    run, seen = start([1], matmul_precision="medium"), []
    step = run._optimizer_step
    run._step = lambda: seen.append(torch.get_float32_matmul_precision()) or step(measure=False)
    before = torch.get_float32_matmul_precision()
    run.advance(2)
    assert seen == ["medium"] and torch.get_float32_matmul_precision() == before == "highest"
    with pytest.raises(ValueError, match=r"matmul_precision.*'coarse'.*highest, high, medium"):
        RunConfig(matmul_precision="coarse")


def test_without_warm_up_the_first_step_is_at_the_peak(start):
    run = start([1], warmup=0.0, learning_rate=0.25)
    assert run._learning_rate().item() == pytest.approx(0.25)


def test_each_run_draws_its_peak_log_uniformly_from_a_range(start):
    seeds = list(range(400, 464))
    run = start(seeds, warmup=0.0, learning_rate=(1e-3, 4e-3))
    rates = run._learning_rate().numpy()
    assert (rates.min() > 1e-3, rates.max() < 4e-3) == (True, True)
    assert np.median(rates) == pytest.approx(2e-3, rel=0.15)
    assert start(seeds[5:6], warmup=0.0, learning_rate=(1e-3, 4e-3))._learning_rate() == rates[5]


def test_each_run_draws_the_scale_of_its_first_weights_and_norms_stay_one(start):
    seeds = list(range(400, 432))
    plain, scaled = start(seeds), start(seeds, initial_scale=(0.1, 0.4))
    pairs = zip(plain.model.named_parameters(), scaled.model.parameters(), strict=True)
    factors = {n: (b / a).detach().flatten(1) for (n, a), b in pairs if "rotation" not in n}
    for name, factor in factors.items():
        if name.endswith("norm"):
            assert torch.equal(factor, torch.ones_like(factor))
        else:
            torch.testing.assert_close(factor, factors["embedding"][:, :1].expand_as(factor))
    drawn = factors["embedding"][:, 0]
    assert 0.1 <= float(drawn.min()) and float(drawn.max()) <= 0.4
    assert float(drawn.median()) == pytest.approx(0.2, rel=0.3)
    alone = start(seeds[3:4], initial_scale=(0.1, 0.4))
    assert torch.equal(alone.optimizer.values[0], scaled.optimizer.values[3])


@pytest.mark.parametrize(
    ("knob", "value", "default", "options"),
    [
        ("learning_rate_multiplier", 2.0, 1.0, {"learning_rate": 4e-3}),
        ("weight_decay", 0.5, 0.1, {"weight_decay": 0.5}),
    ],
)
def test_an_optimizer_knob_does_what_the_option_does(start, knob, value, default, options):
    recipe = {"learning_rate": 2e-3, "weight_decay": 0.1}
    by_knob, by_option = start(SEEDS, knobs=(knob,), **recipe), start(SEEDS, **recipe | options)
    by_knob.apply({knob: np.full(3, value)})
    assert np.array_equal(by_knob.advance(5).train_loss, by_option.advance(5).train_loss)
    by_knob.reset([0], [by_knob.sample_task(1)], [1])
    assert by_knob._rows[knob].tolist() == [default, value, value]


def test_untouched_knobs_leave_the_run_bit_identical(start):
    left, held = start(SEEDS), start(SEEDS)
    knobs = KnobSet(held.knobs)
    for _ in range(3):
        held.apply(knobs.values(knobs.default_positions(3)))
        for run in (left, held):
            run.advance(3)
    assert all(same_state(held, left, row) == [] for row in range(3))
    values = {name: v.tolist() for name, v in held.model.knobs.values().items()}
    assert values["attention_span"] == [16.0] * 3 and values["embedding_width"] == [1.0] * 3
    assert values["rope_base"] == pytest.approx([10_000.0] * 3, rel=1e-5)
    assert values["dropout"] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("context", [2, 6, 64])
def test_the_model_accepts_both_ends_of_every_knob(start, context):
    run = start([1], context=context)
    for knob in run.knobs:
        for value in (knob.low, knob.high):
            run.apply({knob.name: np.array([value])})
            in_force = run.model.knobs.values()[knob.name].tolist()
            assert in_force == pytest.approx([value], rel=1e-5, abs=1e-7)


def test_a_first_width_is_in_force_at_once_and_a_later_one_fades_in(start):
    run = start(SEEDS)
    run.apply({"embedding_width": np.array([0.5, 0.5, 1.0])})
    assert run.model.knobs.gates[:2].tolist() == [[1, 1, 0, 0]] * 2
    run.advance(2)
    run.apply({"embedding_width": np.array([1.0, 0.25, 1.0])})
    assert run.model.knobs.gates[:2].tolist() == [[1, 1, 0, 0]] * 2
    run.advance(4)
    assert run.model.knobs.gates[:2].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_narrow_width_freezes_the_rest_of_the_row_bit_for_bit(start):
    run = start(SEEDS)
    run.apply({"embedding_width": np.array([0.5, 1.0, 0.5])})
    before = run.state_dict([0])
    run.advance(4)
    after = run.state_dict([0])
    levels = run.model.parameter_levels()
    level = torch.cat([levels[n].flatten() for n, _ in run.model.named_parameters()])
    for name in ("values", "moment1", "moment2"):
        assert torch.equal(after[name][:, level > 1], before[name][:, level > 1]), name
        assert not torch.equal(after[name][:, level <= 1], before[name][:, level <= 1]), name


def test_a_measurement_counts_tokens_flops_and_relative_cost(start):
    run = start(SEEDS)
    full = run.advance(3)
    cost = run.cost()
    assert full.tokens_seen.tolist() == [3 * 4 * 16] * 3
    assert full.flops.tolist() == pytest.approx((3 * cost).tolist())
    assert full.relative_cost.tolist() == [1.0] * 3
    assert full.unique_tokens.tolist() == [run.sample_task(s).train_tokens for s in SEEDS]
    run.apply({"embedding_width": np.array([0.5, 1.0, 1.0]), "attention_span": np.full(3, 4.0)})
    later = run.advance(2)
    assert later.relative_cost[0] < later.relative_cost[1] < 1
    fading = run.cost()[[1, 1, 2]]  # the first is as wide as the others until it has faded
    assert later.flops.tolist() == pytest.approx((3 * cost + 2 * fading).tolist())
    last = run.advance(2)
    assert last.flops.tolist() == pytest.approx((later.flops + 2 * run.cost()).tolist())


def test_a_budget_of_flops_gives_cheaper_knobs_more_steps_and_no_other_losses(start):
    narrow = {"embedding_width": np.array([0.5, 1.0, 0.25])}
    run = start(SEEDS, budget="flops", horizon=20, dtype="float64")
    full = run.cost()[0]
    run.apply(narrow)
    cost, shown = run.cost(), [run.advance(5) for _ in range(4)]
    assert cost[2] < cost[0] < cost[1] == full
    steps = shown[-1].tokens_seen / (4 * 16)
    assert steps.tolist() == np.round(20 * full / cost).tolist()
    assert shown[-1].flops.tolist() == pytest.approx((steps * cost).tolist())
    for step in (1, 2, 3, 4):  # every control step ends where its share of the FLOPs does
        spent = shown[step - 1].flops
        assert np.abs(spent - 5 * step * full).max() <= cost.max() / 2
    by_steps = start(SEEDS, horizon=20, dtype="float64")
    by_steps.apply(narrow)
    wanted = by_steps.advance(5)
    for name in ("train_loss", "train_loss_std", "gradient_norm", "update_ratio_max"):
        own, other = getattr(shown[0], name), getattr(wanted, name)
        assert own[1] == pytest.approx(other[1], rel=1e-9) and own[0] != other[0], name


def test_a_budget_of_flops_stretches_the_learning_rate_over_all_its_steps(start):
    run = start([1, 2], budget="flops", horizon=40, learning_rate=0.5, warmup=0.25)
    run.apply({"embedding_width": np.array([0.5, 1.0])})
    seen = []
    for _ in range(4):
        run.advance(10)
        seen.append(run._learning_rate().tolist())
    narrow, full = np.array(seen).T
    assert narrow == pytest.approx(full, rel=0.05)
    assert full[-1] == pytest.approx(0.5 * 0.1)


def test_horizons_are_drawn_from_their_range_by_seed(text):
    run = build_run(1, {**TINY, "data": text, "horizon": [50, 400]})
    horizons = []
    for seed in range(60):
        run.draw_horizon(seed)
        horizons.append(run.horizon)
    run.draw_horizon(0)
    assert run.horizon == horizons[0] and len(set(horizons)) > 30
    assert 50 <= min(horizons) < 100 and 250 < max(horizons) <= 400
    assert 100 < np.median(horizons) < 200  # log-uniform: about sqrt(50 * 400)


# Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "d_model / n_heads"),
        ({"rotation": "roep"}, "Unknown rotation 'roep'"),
        ({"default_dropout": 0.9}, "dropout.*0.9"),
        ({"unique_bytes": (10, 5)}, "unique_bytes.*10, 5"),
        ({"data": "/no/such/file.txt"}, r"/no/such/file\.txt.*does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused_when_the_run_is_built(text, options, message):
    with pytest.raises(ValueError, match=message):
        build_run(1, {**TINY, "data": text, **options})


def test_data_too_short_for_the_context_are_refused_by_path(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short " * 10)
    run = build_run(1, {**TINY, "data": str(path), "context": 64})
    with pytest.raises(ValueError, match=r"short\.txt.*too short"):
        run.sample_task(0)


# Signals from inside ---------------------------------------------------------------------------


def test_reading_inside_a_model_changes_nothing_of_its_training(start):
    plain, watched = start(SEEDS), start(SEEDS, internal=True)
    for run in (plain, watched):
        run.apply(knobs_for(SEEDS))
    before, seen = plain.advance(5), watched.advance(5)
    assert before.internal == {} and set(seen.internal) == set(watched.internal_names)
    assert all(not same_state(plain, watched, row) for row in range(3))
    for value in seen.internal.values():
        assert value.shape == (3,) and np.isfinite(value).all()


def test_what_is_read_inside_a_run_depends_on_it_alone(start):
    together, alone = (start(seeds, internal=True, dtype="float64") for seeds in (SEEDS, [22]))
    for run, seeds in ((together, SEEDS), (alone, [22])):
        run.apply(knobs_for(seeds))
    one, other = together.advance(5).internal, alone.advance(5).internal
    for name, value in one.items():
        assert other[name][0] == pytest.approx(value[1], rel=1e-6)


def test_the_noise_of_two_sequences_is_measured_and_that_of_one_refused(start):
    assert np.isfinite(start([1], internal=True, batch_size=2).advance(1).internal[NOISE]).all()
    with pytest.raises(ConfigError, match="two half batches; got batch_size=1"):
        start([1], internal=True, batch_size=1)


def test_a_controller_observes_what_is_inside_where_it_is_measured(start):
    loops = {
        inside: ControlLoop(start([5], internal=inside), ControlConfig(n_control_steps=4))
        for inside in (False, True)
    }
    names = {inside: loop.codec.names for inside, loop in loops.items()}
    more = {f"{part}/{name}" for name in INTERNAL_NAMES for part in ("signal", "has")}
    assert set(names[True]) - set(names[False]) == more
    loop = loops[True]
    episode = loop.draw_episode(0, 0)
    seen = loop.reset([0], [episode])
    assert all(loop.codec.read(seen, name)[0] == 0 for name in more)  # nothing measured yet
    step = loop.step(np.zeros((1, 4)))
    for name in INTERNAL_NAMES:
        assert loop.codec.read(step.observation, f"has/{name}")[0] == 1
    entropy = step.measurement.internal["attention_entropy"][0]
    logit = loop.codec.read(step.observation, "signal/attention_entropy")[0]
    assert 1 / (1 + np.exp(-logit)) == pytest.approx(entropy, rel=1e-5)
