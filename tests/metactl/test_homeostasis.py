"""Set-points, drive and what is made of it, by hand-computed cases."""

import json

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from metactl.homeostasis import (
    Balance,
    SetPoints,
    control_effort,
    estimate,
    homeostasis_index,
    settling_steps,
)
from metactl.knobs import Knob, KnobSet
from metactl.signals import INTERNAL, UNIVERSAL, Codec

CODEC = Codec(KnobSet((Knob(name="k", low=0.0, high=1.0, default=0.5),)))
NAMES = CODEC.names


def observations(n_runs=1, n_steps=10, measured=True, **signals):
    """Observations at the ends of control steps; all unnamed signals are 0."""
    seen = np.zeros((n_runs, n_steps, len(NAMES)))
    seen[..., NAMES.index("signal/progress")] = 2 * np.arange(1, n_steps + 1) / n_steps - 1
    for i, name in enumerate(NAMES):
        if name.startswith("has/"):
            seen[..., i] = measured
    for name, values in signals.items():
        seen[..., NAMES.index(f"signal/{name}")] = values
    return seen


def flat(median=0.0, width=1.0):
    """Set-points of two vitals that are the same over the whole run."""
    names = ("update_ratio", "loss_noise")
    return SetPoints(
        progress=(0.25, 0.75),
        medians={name: (median, median) for name in names},
        half_widths={name: (width, width) for name in names},
    )


@pytest.mark.parametrize(
    ("ratio", "noise", "wanted"),
    [
        (0.0, 0.0, 0.0),
        (1.0, -1.0, 0.0),  # at the edge of the band
        (2.0, 0.0, np.sqrt(1 / 2)),  # one half-width beyond
        (-3.0, 0.0, np.sqrt(2**4 / 2)),
        (3.0, -2.0, np.sqrt((2**4 + 1) / 2)),
    ],
)
def test_drive_is_the_root_of_the_weighted_fourth_powers_beyond_the_band(ratio, noise, wanted):
    seen = observations(update_ratio=ratio, loss_noise=noise)
    np.testing.assert_allclose(flat().drive(seen, NAMES), np.full((1, 10), wanted))


def test_a_vital_that_is_not_measured_counts_as_in_balance():
    seen = observations(update_ratio=9.0)
    assert flat().drive(seen, NAMES).min() > 1
    seen[..., NAMES.index("has/update_ratio_median")] = 0
    assert flat().drive(seen, NAMES).max() == 0


def test_vitals_from_inside_a_model_count_where_they_are_measured():
    inside = Codec(CODEC.knobs, (*UNIVERSAL, *INTERNAL)).names
    place = inside.index("signal/attention_entropy")
    seen = np.zeros((4, 10, len(inside)))
    seen[..., inside.index("signal/progress")] = 2 * np.arange(1, 11) / 10 - 1
    seen[..., [i for i, name in enumerate(inside) if name.startswith("has/")]] = 1
    seen[..., place] = np.array([-0.5, -0.4, 0.4, 0.5])[:, None]
    points = estimate(seen, inside)
    assert {"attention_entropy", "dormant_fraction"} <= set(points.medians)
    assert points.drive(seen, inside).max() < 0.2
    seen[..., place] += 3
    assert points.drive(seen, inside).min() > 1
    assert points.drive(observations(), NAMES).max() == 0  # runs without a look inside
    assert "attention_entropy" not in estimate(observations(4), NAMES).medians


def test_set_points_are_interpolated_over_progress():
    moving = SetPoints(
        progress=(0.0, 1.0),
        medians={"loss_noise": (0.0, 4.0)},
        half_widths={"loss_noise": (1.0, 1.0)},
    )
    on_the_way = observations(loss_noise=4 * np.arange(1, 11) / 10)
    assert moving.drive(on_the_way, NAMES).max() == pytest.approx(0, abs=1e-12)
    assert moving.drive(observations(loss_noise=4.0), NAMES)[0, 0] == pytest.approx(2.6**2)


def test_estimated_set_points_are_medians_and_half_ranges_of_each_tenth():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 40)) * 2 + 3 + np.repeat(np.arange(10), 4)
    found = estimate(observations(200, 40, update_ratio=values), NAMES)
    assert found.progress == pytest.approx(np.arange(0.05, 1, 0.1))
    for i in range(10):
        piece = values[:, 4 * i : 4 * i + 4]
        low, middle, high = np.quantile(piece, (0.1, 0.5, 0.9))
        assert found.medians["update_ratio"][i] == pytest.approx(middle)
        assert found.half_widths["update_ratio"][i] == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("n_steps", [1, 3, 7, 10, 13, 40])
def test_every_bin_has_its_steps_whatever_the_number_of_control_steps(n_steps):
    found = estimate(observations(5, n_steps, loss_noise=1.5), NAMES)
    assert len(found.progress) == min(10, n_steps)
    assert set(found.medians["loss_noise"]) == {1.5}


