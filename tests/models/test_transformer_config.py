"""The shape of a transformer: what is accepted, what is refused and how."""

import dataclasses
import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from models import AdaptiveTransformer, TransformerConfig


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"vocab_size": 0}, ("vocab_size", "0")),
        ({"n_layers": -1}, ("n_layers", "-1")),
        ({"context": 0}, ("context", "0")),
        ({"d_ff": 0}, ("d_ff", "0")),
        ({"feed_forward": "relu"}, ("feed_forward", "gelu, swiglu", "'relu'")),
        ({"d_model": 30}, ("d_model=30", "n_heads=4")),
        ({"d_model": 12, "n_heads": 4}, ("d_model=12", "even")),
        ({"rope_base": 1.0}, ("rope_base", "1.0")),
        ({"rope_base": float("nan")}, ("rope_base", "nan")),
        ({"span_ramp": 0.0}, ("span_ramp", "0.1 tokens", "0.0")),
        ({"rope_base": 2e9}, ("rope_base", "1e+09", "2000000000.0")),
        ({"n_layers": True}, ("n_layers", "True")),
        ({"width_levels": (1e-12, 1.0)}, ("n_heads=4", "1e-12")),
        ({"width_levels": ()}, ("width_levels", "()")),
        ({"width_levels": (0.5,)}, ("width_levels", "0.5")),
        ({"width_levels": (0.0, 1.0)}, ("width_levels", "0.0")),
        ({"width_levels": (0.5, 0.5, 1.0)}, ("width_levels", "(0.5, 0.5, 1.0)")),
        (
            {"d_model": 12, "n_heads": 3, "width_levels": (0.5, 1.0)},
            ("0.5", "n_heads=3", "1.5 of", "multiple of 2"),
        ),
        (
            {"d_ff": 10, "width_levels": (0.25, 1.0)},
            ("0.25", "hidden_units=10", "2.5 of", "a multiple of 4"),
        ),
    ],
)
def test_a_bad_shape_is_refused_with_the_field_and_what_was_received(options, parts):
    with pytest.raises(ValueError) as error:
        TransformerConfig(**options)
    for part in parts:
        assert part in str(error.value)


def test_fields_of_another_type_are_refused_by_name():
    code = """
from models import TransformerConfig
for field in ({"span_ramp": "4"}, {"rope_base": "1e4"}, {"width_levels": ("a", 1.0)},
              {"rotation": {1: 2}}):
    try:
        TransformerConfig(**field)
    except ValueError as error:
        print(error)
"""  # in a process of its own: here, types are looked at before
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    ramp, base, levels, rotation = done.stdout.splitlines()
    assert ramp == "span_ramp must be finite and at least 0.1 tokens, got '4'"
    assert base == "rope_base must be a number in (1, 1e+09], got '1e4'"
    assert levels == "width_levels must be a list of numbers, got ('a', 1.0)"
    assert rotation.startswith("Unknown rotation field '1'. Known: ")


def test_a_shape_cannot_be_changed_or_given_by_position():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig().d_model = 64
    with pytest.raises(TypeError):
        TransformerConfig(256)


def test_a_rotation_is_what_was_given_whatever_becomes_of_the_dictionary():
    given = {"base_factors": [0.1, 10.0]}
    config = TransformerConfig(rotation=given)
    given["base_factors"].append(5.0)
    assert config.to_dict()["rotation"] == {"base_factors": [0.1, 10.0]}
    assert config.rotary.base_factors == (0.1, 10.0)


@pytest.mark.parametrize("context", [1, 2, 7, 64])
def test_a_controllers_ranges_lie_within_what_a_model_accepts(context):
    config = TransformerConfig(context=context, rope_base=1e9)
    knobs = AdaptiveTransformer(config).knobs
    for name, wanted in config.knob_ranges().items():
        low, high = knobs.bounds(name)
        assert low <= wanted["low"] <= wanted["high"] <= high, name


def test_derived_sizes_follow_their_rules():
    config = TransformerConfig(d_model=48, n_heads=4, context=64)
    assert (config.head_dim, config.hidden_units, config.ramp) == (12, 192, 8.0)
    assert TransformerConfig(context=4).ramp == 1.0
    assert TransformerConfig(d_ff=20, span_ramp=2.5).hidden_units == 20
    assert TransformerConfig(span_ramp=2.5).ramp == 2.5


@settings(max_examples=20, deadline=None, database=None)
@given(
    heads=st.sampled_from([4, 8]),
    half_head=st.integers(1, 6),
    layers=st.integers(1, 5),
    feed_forward=st.sampled_from(["gelu", "swiglu"]),
    ramp=st.one_of(st.none(), st.floats(0.1, 50)),
)
def test_to_dict_rebuilds_an_equal_shape(heads, half_head, layers, feed_forward, ramp):
    config = TransformerConfig(
        d_model=2 * heads * half_head,
        n_heads=heads,
        n_layers=layers,
        feed_forward=feed_forward,
        span_ramp=ramp,
    )
    assert TransformerConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(models.__path__, "models.")]
)
def test_the_examples_in_the_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
