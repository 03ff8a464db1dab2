import logging
import re

import numpy as np
import pytest
from toy_plant import ToyPlant

from metactl import Knob, KnobSet, Policy
from metactl.controllers import (
    BaseController,
    GapDriven,
    Guard,
    Learned,
    Plateau,
    RandomMoves,
    Replay,
    Responsive,
    Schedule,
    Static,
    Together,
    WithSignalsOf,
)
from metactl.env import ControlLoop
from metactl.episodes import ControlConfig
from metactl.homeostasis import SetPoints
from metactl.policy import PolicyCard
from metactl.rollout import PlannedRun, play
from metactl.signals import BOUND, Codec

N = 10
A = Knob(name="a", low=0, high=1, default=0.25, max_move=8)
B = Knob(name="b", low=1, high=16, default=4, scale="log2", max_move=8)
C = Knob(name="c", low=0, high=1, default=0.5)
CODEC = Codec(KnobSet([A, B]))


def observation(codec=CODEC, positions=(0.25, 0.5), **entries):
    """One run's observation: knobs at `positions`, other entries by name with `__` for `/`."""
    seen = np.zeros((1, len(codec)), dtype=np.float32)
    for name, position in zip(codec.knobs.names, positions, strict=True):
        for entry, value in (("position", 2 * position - 1), ("available", 1)):
            seen[0, codec.names.index(f"knob/{name}/{entry}")] = value
    for name, value in entries.items():
        seen[0, codec.names.index(name.replace("__", "/"))] = value
    return seen


def policy(knobs=(A, B), observations=CODEC.names, hidden=(8,), seed=0, scale=0.2):
    rng = np.random.default_rng(seed)
    sizes = (len(observations), *hidden, len(knobs))
    weights = {"mean": rng.normal(0, 1, sizes[0]), "std": rng.uniform(0.5, 2, sizes[0])}
    for i in range(len(sizes) - 1):
        weights[f"weight_{i}"] = rng.normal(0, scale, (sizes[i + 1], sizes[i]))
        weights[f"bias_{i}"] = rng.normal(0, scale, sizes[i + 1])
    card = PolicyCard(
        format_version=1,
        metactl_version="0",
        knobs=tuple(knobs),
        observations=tuple(observations),
        hidden=hidden,
        n_control_steps=N,
    )
    return Policy(card, weights)


def played(controllers, n_rows=None, config=None):
    """Whole toy runs, row i with episode i."""
    loop = ControlLoop(
        ToyPlant(n_rows or len(controllers)), config or ControlConfig(n_control_steps=N)
    )
    trials = [
        PlannedRun(arm=str(i), episode=loop.draw_episode(i, 0), controller=controller)
        for i, controller in enumerate(controllers)
    ]
    return play(loop, trials)


def begun(controller, n_runs=1):
    """A controller at the start of runs of `N` control steps."""
    controller.keep_pace(N)
    controller.begin(CODEC, n_runs)
    return controller


class Scripted(BaseController):
    """Answers what it is told to, or raises it."""

    def __init__(self, answer):
        self.answer, self.asked = answer, 0

    def act(self, observation):
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


# Open loop -------------------------------------------------------------------------------------


def test_a_static_controller_never_moves_a_knob():
    result = played([Static()], config=ControlConfig(n_control_steps=N, random_start=1.0))[0]
    assert (result.positions == result.positions[0]).all()
    assert result.positions[0].tolist() != [0.5, 0.5]


