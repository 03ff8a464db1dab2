import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metactl import Knob, KnobSet

SETTINGS = settings(max_examples=30, deadline=None, database=None)
KNOBS = {
    "linear": Knob(name="dropout", low=0.0, high=0.6, default=0.1),
    "log2": Knob(name="base", low=4.0, high=1e6, default=10_000.0, scale="log2"),
    "logit": Knob(name="beta", low=0.01, high=0.999, default=0.9, scale="logit"),
    "levels": Knob(
        name="width", low=0.25, high=1.0, default=0.75, scale="levels", levels=(0.25, 0.5, 0.75, 1)
    ),
}
CONTINUOUS = [scale for scale in KNOBS if scale != "levels"]
positions = st.floats(0, 1)
every_scale = pytest.mark.parametrize("scale", KNOBS)


@pytest.mark.parametrize("scale", CONTINUOUS)
@given(position=positions)
@SETTINGS
def test_a_position_survives_the_way_to_a_value_and_back(scale, position):
    knob = KNOBS[scale]
    assert knob.position(knob.value(np.array([position])))[0] == pytest.approx(position, abs=1e-9)


@pytest.mark.parametrize("scale", CONTINUOUS)
@given(share=positions)
@SETTINGS
def test_a_value_survives_the_way_to_a_position_and_back(scale, share):
    knob = KNOBS[scale]
    value = knob.low + share * (knob.high - knob.low)
    assert knob.value(knob.position(np.array([value])))[0] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("level", KNOBS["levels"].levels)
def test_a_level_survives_the_way_to_a_position_and_back(level):
    knob = KNOBS["levels"]
    assert knob.value(knob.position(np.array([level]))).tolist() == [level]


@given(position=positions)
@SETTINGS
def test_a_knob_of_levels_only_takes_its_levels(position):
    assert KNOBS["levels"].value(np.array([position]))[0] in KNOBS["levels"].levels


@pytest.mark.parametrize(
    ("scale", "middle"),
    [("linear", 0.3), ("log2", 2000.0), ("logit", None), ("levels", None)],
)
def test_half_way_is_the_mean_on_the_scale_of_the_knob(scale, middle):
    knob = KNOBS[scale]
    half = knob.value(np.array([0.5]))[0]
    if scale == "logit":
        odds = [knob.low / (1 - knob.low), knob.high / (1 - knob.high)]
        assert half / (1 - half) == pytest.approx(np.sqrt(odds[0] * odds[1]))
    elif scale == "levels":
        assert half in (0.5, 0.75)
    else:
        assert half == pytest.approx(middle)


@every_scale
@given(position=st.floats(-5, 5), action=st.floats(-1e6, 1e6))
@SETTINGS
def test_no_position_or_action_leaves_the_bounds(scale, position, action):
    knob = KNOBS[scale]
    assert knob.low <= knob.value(np.array([position]))[0] <= knob.high
    knobs = KnobSet([knob])
    start = knobs.default_positions(1)
    moved = knobs.move(start, np.array([[action]]), progress=1.0)
    assert 0 <= moved[0, 0] <= 1
    assert knob.low <= knobs.values(moved)[knob.name][0] <= knob.high


@every_scale
@given(position=positions)
@SETTINGS
def test_action_zero_moves_nothing(scale, position):
    start = np.array([[position]])
    moved = KnobSet([KNOBS[scale]]).move(start, np.zeros((1, 1)), progress=0.3)
    assert moved.tolist() == start.tolist()


@given(
    low=st.floats(1e-3, 0.4),
    high=st.floats(0.5, 0.999),
    share=positions,
    scale=st.sampled_from(CONTINUOUS),
)
@SETTINGS
def test_an_untouched_knob_has_exactly_its_default(low, high, share, scale):
    default = min(max(low + share * (high - low), low), high)
    knobs = KnobSet([Knob(name="k", low=low, high=high, default=default, scale=scale)])
    moved = knobs.move(knobs.default_positions(3), np.zeros((3, 1)), progress=0.1)
    assert knobs.values(moved)["k"].tolist() == [default] * 3