def test_what_healthy_runs_do_not_measure_has_no_set_point():
    found = estimate(observations(5, 10, measured=False, loss_noise=1.0), NAMES)
    assert set(found.medians) == {"loss_noise"}  # the train loss is always there


def test_most_healthy_steps_are_in_balance_and_a_shifted_run_is_not():
    rng = np.random.default_rng(1)
    signals = ("update_ratio", "generalisation_gap", "gradient_trend", "loss_noise")
    healthy = observations(100, 40, **{name: rng.normal(size=(100, 40)) for name in signals})
    points = estimate(healthy, NAMES)
    fresh = observations(100, 40, **{name: rng.normal(size=(100, 40)) for name in signals})
    assert homeostasis_index(points.drive(fresh, NAMES)).mean() > 0.8
    ill = observations(1, 40, update_ratio=6.0)
    assert homeostasis_index(points.drive(ill, NAMES)) == 0


@pytest.mark.parametrize(
    ("drive", "onset", "wanted"),
    [
        ([0, 0, 5, 5, 0, 0, 0, 0], 2, 2),
        ([0, 0, 0, 0, 0, 0, 0, 0], 2, 0),
        ([0, 0, 5, 0, 5, 0, 0, 0], 2, 3),  # a short lull does not count
        ([0, 0, 5, 5, 5, 5, 5, 5], 2, 6),
        ([9, 9, 0, 0, 0, 0, 0, 0], 2, 0),
        ([0, 0, 0, 0, 0, 0, 5, 1], 6, 2),  # too short to be held
        ([0, 0, 0, 0, 0, 5, 5, 0, 0, 0], 2, 5),  # balance that was left later does not count
    ],
)
def test_settling_takes_until_balance_is_held(drive, onset, wanted):
    assert settling_steps(np.array(drive, dtype=float), onset) == wanted


def test_effort_is_the_way_that_all_knobs_go():
    positions = np.array([[[0.0, 0.5], [0.5, 0.5], [0.25, 1.0]], np.full((3, 2), 0.3)])
    assert control_effort(positions).tolist() == [1.25, 0.0]


def test_set_points_survive_json():
    adapter = TypeAdapter(SetPoints)
    text = json.dumps(adapter.dump_python(flat(), mode="json"))
    assert adapter.validate_python(json.loads(text)) == flat()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"half_widths": {"loss_noise": (1.0, 0.0)}}, "finite half-widths above 0"),
        ({"half_widths": {"loss_noise": (1.0,)}}, "one value per bin"),
        ({"half_widths": {"other": (1.0, 1.0)}}, "of every vital"),
        ({"half_widths": {"loss_noise": (1.0, float("nan"))}}, "finite half-widths above 0"),
        ({"medians": {"loss_noise": ("a", 1.0)}}, "valid number"),
    ],
)
def test_damaged_set_points_are_refused(change, words):
    whole = {
        "progress": (0.25, 0.75),
        "medians": {"loss_noise": (0.0, 0.0)},
        "half_widths": {"loss_noise": (1.0, 1.0)},
    }
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(SetPoints).validate_python({**whole, **change})


def test_set_points_out_of_order_are_refused():
    with pytest.raises(ValueError, match="increasing bins of progress"):
        SetPoints(progress=(0.5, 0.5), medians={}, half_widths={})


def test_the_board_shows_drive_share_in_balance_and_the_way_of_the_knobs_also_resumed():
    balance = Balance(flat(), CODEC, np.array([[0.5], [0.5]]))
    seen = observations(2, 2, update_ratio=np.array([[0.0, 0.0], [3.0, 0.0]]))
    for step, position in enumerate((0.75, 0.25)):
        seen[:, step, NAMES.index("knob/k/position")] = 2 * position - 1
    first = balance.read(seen[:, 0])
    drive = np.sqrt(2**4 / 2)
    assert first == {
        "homeostasis/control_effort": 0.25,
        "homeostasis/drive": pytest.approx(drive / 2),
        "homeostasis/index": 0.5,
    }
    assert balance.drive.tolist() == [0.0, pytest.approx(drive)]
    again = Balance(flat(), CODEC, np.array([[0.5], [0.5]]))
    again.load_state_dict(json.loads(json.dumps(balance.state_dict())))
    wanted = {"drive": 0.0, "index": 0.75, "control_effort": 0.75}
    for each in (balance, again):
        assert each.read(seen[:, 1]) == {f"homeostasis/{name}": x for name, x in wanted.items()}


def test_without_set_points_the_board_shows_the_effort_alone():
    balance = Balance(None, CODEC, np.array([[0.5]]))
    assert balance.read(observations(1, 1)[:, 0]) == {"homeostasis/control_effort": 0.0}
    assert balance.drive is None