def test_a_schedule_is_followed_from_the_first_step_to_the_last():
    schedule = Schedule(np.array([0.0, 0.5, 1.0]), np.array([[0.5, 0.5], [1, 0.5], [0, 1]]))
    positions = played([schedule])[0].positions
    progress = np.arange(1, N + 1) / N
    expected = np.where(progress <= 0.5, 0.5 + progress, 2 - 2 * progress)
    np.testing.assert_allclose(positions[1:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(positions[1:, 1], np.maximum(0.5, progress), atol=1e-6)


@pytest.mark.parametrize("progress", [[0.0, 1.0, 0.5], [0.0, 0.0, 1.0], [0.0, 1.0]])
def test_a_schedule_needs_increasing_points_and_a_row_for_each(progress):
    with pytest.raises(ValueError, match=rf"got {len(progress)} points and 3 rows"):
        Schedule(np.array(progress), np.zeros((3, 2)))


@pytest.mark.parametrize("n_control_steps", [5, 20])
def test_whoever_plays_runs_tells_controllers_how_many_control_steps_they_have(n_control_steps):
    schedule = Schedule(np.array([0.0, 1.0]), np.array([[0.0, 0.0], [1.0, 1.0]]))
    both = [Guard(schedule), WithSignalsOf(schedule, [], np.zeros((n_control_steps, 0)))]
    config = ControlConfig(n_control_steps=n_control_steps)
    for run in played(both, config=config):
        moved = np.arange(1, n_control_steps + 1) / n_control_steps
        np.testing.assert_allclose(run.positions[-3:], np.stack([moved, moved], 1)[-3:], atol=1e-6)


def test_a_replay_reproduces_a_recorded_trajectory():
    recorded = played([RandomMoves(3)])[0].positions
    assert np.ptp(recorded, axis=0).min() > 0.1
    np.testing.assert_allclose(played([Replay(recorded)])[0].positions, recorded, atol=1e-6)


def test_random_moves_are_reproducible_and_differ_between_seeds():
    one, same, other = (played([RandomMoves(seed)])[0].positions for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    "controller",
    [
        Static(),
        RandomMoves(5),
        Responsive("a", patience=2),
        Plateau("a"),
        Together(Plateau("a"), GapDriven("b")),
        Guard(Responsive("a", patience=2)),
        Learned(policy()),
        Schedule(np.array([0.0, 1.0]), np.array([[0, 0], [1, 1]])),
    ],
    ids=lambda controller: type(controller).__name__,
)
def test_a_controller_begins_again_as_if_it_had_never_run(controller):
    def actions():
        controller.begin(CODEC, 1)
        return [controller.act(observation(signal__train_level=0.1 * i)) for i in range(8)]

    np.testing.assert_array_equal(actions(), actions())


# The rule --------------------------------------------------------------------------------------


def responses(rule, levels, codec=CODEC):
    rule.begin(codec, 1)
    actions = [rule.act(observation(codec, signal__train_level=level))[0] for level in levels]
    return np.array(actions)


def test_the_rule_moves_only_its_own_knob():
    actions = responses(Responsive("b"), [0.0] * 10)
    assert (actions[:, 0] == 0).all()
    assert (actions[:, 1] != 0).any()


def test_the_rule_waits_for_its_patience_after_every_improvement():
    levels = [-0.1, -0.2, -0.2, -0.2, -0.5, *[-0.5] * 20]
    moves = np.flatnonzero(responses(Responsive("a", patience=4, smoothing=1.0), levels)[:, 0])
    assert moves[0] == 8  # -0.5 at step 4 was the last improvement
    assert np.diff(moves).tolist() == [4] * (len(moves) - 1)


def test_the_rule_does_not_move_while_the_loss_improves():
    assert not responses(Responsive("a"), np.linspace(0, -2, 20)).any()


def test_the_rule_is_not_fooled_by_one_bad_batch():
    levels = np.linspace(0, -3, 20)
    levels[10] += 0.2
    assert not responses(Responsive("a"), levels).any()


def test_the_rule_turns_round_when_a_move_did_not_help_and_goes_on_when_it_did():
    rule = Responsive("a", patience=3, step=0.5, smoothing=1.0)
    futile = responses(rule, [0.0] * 13)[:, 0]
    assert futile[futile != 0].tolist() == [0.5, -0.5, 0.5, -0.5]
    helped = responses(rule, [0.0] * 4 + [-1.0] * 4)[:, 0]
    assert helped[helped != 0].tolist() == [0.5, 0.5]


def test_the_rule_leaves_a_run_without_its_knob_alone():
    assert not responses(Responsive("rope_base"), [0.0] * 10).any()


# Rules of practitioners ------------------------------------------------------------------------


def test_a_plateau_lowers_its_knob_until_the_loss_improves_again():
    levels = [-0.1, -0.2, -0.2, -0.2, -0.2, -0.2, -0.3, -0.3]
    actions = responses(Plateau("a", patience=3), levels)
    assert actions[:, 0].tolist() == [0, 0, 0, 0, -1, -1, 0, 0]
    steady = responses(Plateau("a", patience=3), np.linspace(0, -0.019, 20))  # 0.001 each step
    assert not steady.any()
    assert not actions[:, 1].any()


@pytest.mark.parametrize(("gap", "move"), [(0.1, 1), (0.05, 0), (0.0, -1), (-0.1, -1)])
def test_a_gap_between_the_losses_raises_what_regularises(gap, move):
    rule = GapDriven("b")
    rule.begin(CODEC, 1)
    probed = {"has__probe_loss": 1.0, "signal__generalisation_gap": 4 * gap}
    seen = observation(**probed)
    assert rule.act(seen).tolist() == [[0, move]]
    assert rule.act(observation(signal__generalisation_gap=4 * gap)).tolist() == [[0, 0]]
    assert rule.act(observation(signal__progress=-1.0, **probed)).tolist() == [[0, 0]]


def test_rules_together_move_each_their_own_and_go_on_where_they_were():
    left, right = (Together(Plateau("a", patience=2), GapDriven("b")) for _ in range(2))
    left.begin(CODEC, 1)
    right.begin(CODEC, 1)
    seen = observation(signal__generalisation_gap=0.4, has__probe_loss=1.0)
    assert [left.act(seen).tolist() for _ in range(2)] == [[[0, 1]]] * 2
    right.load_state_dict(left.state_dict())
    assert left.act(seen).tolist() == right.act(seen).tolist() == [[-1, 1]]


# The guard -------------------------------------------------------------------------------------


def guarded(answer, **options):
    return begun(Guard(Scripted(answer), **options))


def test_the_guard_passes_on_sound_actions_within_bounds():
    guard = guarded(np.array([[0.5, -7.0]]))
    assert guard.act(observation()).tolist() == [[0.5, -1.0]]
    assert guard.vetoes.tolist() == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_no_number_holds_that_run_only(bad):
    guard = begun(Guard(Scripted(np.array([[bad, 0.5], [0.25, 0.5]]))), 2)
    assert guard.act(np.repeat(observation(), 2, axis=0)).tolist() == [[0, 0], [0.25, 0.5]]
    assert guard.vetoes.tolist() == [1, 0]


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("boom"),
        None,
        "up",
        np.zeros(2),
        np.zeros((1, 3)),
        np.zeros((3, 2)),
    ],
    ids=["raises", "none", "text", "flat", "too wide", "too many rows"],
)
def test_a_controller_that_fails_is_off_for_good_with_one_warning(answer, caplog):
    guard = guarded(answer)
    with caplog.at_level(logging.WARNING, logger="metactl"):
        actions = [guard.act(observation()) for _ in range(3)]
    assert [action.tolist() for action in actions] == [[[0.0, 0.0]]] * 3
    assert len(caplog.records) == 1
    assert guard.controller.asked == 1