def test_a_default_between_the_levels_of_a_knob_is_refused():
    with pytest.raises(ValueError, match=r"'w': default must be one of the levels \(1, 3\), got 2"):
        Knob(name="w", low=1, high=3, default=2, scale="levels", levels=(1, 3))


@pytest.mark.parametrize("max_move", [0.3, 0.8])
def test_forty_full_actions_of_a_fortieth_of_the_run_move_by_max_move(max_move):
    knobs = KnobSet([Knob(name="k", low=0, high=1, default=0.1, max_move=max_move)])
    position = knobs.default_positions(1)
    for _ in range(40):
        position = knobs.move(position, np.array([[5.0]]), progress=1 / 40)
    assert position[0, 0] == pytest.approx(0.1 + max_move)


def test_a_frozen_knob_does_not_move_and_its_neighbour_does():
    knobs = KnobSet([KNOBS["linear"], KNOBS["log2"]])
    start = knobs.default_positions(2)
    available = np.array([[0.0, 1.0], [1.0, 0.0]])
    moved = knobs.move(start, np.ones((2, 2)), progress=0.01, available=available) != start
    assert moved.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"scale": "log"}, "'log'"),
        ({"low": 1.0, "high": 1.0}, "low=1.0, high=1.0"),
        ({"low": float("nan")}, "low=nan"),
        ({"high": float("inf")}, "high=inf"),
        ({"default": 2.0}, "got 2"),
        ({"default": float("nan")}, "got nan"),
        ({"scale": "log2"}, "got 0"),
        ({"scale": "logit"}, "[0, 1]"),
        ({"scale": "levels", "levels": (0.0,)}, "(0.0,)"),
        ({"scale": "levels", "levels": (0.0, 0.5, 0.5, 1.0)}, "0.5, 0.5"),
        ({"scale": "levels", "levels": (0.0, 0.5)}, "got 0, 1"),
        ({"max_move": 0.0}, "got 0"),
        ({"max_move": float("nan")}, "got nan"),
        ({"max_move": float("inf")}, "got inf"),
    ],
)
def test_a_knob_that_makes_no_sense_is_refused_by_name_with_what_was_received(arguments, received):
    sound = {"name": "wheel", "low": 0.0, "high": 1.0, "default": 0.5}
    with pytest.raises(ValueError, match=r"Knob 'wheel': .*" + re.escape(received)):
        Knob(**{**sound, **arguments})


def test_an_unknown_scale_suggests_a_known_one():
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        Knob(name="k", low=0, high=1, default=0, scale="liner")


def test_an_unknown_knob_lists_the_known_and_suggests_the_closest():
    knobs = KnobSet(list(KNOBS.values()))
    message = r"Unknown knob 'dropuot'\. Known: dropout, base, beta, width\. Did you mean 'dropout'"
    with pytest.raises(ValueError, match=message):
        knobs.positions({"dropuot": 0.1}, 1)
    with pytest.raises(ValueError, match=message):
        knobs["dropuot"]


@pytest.mark.parametrize("value", [0.7, -0.1, float("nan")])
def test_a_value_outside_the_range_is_refused_with_the_range(value):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 0\.6\], got .*{value}"):
        KnobSet([KNOBS["linear"]]).positions({"dropout": value}, 1)


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_a_knob_set_needs_knobs_with_different_names(names):
    with pytest.raises(ValueError, match=re.escape(f"different names, got {names}")):
        KnobSet([Knob(name=name, low=0, high=1, default=0) for name in names])


def test_positions_of_some_values_leave_the_other_knobs_at_their_defaults():
    knobs = KnobSet([KNOBS["linear"], KNOBS["log2"]])
    values = knobs.values(knobs.positions({"dropout": np.array([0.0, 0.6])}, 2))
    assert values["dropout"].tolist() == [0.0, 0.6]
    assert values["base"].tolist() == [10_000.0, 10_000.0]


@pytest.mark.parametrize("name", ["", "x\x1b[31m", "a\nb", 3])
def test_a_name_that_cannot_be_printed_is_refused(name):
    with pytest.raises(ValueError, match="a name must be of printable characters"):
        Knob(name=name, low=0, high=1, default=0.5)
