import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metactl import Knob, KnobSet, Measurement
from metactl.signals import BOUND, GROUPS, UNIVERSAL, Codec, History, slope

SETTINGS = settings(max_examples=30, deadline=None, database=None)
KNOBS = KnobSet(
    [
        Knob(name="a", low=0, high=1, default=0.25),
        Knob(name="b", low=1, high=16, default=2, scale="log2"),
    ]
)
CODEC = Codec(KNOBS)
FUNCTIONS = {signal.name: signal.function for signal in UNIVERSAL}
LN2 = np.log(2)

# A run at a quarter, half and three quarters of its budget; the probe was also taken at the start.
RECORD = {
    "train_loss": [32.0, 8.0, 2.0],
    "train_loss_std": [1.0, 1.0, 0.2],
    "probe_loss": [4.0, 2.0, 1.0],
    "gradient_norm": [1.0, 2.0, 4.0],
    "update_ratio_median": [1e-2, 1e-3, 1e-4],
    "update_ratio_max": [1e-3, 1e-2, 1e-1],
    "tokens_seen": [150.0, 300.0, 450.0],
    "unique_tokens": [50.0, 50.0, 50.0],
    "n_parameters": [5000.0, 5000.0, 5000.0],
    "relative_cost": [1.0, 1.0, 0.5],
}
EXPECTED = {
    "progress": 0.5,
    "train_level": -4 * LN2,
    "train_slope_fast": -8 * LN2,
    "train_slope_slow": -8 * LN2,
    "loss_noise": np.log10(0.1 / (0.08 * LN2 + 1e-4)),
    "probe_level": -3 * LN2,
    "probe_slope_fast": -4 * LN2,
    "probe_slope_slow": -4 * LN2,
    "generalisation_gap": -4 * LN2,
    "gap_slope": 4 * LN2,
    "best_distance": 0.0,
    "gradient_level": LN2,
    "gradient_trend": 4 * LN2,
    "update_ratio": -1.0,
    "update_ratio_peak": 1.0,
    "data_pressure": 2.0,
    "epochs": 1.0,
    "cost_rate": -1.0,
}


def history(record, progress=(0.25, 0.5, 0.75), start=8.0, length=8):
    """The history of one run; a column that `record` leaves out was never measured."""
    past = History(1, length)
    past.reset([0], {"progress": np.zeros(1), "probe_loss": np.array([start])})
    for i, now in enumerate(progress):
        measured = {name: np.array([values[i]]) for name, values in record.items()}
        measured = {"train_loss": np.array([np.nan]), **measured}
        past.append(np.array([now]), Measurement(diverged=np.zeros(1, bool), **measured))
    return past


def observe(past, codec=CODEC):
    n = len(past["progress"])
    defaults = codec.knobs.default_positions(n)
    return codec.observe(past, defaults, np.zeros_like(defaults), np.ones_like(defaults))