def test_a_controller_that_failed_stays_off_in_the_next_run(caplog):
    guard = guarded(RuntimeError("boom"))
    guard.act(observation())
    guard.begin(CODEC, 1)
    guard.act(observation())
    assert guard.controller.asked == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("split", ["probe", "train"])
def test_when_the_loss_leaves_the_band_knobs_go_to_where_they_were_good_then_to_defaults(split):
    guard = guarded(np.array([[1.0, 1.0]]), patience=2, band=0.2)
    level, has = f"signal__{split}_level", {"has__probe_loss": float(split == "probe")}
    good, now = (0.6, 0.4), (0.9, 0.9)
    assert guard.act(observation(positions=good, **{level: -1.0}, **has)).tolist() == [[1, 1]]
    # Within the band the controller decides, but this is not where knobs were good.
    assert guard.act(observation(positions=now, **{level: -0.85}, **has)).tolist() == [[1, 1]]
    largest = A.max_move / N
    back = (np.array(good) - now) / largest
    home = (np.array([0.25, 0.5]) - now) / largest
    for expected in (back, back, home, home):
        action = guard.act(observation(positions=now, **{level: -0.7}, **has))
        np.testing.assert_allclose(action[0], expected, atol=1e-5)
    assert guard.vetoes.tolist() == [4]
    assert guard.act(observation(positions=now, **{level: -0.9}, **has)).tolist() == [[1, 1]]


def test_a_run_that_recovers_from_what_threw_it_is_given_back_and_guarded_from_there():
    guard = guarded(np.array([[1.0, 1.0]]), patience=1, band=0.2)

    def acts(level):
        seen = observation(positions=(0.9, 0.9), signal__train_level=level)
        return guard.act(seen).tolist() == [[1, 1]]

    assert acts(-1.0)
    assert not any([acts(-0.3), acts(np.nan), acts(-0.2), acts(-0.39)])  # thrown: 0.2 from -0.2
    assert acts(-0.41)  # no longer as good as it was, but 0.21 better than at its worst
    assert acts(-0.22)  # within a band of where it came back
    assert not acts(-0.2)
    assert acts(-0.6) and acts(-0.41) and not acts(-0.39)


def test_the_guard_takes_over_sooner_under_a_learned_policy_than_under_a_rule():
    assert Guard(Learned(Policy.load("default"))).band < Guard(Static()).band
    assert Guard(Learned(Policy.load("default")), band=0.5).band == 0.5
    blind = WithSignalsOf(Learned(Policy.load("default")), [], np.zeros((N, 0)))
    assert Guard(blind).band == Guard(Learned(Policy.load("default"))).band


def test_the_guard_takes_over_when_the_vitals_leave_their_balance_before_the_loss_does():
    scripted = Scripted(np.array([[1.0, 1.0]]))
    scripted.set_points = SetPoints(
        progress=(0.0, 1.0), medians={"update_ratio": (0, 0)}, half_widths={"update_ratio": (1, 1)}
    )
    guard = begun(Guard(scripted, drive_band=4.0, patience=0))

    def act(update_ratio, positions=(0.9, 0.9), level=-0.49):
        seen = {"signal__update_ratio": update_ratio, "has__update_ratio_median": 1.0}
        return guard.act(observation(positions=positions, signal__train_level=level, **seen))

    assert act(0.5, (0.6, 0.4), -0.4).tolist() == [[1, 1]]  # in balance: these knobs are good
    assert act(1 + 1.9**0.5, (0.6, 0.4), -0.5).tolist() == [[1, 1]]  # a drive of 1.9, a new best
    home = (np.array([0.25, 0.5]) - 0.9) / (A.max_move / N)
    np.testing.assert_allclose(act(-1 - 9**0.5)[0], home, atol=1e-5)  # 9: beyond 4 times 1.9
    assert guard.reasons == ["the drive away from balance is 9: back to the defaults"]
    assert act(0.5).tolist() == [[1, 1]] and guard.vetoes.tolist() == [1]


def test_a_run_that_never_was_like_those_of_the_set_points_is_left_to_its_controller():
    scripted = Scripted(np.array([[1.0, 1.0]]))
    scripted.set_points = SetPoints(
        progress=(0.0, 1.0), medians={"update_ratio": (0, 0)}, half_widths={"update_ratio": (1, 1)}
    )
    guard = begun(Guard(scripted))
    guard.act(observation(signal__progress=-1.0))
    for level in (0.05, *np.linspace(0, -1, 8), -0.99):  # the first loss is no new best
        seen = {"signal__update_ratio": -7.0, "has__update_ratio_median": 1.0}
        guard.act(observation(signal__progress=-0.5, signal__train_level=level, **seen))
    assert guard.vetoes.tolist() == [0]
    assert Learned(Policy.load("default")).set_points is not None


def test_a_guarded_controller_that_diverges_alone_keeps_its_run_alive():
    class Reckless(Scripted):
        def act(self, observation):
            return np.array([[np.nan, np.nan]])

    result = played([Guard(Reckless(None))])[0]
    assert not result.diverged
    assert (result.positions == result.positions[0]).all()


# The learned controller ------------------------------------------------------------------------


def decided(controller, codec, seen):
    controller.begin(codec, len(seen))
    return dict(zip(codec.knobs.names, controller.act(seen).T, strict=True))


def rearranged(codec, seen):
    """The same facts for another codec; what it does not have is dropped."""
    out = np.zeros((len(seen), len(codec)), dtype=np.float32)
    for i, name in enumerate(codec.names):
        if name in CODEC.names:
            out[:, i] = seen[:, CODEC.names.index(name)]
    return out