def read(past, name):
    return float(CODEC.read(observe(past), name)[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_signal_has_the_value_computed_by_hand(name):
    assert FUNCTIONS[name](history(RECORD))[0] == pytest.approx(EXPECTED[name], abs=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_observation_holds_the_value_computed_by_hand(name):
    assert read(history(RECORD), f"signal/{name}") == pytest.approx(EXPECTED[name], abs=1e-5)


def test_the_distance_from_the_best_probe_is_ten_times_the_log_of_its_ratio():
    past = history({**RECORD, "probe_loss": [4.0, 1.0, 1.1]})
    assert read(past, "signal/best_distance") == pytest.approx(10 * np.log(1.1), abs=1e-5)


def test_the_gradient_level_is_relative_to_the_median_not_the_mean():
    past = history({**RECORD, "gradient_norm": [1.0, 1000.0, 2.0]})
    assert read(past, "signal/gradient_level") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("half_life", [0.05, 0.2])
def test_recent_points_weigh_twice_as_much_for_every_half_life(half_life):
    x = np.array([0.0, half_life, 2 * half_life])
    y = np.array([3.0, 0.0, 1.0])
    expected = np.polyfit(x, y, 1, w=np.sqrt([0.25, 0.5, 1.0]))[0]
    assert slope(x[None], y[None], half_life)[0] == pytest.approx(expected)


@given(
    rise=st.floats(-50, 50),
    level=st.floats(-5, 5),
    gaps=st.lists(st.floats(0.01, 0.3), min_size=1, max_size=10),
    half_life=st.floats(0.02, 1),
)
@SETTINGS
def test_the_slope_of_a_straight_line_is_exact(rise, level, gaps, half_life):
    x = np.cumsum([0.0, *gaps])
    values = level + rise * x
    assert slope(x[None], values[None], half_life)[0] == pytest.approx(rise, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("n_points", [0, 1])
def test_a_slope_of_fewer_than_two_points_is_unknown_and_observed_as_zero(n_points):
    x, y = np.full((1, 4), np.nan), np.full((1, 4), np.nan)
    x[0, 4 - n_points :], y[0, 4 - n_points :] = 0.5, 2.0
    assert np.isnan(slope(x, y, 0.1)).tolist() == [True]
    first = history({name: values[:1] for name, values in RECORD.items()}, progress=(0.25,))
    for name in ("train_slope_fast", "train_slope_slow", "gap_slope", "gradient_trend"):
        assert read(first, f"signal/{name}") == 0


positive = st.lists(st.floats(0.1, 50), min_size=3, max_size=3)


@given(train=positive, std=positive, probe=positive, start=st.floats(0.1, 50))
@SETTINGS
def test_signals_do_not_depend_on_the_unit_of_the_loss(train, std, probe, start):
    losses = {"train_loss": train, "train_loss_std": std, "probe_loss": probe}
    tripled = {name: [3 * value for value in values] for name, values in losses.items()}
    seen = observe(history({**RECORD, **losses}, start=start))
    again = observe(history({**RECORD, **tripled}, start=3 * start))
    np.testing.assert_allclose(again, seen, atol=1e-4)


def test_signals_do_not_depend_on_how_many_decisions_a_run_has():
    def decayed(n):
        x = np.arange(1, n + 1) / n
        losses = {"train_loss": 3 * np.exp(-x), "train_loss_std": np.full(n, 0.1)}
        return history(
            {**losses, "probe_loss": 4 * np.exp(-2 * x), "gradient_norm": np.exp(x)},
            progress=x,
            start=4.0,
            length=n + 1,
        )

    names = ("probe_slope_fast", "probe_slope_slow", "train_slope_fast", "gap_slope")
    for name in (*names, "gradient_trend", "probe_level", "best_distance", "loss_noise"):
        slow, fast = read(decayed(20), f"signal/{name}"), read(decayed(80), f"signal/{name}")
        # The noise is relative to a level that both runs reach, up to float32.
        assert fast == pytest.approx(slow, abs=1e-4), name


@pytest.mark.parametrize("group", GROUPS)
def test_what_was_never_measured_is_zero_and_its_flag_says_so(group):
    absent = history({k: v for k, v in RECORD.items() if k != group}, start=np.nan)
    if group != "probe_loss":
        absent = history({k: v for k, v in RECORD.items() if k != group})
    assert read(absent, f"has/{group}") == 0
    assert [read(absent, f"has/{other}") for other in GROUPS if other != group] == [1] * 4
    for signal in UNIVERSAL:
        if signal.group == group:
            assert read(absent, f"signal/{signal.name}") == 0, signal.name


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("now", [np.nan, np.inf])
def test_what_is_no_longer_measured_is_zero_and_its_flag_says_so(group, now):
    lost = history({**RECORD, group: [*RECORD[group][:2], now]})
    assert read(lost, f"has/{group}") == 0
    seen = {s.name: read(lost, f"signal/{s.name}") for s in UNIVERSAL if s.group == group}
    assert seen == dict.fromkeys(seen, 0.0)


anything = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, np.nan, np.inf, -np.inf])
)


@given(st.fixed_dictionaries({name: st.lists(anything, min_size=3, max_size=3) for name in RECORD}))
@SETTINGS
def test_observations_are_finite_and_bounded_whatever_was_measured(record):
    seen = observe(history(record, start=record["train_loss"][0]))
    assert seen.dtype == np.float32
    assert np.isfinite(seen).all()
    assert (np.abs(seen) <= BOUND).all()


def test_losses_of_zero_give_a_finite_and_bounded_observation():
    zeros = {name: [0.0, 0.0, 0.0] for name in RECORD}
    seen = observe(history(zeros, start=0.0))
    assert np.isfinite(seen).all()
    assert (np.abs(seen) <= BOUND).all()


def test_a_run_that_begins_again_forgets_its_past_and_its_neighbour_does_not():
    past = History(2, 4)
    past.reset([0, 1], {"progress": np.zeros(2), "probe_loss": np.array([4.0, 4.0])})
    losses = {"train_loss": np.array([2.0, 2.0]), "probe_loss": np.array([2.0, 2.0])}
    past.append(np.array([0.5, 0.5]), Measurement(diverged=np.zeros(2, bool), **losses))
    past.reset([0], {"progress": np.zeros(1), "probe_loss": np.array([8.0])})
    assert CODEC.read(observe(past), "signal/progress").tolist() == [-1, 0]
    np.testing.assert_allclose(CODEC.read(observe(past), "signal/probe_level"), [0, -LN2], 1e-6)
    np.testing.assert_array_equal(past.first("probe_loss"), [8.0, 4.0])


def test_names_of_an_observation_are_unique_and_in_the_declared_order():
    assert len(set(CODEC.names)) == len(CODEC.names) == len(CODEC)
    assert CODEC.names[: len(UNIVERSAL)] == tuple(f"signal/{name}" for name in EXPECTED)
    assert CODEC.names[len(UNIVERSAL) : -6] == tuple(f"has/{group}" for group in GROUPS)
    assert CODEC.names[-6:] == (
        "knob/a/position",
        "knob/a/last_move",
        "knob/a/available",
        "knob/b/position",
        "knob/b/last_move",
        "knob/b/available",
    )


def test_knob_entries_are_position_last_move_and_availability():
    seen = CODEC.observe(
        history(RECORD), np.array([[0.25, 1.0]]), np.array([[-0.5, 1.0]]), np.ones((1, 2))
    )
    assert seen[0, -6:].tolist() == [-0.5, -0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_frozen_knob_is_observed_as_absent():
    seen = CODEC.observe(
        history(RECORD), np.array([[0.3, 0.9]]), np.array([[0.5, 0.5]]), np.array([[0.0, 1.0]])
    )
    assert seen[0, -6:-3].tolist() == [0, 0, 0]
    assert CODEC.read(seen, "knob/b/available").tolist() == [1]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
@SETTINGS
def test_positions_are_read_back_from_observations(rows):
    positions = np.array(rows)
    past = History(len(rows), 3)
    ones = np.ones_like(positions)
    seen = CODEC.observe(past, positions, 0 * ones, ones)
    np.testing.assert_allclose(CODEC.positions(seen), positions, atol=1e-6)


def test_reading_an_unknown_entry_suggests_a_known_one():
    with pytest.raises(
        ValueError, match=r"Unknown observation .* Did you mean 'signal/probe_level'"
    ):
        CODEC.read(observe(history(RECORD)), "signal/probe_levl")


@pytest.mark.parametrize("progress", [[[]], [[0.0]]])
def test_columns_that_hold_no_run_are_no_history(progress):
    history = History(1, 4)
    with pytest.raises(ValueError, match="a history needs at least 2 columns, got"):
        history.load_state_dict({"progress": progress})


@pytest.mark.parametrize(
    ("missing", "group", "masked"),
    [
        ("update_ratio_max", "update_ratio_median", ("update_ratio", "update_ratio_peak")),
        ("n_parameters", "unique_tokens", ("data_pressure", "epochs")),
        ("tokens_seen", "unique_tokens", ("data_pressure", "epochs")),
    ],
)
def test_a_group_of_which_a_part_is_missing_counts_as_not_measured(missing, group, masked):
    seen = observe(history({name: v for name, v in RECORD.items() if name != missing}))
    assert CODEC.read(seen, f"has/{group}") == 0
    assert [CODEC.read(seen, f"signal/{name}")[0] for name in masked] == [0, 0]


def test_a_loss_of_exactly_nothing_is_a_failed_report_and_no_news():
    losses = [4.0, 3.0, 2.0, 1.5, 1.0]
    read = {}
    for name, probes in (("whole", losses), ("failed", [4.0, 3.0, 0.0, 1.5, 1.0])):
        record = {"train_loss": probes, "probe_loss": probes}
        read[name] = history(record, progress=np.arange(1, 6) / 5)
    assert read["failed"]["probe_loss"][0, -5:].tolist() == [4.0, 3.0, 3.0, 1.5, 1.0]
    assert read["failed"]["train_loss"][0, -5:].tolist() == [4.0, 3.0, 3.0, 1.5, 1.0]
    for name in ("best_distance", "probe_level", "train_level", "generalisation_gap"):
        assert FUNCTIONS[name](read["failed"]) == FUNCTIONS[name](read["whole"]), name