SEEN = np.random.default_rng(1).normal(0, 1, (5, len(CODEC))).astype(np.float32)


def test_knobs_and_observations_are_matched_by_name_whatever_their_order():
    expected = decided(Learned(policy()), CODEC, SEEN)
    assert np.ptp(expected["a"]) > 0.01
    other = Codec(KnobSet([B, C, A]), CODEC.signals[::-1])
    # C is no part of the policy, so its entries say nothing.
    found = decided(Learned(policy()), other, rearranged(other, SEEN))
    np.testing.assert_allclose(found["a"], expected["a"], atol=1e-12)
    np.testing.assert_allclose(found["b"], expected["b"], atol=1e-12)


def test_knobs_that_the_policy_does_not_know_are_left_alone():
    codec = Codec(KnobSet([C, A]))
    found = decided(Learned(policy()), codec, rearranged(codec, SEEN))
    assert (found["c"] == 0).all()
    assert (found["a"] != 0).all()


def test_what_the_run_does_not_have_is_observed_as_absent():
    codec = Codec(KnobSet([A]))
    without = SEEN.copy()
    without[:, [i for i, name in enumerate(CODEC.names) if name.startswith("knob/b/")]] = 0
    expected = decided(Learned(policy()), CODEC, without)["a"]
    found = decided(Learned(policy()), codec, rearranged(codec, SEEN))["a"]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_moves_keep_their_size_where_a_run_allows_larger_ones():
    wider = [Knob(name="a", low=0, high=1, default=0.25, max_move=32), B]
    codec = Codec(KnobSet(wider))
    trained, freer = Learned(policy()), Learned(policy())
    trained.begin(CODEC, 1)
    freer.begin(codec, 1)
    seen = observation(knob__a__last_move=0.8)
    same = observation(codec, knob__a__last_move=0.2)  # the same move, a share of a larger one
    before = CODEC.knobs.positions({}, 1)
    moved = CODEC.knobs.move(before, trained.act(seen), progress=0.01)
    moved_freer = codec.knobs.move(before, freer.act(same), progress=0.01)
    assert not np.allclose(moved, before)
    np.testing.assert_allclose(moved_freer, moved, atol=1e-7)


def test_a_policy_without_a_knob_in_common_is_refused_with_both_lists():
    message = re.escape("the policy moves a, b; the run has c")
    with pytest.raises(ValueError, match=message):
        Learned(policy()).begin(Codec(KnobSet([C])), 1)


def test_the_action_of_a_run_does_not_depend_on_how_many_runs_there_are():
    seen = np.random.default_rng(2).normal(0, 2, (33, len(CODEC))).astype(np.float32)
    learned = Learned(policy(hidden=(64, 64)))
    together = decided(learned, CODEC, seen)["b"]
    alone = [decided(learned, CODEC, seen[i : i + 1])["b"][0] for i in range(33)]
    assert together.tolist() == alone


def test_learned_actions_stay_in_the_action_space():
    wild = np.full((3, len(CODEC)), 10.0, dtype=np.float32) * np.array([[1], [-1], [0]])
    actions = decided(Learned(policy(scale=50.0)), CODEC, wild.astype(np.float32))
    assert max(np.abs(column).max() for column in actions.values()) <= 1


def test_runs_under_their_own_controllers_do_not_disturb_each_other():
    together = played([Static(), RandomMoves(1), Static()])
    alone = played([Static(), RandomMoves(1)], n_rows=3)
    for left, right in zip(together, alone, strict=False):
        np.testing.assert_array_equal(left.positions, right.positions)
        np.testing.assert_array_equal(left.probe_loss, right.probe_loss)


def test_a_loss_of_exactly_nothing_is_a_failed_report_and_no_best():
    guard = guarded(np.array([[1.0, 1.0]]), band=0.2)

    def acts(level):
        seen = observation(positions=(0.9, 0.9), signal__train_level=level)
        return guard.act(seen).tolist() == [[1, 1]]

    assert acts(-0.5) and acts(-BOUND) and acts(-0.45)
    assert not acts(-0.2)
